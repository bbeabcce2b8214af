"""The verbs that draw in layers and lay them over each other: layers joint, fg2bg, bg2fg, extract; compose."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.draw import watch
from glassine.commands.options import (
    FILE,
    FOLDER,
    as_json,
    decoder_options,
    engine_of,
    engine_options,
    give,
    low_memory,
    model_size,
    options,
    overwrite,
    read_size,
    sampling_options,
    say,
    say_memory,
    settings_of,
)

if TYPE_CHECKING:
    from glassine.runtime.layers import Stack, Task
    from glassine.runtime.request import Request

layer_prompts = options(
    click.option("--fg-prompt", help="Words for the foreground alone, put before the PROMPT."),
    click.option("--bg-prompt", help="Words for the background alone."),
    click.option("--blend-prompt", help="Words for the whole picture alone."),
)
layer_options = options(
    sampling_options,
    decoder_options,
    click.option("--fit", type=click.Choice(["crop", "fit", "stretch"]), help="As in generate.  [default: crop]"),
    model_size,
    click.option("--out", "-o", type=FOLDER, default=Path("layers"), show_default=True, help="The folder to write."),
    overwrite,
    engine_options,
    low_memory,
    as_json,
)  # fmt: skip


@click.group()
def layers() -> None:
    """Draw pictures in layers, with LayerDiffuse's models.

    Every command writes a folder: the layers, the whole picture and the composite as PNG, and layers.ora, which GIMP
    and Krita open with all layers in place.

    \b
    Example:
      glassine layers joint dreamshaper "a cup of tea on a table" -o tea
      glassine layers fg2bg dreamshaper "a table by the window" --image cup.png -o tea
    """


@layers.command()
@click.argument("model", type=FOLDER)
@click.argument("prompt")
@layer_prompts
@layer_options
def joint(model: Path, prompt: str, **asked: Any) -> None:
    """Draw foreground, background and both together.

    \b
    Example:
      glassine layers joint dreamshaper "a cup of tea on a table" --bg-prompt "an empty table" -o tea
    """
    _draw(model, prompt, "joint", {}, asked)


@layers.command()
@click.argument("model", type=FOLDER)
@click.argument("prompt")
@click.option("--image", type=FILE, required=True, help="The foreground: a PNG with an alpha channel.")
@layer_prompts
@layer_options
def fg2bg(model: Path, prompt: str, image: Path, **asked: Any) -> None:
    """Draw a background behind a foreground.

    \b
    Example:
      glassine layers fg2bg dreamshaper "a table by the window" --image cup.png -o tea
    """
    _draw(model, prompt, "fg2bg", {"fg": image}, asked)


@layers.command()
@click.argument("model", type=FOLDER)
@click.argument("prompt")
@click.option("--image", type=FILE, required=True, help="The background.")
@layer_prompts
@layer_options
def bg2fg(model: Path, prompt: str, image: Path, **asked: Any) -> None:
    """Draw a transparent foreground in front of a background.

    \b
    Example:
      glassine layers bg2fg dreamshaper "a cup of tea" --image table.png -o tea
    """
    _draw(model, prompt, "bg2fg", {"bg": image}, asked)


@layers.command()
@click.argument("model", type=FOLDER)
@click.argument("prompt", default="")
@click.option("--image", type=FILE, required=True, help="The whole picture.")
@click.option("--background", type=FILE, help="Its background: the foreground is drawn, transparent.")
@click.option("--foreground", type=FILE, help="Its foreground, with alpha: the background is drawn.")
@layer_prompts
@layer_options
def extract(
    model: Path, prompt: str, image: Path, background: Path | None, foreground: Path | None, **asked: Any
) -> None:
    """Take a picture apart.

    With one of its layers given, the other is drawn. With none, the picture shows an object on plain mid-grey, as
    LayerDiffuse's pictures do before their alpha is read, and alpha is read from it without drawing: for pictures
    that were made larger or retouched.

    \b
    Example:
      glassine layers extract sdxl "a cup of tea" --image tea.png --background table.png -o cup
      glassine layers extract dreamshaper --image cup-grey.png -o cup
    """
    if background is not None and foreground is not None:
        raise click.UsageError("give --background or --foreground, not both: the other one is drawn")
    if background is None and foreground is None:
        _read_alpha(model, image, asked)
        return
    layer = {"bg": background} if background is not None else {"fg": foreground}
    _draw(model, prompt, "extract", {"blend": image, **layer}, asked)


@click.command()
@click.argument("pictures", type=FILE, nargs=-1, required=True, metavar="BACK... FRONT")
@click.option("--background", metavar="COLOUR|FILE",
              help="Show them over this: a colour, a picture, or checkerboard.")  # fmt: skip
@click.option("--size", metavar="WxH", callback=lambda _, __, value: read_size(value) if value else None,
              help="Bring every layer to this size first, colours and alpha apart.  [default: theirs]")  # fmt: skip
@click.option("--out", "-o", type=FILE, default=Path("composite.png"), show_default=True,
              help="The picture to write; NAME.ora keeps the layers.")  # fmt: skip
@overwrite
@as_json
def compose(pictures: tuple[Path, ...], background: str | None, out: Path, as_json: bool, **asked: Any) -> None:
    """Lay pictures with alpha over each other.

    The first is at the back. Needs no model. With one picture, looks at it over a background or changes its size.

    \b
    Example:
      glassine compose table.png cup.png steam.png -o tea.png
      glassine compose table.png cup.png -o tea.ora
      glassine compose star.png --background "#204060" -o star-on-blue.png
      glassine compose star.png --size 1024x1024 -o star-large.png
    """
    from glassine.runtime.compose import background as background_of
    from glassine.runtime.compose import opaque, over, resized
    from glassine.runtime.image import check_output, read_picture, save_png
    from glassine.runtime.openraster import SUFFIX, Layer, check_openraster, save_openraster

    layered = out.suffix.lower() == SUFFIX
    (check_openraster if layered else check_output)(out, overwrite=asked["overwrite"])
    read = [read_picture(path, keep_alpha=True) for path in pictures]
    names = [path.stem for path in pictures]
    pixels = [picture.pixels if asked["size"] is None else resized(picture.pixels, *asked["size"]) for picture in read]
    if background is not None:
        height, width = pixels[0].shape[:2]
        pixels.insert(0, opaque(background_of(background, width, height)))
        names.insert(0, "background")
    if layered:
        stack = [Layer(name=name, pixels=layer) for name, layer in zip(names, pixels, strict=True)]
        save_openraster(out, stack, overwrite=asked["overwrite"])
    else:
        profiles = {picture.icc_profile for picture in read}
        if len(profiles) > 1:
            say("note: the pictures have different colour profiles; the numbers are mixed as they are, without one")
        profile = profiles.pop() if len(profiles) == 1 else None
        save_png(out, over(pixels), icc_profile=profile, overwrite=asked["overwrite"])
    give({"path": str(out), "layers": names}, str(out), as_json)


def _draw(model: Path, prompt: str, task: Task, files: dict[str, Path | None], asked: dict[str, Any]) -> None:
    """Read the given layers, draw the others, write the folder."""
    from glassine.runtime.layers import NAMES, check_folder, draw_layers, read_layer
    from glassine.runtime.pipeline import Pipeline

    check_folder(asked["out"], overwrite=asked["overwrite"])
    with Pipeline.load(model, engine_of(asked), size=asked["size"]) as pipe:
        request = _request(pipe.request, prompt, asked)
        given = {
            name: read_layer(path, *pipe.size, name=NAMES[name], fit=request.fit)
            for name, path in files.items()
            if path is not None
        }
        stack = draw_layers(pipe, request, task, given, draw=watch)
        say_memory(pipe, asked)
        _finish(stack, asked, {"seed": request.seed, "evaluations": sum(r.evaluations for r in stack.results)})


def _request(make: Any, prompt: str, asked: dict[str, Any]) -> Request:
    settings = {"prompt": prompt, **settings_of(asked)}
    if "seed" not in settings:
        settings["seed"] = secrets.randbelow(2**32)
        say(f"seed {settings['seed']}")
    request: Request = make(settings)
    return request


def _read_alpha(model: Path, image: Path, asked: dict[str, Any]) -> None:
    """Alpha from a picture on mid-grey, by the transparent decoder alone."""
    from glassine.runtime.image import fit_picture, read_picture
    from glassine.runtime.layers import Stack, alpha_of_grey, check_folder
    from glassine.runtime.pipeline import Pipeline

    check_folder(asked["out"], overwrite=asked["overwrite"])
    with Pipeline.load(model, engine_of(asked), size=asked["size"]) as pipe:
        request = pipe.request(settings_of(asked))
        picture = fit_picture(read_picture(image), *pipe.size, request.fit)
        rgba, health = alpha_of_grey(pipe, picture.pixels, 1 if request.passes == 1 else 8)
        say_memory(pipe, asked)
    for notice in (*picture.notices, *health.notices):
        say(f"note: {notice}")
    _finish(Stack(layers={"fg": rgba}, blend=None, results=()), asked, {})


def _finish(stack: Stack, asked: dict[str, Any], report: dict[str, Any]) -> None:
    from glassine.runtime.layers import save_stack

    paths = [str(path) for path in save_stack(asked["out"], stack, overwrite=asked["overwrite"])]
    give({"folder": str(asked["out"]), "paths": paths, **report}, "\n".join(paths), asked["as_json"])
