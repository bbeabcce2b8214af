"""What the verbs share: options that several have, and how results, notes and progress reach the user."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.pipeline import Pipeline

F = TypeVar("F", bound=Callable[..., Any])

# The names of the registries, spelled out so that --help imports neither NumPy nor the samplers; a test compares them.
SAMPLERS = (
    "ddim", "euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde", "dpmpp_sde", "dpmpp_2s_a", "unipc", "pndm", "lcm", "tcd",
)  # fmt: skip
SPACINGS = (
    "linspace", "leading", "trailing", "rounded", "sgm_uniform", "karras", "exponential", "kl_optimal", "beta", "ays",
    "ays_xl", "lcm",
)  # fmt: skip
RULES = ("scale", "cap", "authors", "time")
UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Stack option decorators so that help lists them in the order given."""

    def apply(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
model_size = click.option(
    "--size", callback=lambda _, __, value: read_size(value) if value is not None else None, metavar="WxH",
    help="One of the model's sizes, in pixels.  [default: its first]",
)  # fmt: skip
engine_options = options(
    click.option("--engine", type=click.Choice(["auto", "coreml", "portable"]), default="auto", show_default=True,
                 help="auto: Core ML on a Mac, PyTorch elsewhere."),
    click.option("--units", type=click.Choice(UNITS),
                 help="Core ML compute units, of every part.  [default: as 'glassine tune' found, or all]"),
    click.option("--device", help="Of the portable engine: cpu, cuda, mps.  [default: as tuned, or cpu]"),
    click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
                 help="Of the portable engine; fp16 rounds after every operation, as the Neural Engine does."),
)  # fmt: skip
low_memory = click.option(
    "--low-memory",
    is_flag=True,
    help="Keep only the parts loaded that one stage of a picture needs; each is loaded anew for every picture.",
)
map_options = options(
    click.option("--map", "change_map", metavar="FILE|WORDS",
                 help="Change map: a grey picture, or words such as gradient:left-right, box:10%,10%,50%,60%."),
    click.option("--mask", type=FILE, help="A black and white picture: white may change."),
    click.option("--softness", type=float, metavar="PIXELS", help="Soft outward border of the mask."),
    click.option("--map-white", type=click.Choice(["change", "keep"]),
                 help="What white means in the map or mask.  [default: change]"),
    click.option("--rule", type=click.Choice(RULES), help="How the map becomes steps.  [default: scale]"),
    click.option("--fit", type=click.Choice(["crop", "fit", "stretch"]),
                 help="A picture of another shape than the model's.  [default: crop]"),
)  # fmt: skip
sampling_options = options(
    click.option("--negative", "negative_prompt", help="What the picture should not show."),
    click.option("--strength", type=float, 
                 help="How much of the image may change, 0 to 1.  [default: 0.75; 1 with a map]"),
    click.option("--steps", type=int, help="Denoising steps.  [default: the model's, or 20]"),
    click.option("--cfg", "guidance_scale", type=float,
                 help="Classifier-free guidance, 1 = without.  [default: the model's, or 7.5]"),
    click.option("--rescale", "guidance_rescale", type=float, help="Guidance rescale, 0 to 1.  [default: 0]"),
    click.option("--sampler", type=click.Choice(SAMPLERS), help="[default: the model's, or dpmpp_2m]"),
    click.option("--spacing", type=click.Choice(SPACINGS), help="Noise levels.  [default: the sampler's own]"),
    click.option("--eta", type=float, help="Share of fresh noise, for samplers that have it."),
    click.option("--seed", type=int, help="[default: a new one, printed]"),
    click.option("--noise", type=click.Choice(["torch", "philox"]),
                 help="torch: seeds as on a Mac; philox: as on CUDA.  [default: torch]"),
    click.option("--clip-skip", type=int, help="1 = the last layer, 2 = the one before ...  [default: the model's]"),
    click.option("--emphasis", type=click.Choice(["original", "no_norm"]), help="How (word:1.3) weighs."),
)  # fmt: skip
decoder_options = options(
    click.option("--passes", type=int, help="Of the transparent decoder: 1, fast, or 8, best.  [default: 8]"),
    click.option("--stop-at", type=float, metavar="SHARE",
                 help="Draw the end with the model's own UNet: after this share of the way, 0 to 1.  [default: 1]"),
)  # fmt: skip
transparency_options = options(
    click.option("--transparent", is_flag=True, default=None, help="Draw RGBA, with LayerDiffuse's networks."),
    decoder_options,
    click.option("--background", metavar="COLOUR|FILE",
                 help="Also write NAME-over.png: how it looks over a colour, a picture or a checkerboard."),
    click.option("--keep-grey", is_flag=True, help="Also write NAME-grey.png: the picture on grey, before its alpha."),
    click.option("--no-padding", is_flag=True,
                 help="Refuse sizes that are not multiples of 64; the transparent decoder pads and crops them."),
)  # fmt: skip
family_options = options(
    click.option("--refiner", type=FOLDER, help="A model that draws the last steps, such as SDXL's refiner."),
    click.option("--refine-at", type=float, metavar="SHARE",
                 help="The share of the noise that is gone when the refiner takes over.  [default: 0.8]"),
    click.option("--original-size", callback=lambda _, __, value: read_size(value) if value is not None else None,
                 metavar="WxH", help="SDXL: draw as pictures that had this size look.  [default: the picture's]"),
    click.option("--crop", callback=lambda _, __, value: read_pair(value) if value is not None else None,
                 metavar="LEFT,TOP", help="SDXL: draw as pictures cropped so look.  [default: 0,0]"),
    click.option("--image-cfg", "image_guidance", type=float,
                 help="instruct-pix2pix: guidance by the picture, beside --cfg.  [default: 1.5]"),
    click.option("--prediction-type", type=click.Choice(["epsilon", "v_prediction", "sample"]),
                 help="What the UNet predicts, for a folder of others.  [default: what the model says, or its size]"),
)  # fmt: skip
SETTINGS = (
    "negative_prompt", "strength", "steps", "guidance_scale", "guidance_rescale", "sampler", "spacing", "eta", "seed",
    "noise", "clip_skip", "emphasis", "rule", "fit", "refine_at", "original_size", "crop", "image_guidance",
    "prediction_type", "transparent", "passes", "stop_at", "fg_prompt", "bg_prompt", "blend_prompt",
)  # fmt: skip


def engine_of(asked: dict[str, Any]) -> EngineOptions:
    """The engine options among a verb's parameters."""
    from glassine.runtime.engine import EngineOptions

    return EngineOptions(
        engine=asked["engine"],
        compute_units=asked["units"],
        device=asked["device"],
        precision=asked["precision"],
        low_memory=asked.get("low_memory", False),
        tell=say,
    )


def say_memory(pipe: Pipeline, asked: dict[str, Any]) -> None:
    """Say what --low-memory came to."""
    if asked["low_memory"]:
        peak, used = pipe.residents.peak / 1e6, pipe.residents.used / 1e6
        say(f"weights in memory: at most {peak:.1f} MB at a time, {used:.1f} MB without --low-memory")


def settings_of(asked: dict[str, Any]) -> dict[str, Any]:
    """The picture's settings that were given; unset is None, 0 is a value."""
    return {name: asked[name] for name in SETTINGS if asked.get(name) is not None}


def say(message: str) -> None:
    """Tell the user something that is not the result."""
    click.echo(message, err=True)


def give(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the result: one JSON object, or its plain text."""
    click.echo(json.dumps(result) if as_json else text)


@contextmanager
def bar(words: str) -> Iterator[Callable[[float, float | None, str], None]]:
    """Show a progress bar on stderr, to people only; yields advance(done, total, words)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=None)
        yield lambda done, total, words: progress.update(task, completed=done, total=total, description=words)


def read_size(value: str) -> tuple[int, int]:
    """Read a size such as 512x768: width x height."""
    width, cross, height = value.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{value!r} is not a size; expected WIDTHxHEIGHT in pixels, such as 512x768")
    return int(width), int(height)


def read_pair(value: str) -> tuple[int, int]:
    """Read two whole numbers such as 0,64: pixels from the left and from the top."""
    left, comma, top = value.partition(",")
    if not (comma and left.strip().isdecimal() and top.strip().isdecimal()):
        raise click.BadParameter(f"{value!r} is not LEFT,TOP; expected two numbers of pixels, such as 0,64")
    return int(left), int(top)
