"""The verbs that draw: generate, map, fan."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from glassine.commands.control import control_option, controls_of
from glassine.commands.lora import prompt_loras, with_prompt_loras
from glassine.commands.memory import warn_of_memory
from glassine.commands.options import (
    FILE,
    FOLDER,
    as_json,
    bar,
    engine_of,
    engine_options,
    family_options,
    give,
    low_memory,
    map_options,
    model_size,
    overwrite,
    read_size,
    sampling_options,
    say,
    say_memory,
    settings_of,
    transparency_options,
)

if TYPE_CHECKING:
    from glassine.runtime.control import Control
    from glassine.runtime.inputs import MapSource
    from glassine.runtime.run import Result, Run


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("prompt", required=False)
@click.option("--out", "-o", type=FILE, help="The picture to write.  [default: glassine-SEED.png]")
@click.option("--image", type=FILE, help="Change this picture instead of starting from noise.")
@map_options
@control_option
@sampling_options
@transparency_options
@family_options
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Pictures; each has the next seed.")
@click.option("--from", "replay", type=FILE, help="Draw again what this PNG says; other options change it.")
@prompt_loras
@model_size
@click.option("--preview", type=FILE, help="Write a rough preview to this PNG after every step.")
@overwrite
@engine_options
@low_memory
@as_json
def generate(model: Path, prompt: str | None, out: Path | None, count: int, as_json: bool, **asked: Any) -> None:
    """Draw a picture from a PROMPT with MODEL.

    From noise, or from a picture that may change as much as its map says.

    \b
    Example:
      glassine generate dreamshaper "a paper boat on a lake" --seed 7 -o boat.png
      glassine generate dreamshaper "a swan" --image boat.png --map gradient:left-right -o swan.png
      glassine generate dreamshaper "a red sail" --image boat.png --mask sail.png --softness 24 -o sail-red.png
      glassine generate dreamshaper "a clay boat" --control canny=edges.png:weight=0.8:stop=0.6 -o clay.png
      glassine generate sdxl "a paper boat" --refiner sdxl-refiner --refine-at 0.8 -o boat.png
      glassine generate dreamshaper "a paper boat" --transparent --background "#204060" -o boat-alone.png
      glassine generate dreamshaper "a paper boat <lora:ink:0.8>" --lora-dir ~/loras -o boat-ink.png
      glassine generate dreamshaper --from boat.png -o again.png
    """
    from glassine.commands.views import check_views, save_views
    from glassine.runtime.control_pictures import with_controls
    from glassine.runtime.image import check_output, save_png
    from glassine.runtime.inputs import read_inputs
    from glassine.runtime.pipeline import Pipeline

    drawing = drawing_of(prompt, asked)
    if "seed" not in drawing.settings:
        drawing.settings["seed"] = secrets.randbelow(2**32)
        say(f"seed {drawing.settings['seed']}")
    model = with_prompt_loras(model, drawing.settings.get("prompt", ""), asked)
    with Pipeline.load(model, engine_of(asked), size=drawing.size, refiner=asked["refiner"]) as pipe:
        first = pipe.request(drawing.settings, image_alone=drawing.image is not None and drawing.maps.source is None)
        requests = [dataclasses.replace(first, seed=first.seed + index) for index in range(count)]
        paths = [output_of(out, request.seed, count) for request in requests]
        for path in paths:
            check_output(path, overwrite=asked["overwrite"])
            check_views(path, first, pipe.size, asked)
        inputs = read_inputs(drawing.image, drawing.maps, *pipe.size, fit=first.fit, keep_alpha=first.transparent)
        inputs = with_controls(inputs, drawing.controls, pipe.size, first.fit, engine=engine_of(asked))
        warn_of_memory(pipe, first, inputs, low_memory=asked["low_memory"])
        for path, request in zip(paths, requests, strict=True):
            result = watch(pipe.run(request, inputs), asked["preview"])
            save_png(
                path, result.pixels, text=result.text, icc_profile=result.icc_profile, overwrite=asked["overwrite"]
            )
            save_views(path, result, asked)
            report = {"path": str(path), "seed": request.seed, "evaluations": result.evaluations}
            give({**report, "seconds": result.seconds, "notices": result.notices}, str(path), as_json)
        say_memory(pipe, asked)


class Drawing(NamedTuple):
    """What to draw: settings, source picture, its map, the size if one was said, and what steers it."""

    settings: dict[str, Any]
    image: Path | None
    maps: MapSource
    size: tuple[int, int] | None
    controls: list[Control]


def drawing_of(prompt: str | None, asked: dict[str, Any]) -> Drawing:
    """Read what to draw from the options, over what --from recorded."""
    from glassine.runtime.control_pictures import replayed_controls
    from glassine.runtime.inputs import MapSource, replayed_inputs
    from glassine.runtime.metadata import read_record

    settings, image, size, controls = settings_of(asked), asked["image"], asked["size"], controls_of(asked)
    if prompt is not None:
        settings["prompt"] = prompt
    maps = MapSource(
        map=asked["change_map"],
        mask=asked["mask"],
        softness=asked["softness"] if asked["softness"] is not None else 0.0,
        white=asked["map_white"] if asked["map_white"] is not None else "change",
    )
    if asked.get("replay") is not None:
        record = read_record(asked["replay"])
        for notice in record.notices:
            say(f"note: {notice}")
        if record.collage is not None:
            raise click.UsageError("this picture is a collage; draw it again with: glassine collage --from PICTURE.png")
        settings = {**record.request, **settings}
        if "refiner" in record.model and asked.get("refiner") is None:
            say(f"note: the last steps were drawn by {record.model['refiner']}; give it with --refiner")
        image, maps = replayed_inputs(record, asked["replay"].parent, image, maps)
        size = record.size if size is None else size
        controls = controls if controls else replayed_controls(record, asked["replay"].parent)
    elif prompt is None:
        raise click.UsageError("give a PROMPT, or --from PICTURE.png to draw a picture again")
    return Drawing(settings, image, maps, size, controls)


def output_of(out: Path | None, seed: int, count: int) -> Path:
    """Where a picture goes: the name that was asked for, with the seed if there are several."""
    if out is None:
        return Path(f"glassine-{seed}.png")
    return out if count == 1 else out.with_name(f"{out.stem}-{seed}{out.suffix}")


def watch(run: Run, preview: Path | None = None) -> Result:
    """Finish a run behind a progress bar, with a preview after every step if wanted."""
    from glassine.runtime.image import save_png

    for notice in run.notices:
        say(f"note: {notice}")
    with bar("drawing") as advance:
        for step in run:
            advance(step.i + 1 - (step.steps - run.steps), run.steps, f"sigma {step.sigma:6.2f}")
            if preview is not None:
                save_png(preview, run.preview(step), overwrite=True)
        advance(run.steps, run.steps, "decoding")
        result = run.finish()
    for notice in result.notices[len(run.notices) :]:
        say(f"note: {notice}")
    return result


@click.command("map")
@click.option("--image", type=FILE, required=True, help="The picture that the map is for.")
@map_options
@click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="As in generate.")
@click.option(
    "--size",
    callback=lambda _, __, value: read_size(value) if value else None,
    metavar="WxH",
    help="[default: the picture's]",
)
@click.option("--out", "-o", type=FILE, default=Path("map.png"), show_default=True, help="The picture to write.")
@overwrite
@as_json
def show_map(out: Path, as_json: bool, **asked: Any) -> None:
    """Show which part of a picture will change when.

    Draws the steps that each part of the picture takes part in over it; needs no model.

    \b
    Example:
      glassine map --image street.png --map depth.png --steps 20 -o plan.png
      glassine map --image street.png --mask door.png --softness 24
    """
    from glassine.runtime.change_map import n_table, to_cells
    from glassine.runtime.image import check_output, read_picture, save_png
    from glassine.runtime.inputs import read_inputs
    from glassine.runtime.map_picture import render
    from glassine.runtime.request import Request
    from glassine.runtime.run import sigmas_of
    from glassine.runtime.schedule import STABLE_DIFFUSION, last_steps

    check_output(out, overwrite=asked["overwrite"])
    drawing = drawing_of("", asked)
    if drawing.maps.source is None:
        raise click.UsageError("give --map or --mask")
    request = Request.from_dict(drawing.settings)
    width, height = drawing.size if drawing.size is not None else read_picture(asked["image"]).size
    inputs = read_inputs(drawing.image, drawing.maps, width // 8 * 8, height // 8 * 8, fit=request.fit)
    for notice in inputs.notices:
        say(f"note: {notice}")
    assert inputs.change_map is not None and inputs.pixels is not None  # noqa: PT018 - read with a picture and a map
    sigmas = last_steps(sigmas_of(STABLE_DIFFUSION, request), request.strength)
    table = n_table(to_cells(inputs.change_map), sigmas, request.rule, total=request.steps)
    save_png(out, render(table, len(sigmas) - 1, inputs.pixels), overwrite=asked["overwrite"])
    give({"path": str(out), "evaluations": int(table.max())}, str(out), as_json)


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("prompt")
@click.option("--image", type=FILE, required=True, help="The picture to change.")
@click.option("--columns", type=int, default=8, show_default=True, help="Strengths, from 0 to 1.")
@click.option("--exact", is_flag=True, help="One run a column, instead of one run whose columns see each other.")
@click.option("--fit", type=click.Choice(["crop", "fit", "stretch"]), help="As in generate.  [default: crop]")
@control_option
@sampling_options
@prompt_loras
@model_size
@click.option("--out", "-o", type=FILE, default=Path("fan.png"), show_default=True, help="The picture to write.")
@overwrite
@engine_options
@low_memory
@as_json
def fan(model: Path, prompt: str, image: Path, out: Path, exact: bool, as_json: bool, **asked: Any) -> None:
    """Draw a picture in columns of rising strength.

    To find the strength you want.

    \b
    Example:
      glassine fan dreamshaper "a swan" --image boat.png -o fan.png
      glassine fan dreamshaper "a swan" --image boat.png --columns 5 --exact -o fan.png
    """
    from glassine.runtime import fan as fans
    from glassine.runtime.control_pictures import with_controls
    from glassine.runtime.image import check_output, save_png
    from glassine.runtime.inputs import MapSource, read_inputs
    from glassine.runtime.pipeline import Pipeline

    check_output(out, overwrite=asked["overwrite"])
    settings = {"seed": secrets.randbelow(2**32), **settings_of(asked), "prompt": prompt}
    model = with_prompt_loras(model, prompt, asked)
    with Pipeline.load(model, engine_of(asked), size=asked["size"]) as pipe:
        request = pipe.request(settings)
        strips = fans.columns(pipe.size[0], asked["columns"])
        inputs = read_inputs(image, MapSource(), *pipe.size, fit=request.fit)
        inputs = with_controls(inputs, controls_of(asked), pipe.size, request.fit, engine=engine_of(asked))
        if exact:
            results = [(column, watch(run)) for column, run in fans.exact_fan(pipe, request, inputs, strips)]
            pixels, words = fans.assemble(results), "exact: one run a column"
        else:
            pixels = watch(fans.approximate_fan(pipe, request, inputs, strips)).pixels
            words = "approximate: one run, the columns see each other"
        say_memory(pipe, asked)
    save_png(out, fans.label(pixels, strips, words), overwrite=asked["overwrite"])
    strengths = [column.strength for column in strips]
    give({"path": str(out), "seed": request.seed, "strengths": strengths, "exact": exact}, str(out), as_json)
