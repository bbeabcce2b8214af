"""The verb that puts cut-out pictures together into one: collage."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.control import control_option, controls_of
from glassine.commands.draw import watch
from glassine.commands.lora import prompt_loras, with_prompt_loras
from glassine.commands.memory import warn_of_memory
from glassine.commands.options import (
    FILE,
    FOLDER,
    as_json,
    engine_of,
    engine_options,
    give,
    low_memory,
    model_size,
    overwrite,
    sampling_options,
    say,
    say_memory,
    settings_of,
)

if TYPE_CHECKING:
    from glassine.runtime.collage import Collage
    from glassine.runtime.collage_project import Project
    from glassine.runtime.control import Control


@click.command()
@click.argument("project", type=click.Path(path_type=Path), required=False)
@click.option("--model", type=FOLDER, help="The model.  [default: the project's]")
@click.option("--prompt", help="The whole picture in words.  [default: the project's]")
@click.option("--out", "-o", type=FILE, help="The picture to write.  [default: glassine-SEED.png]")
@click.option("--on", "previous", type=FILE,
              help="A picture drawn of this collage before: what has change 0 stays as it is there.")  # fmt: skip
@click.option("--only", multiple=True, metavar="WORDS",
              help="Draw only the layer with these words again, all else has change 0; may be repeated.")  # fmt: skip
@click.option("--preview-maps", type=FILE, help="Write a picture of layers, maps and words to this PNG; draw nothing.")
@click.option("--from", "replay", type=FILE, help="Draw the collage again that this PNG was drawn from.")
@control_option
@sampling_options
@prompt_loras
@model_size
@click.option("--preview", type=FILE, help="Write a rough preview to this PNG after every step.")
@overwrite
@engine_options
@low_memory
@as_json
def collage(project: Path | None, out: Path | None, as_json: bool, **asked: Any) -> None:
    """Put cut-out pictures together into one harmonious picture.

    PROJECT is a JSON file with a prompt and layers (docs/collage.md), an OpenRaster file of a drawing program whose
    layers are called as the prompt calls them, or a folder that has one of these. Each layer's words are drawn where
    it lies, and it changes as much as it may. Words need the UNet that 'glassine convert --base MODEL --collage' adds.

    \b
    Example:
      glassine collage table.json --model dreamshaper --preview-maps maps.png
      glassine collage table.json --model dreamshaper --seed 7 -o table.png
      glassine collage table.json --model dreamshaper --on table.png --only "a red cup" -o table-2.png
      glassine collage table.ora --model dreamshaper --prompt "a red cup and a blue book" -o table.png
      glassine collage --from table.png --model dreamshaper -o again.png
    """
    from glassine.runtime.collage_inputs import collage_inputs
    from glassine.runtime.control_pictures import with_controls
    from glassine.runtime.image import check_output, save_png
    from glassine.runtime.pipeline import Pipeline

    asked_for, controls = _asked_for(project, asked)
    for notice in asked_for.notices:
        say(f"note: {notice}")
    settings = {**asked_for.settings, **settings_of(asked)}
    if "seed" not in settings:
        settings["seed"] = secrets.randbelow(2**32)
        say(f"seed {settings['seed']}")
    model = asked["model"] if asked["model"] is not None else asked_for.model
    if model is None:
        raise click.UsageError('which model? Give --model FOLDER, or the project a "model"')
    layers = _with_frozen(asked_for.collage, asked["previous"], asked["only"])
    model = with_prompt_loras(model, settings.get("prompt", ""), asked)
    size = asked["size"] if asked["size"] is not None else asked_for.size
    with Pipeline.load(model, engine_of(asked), size=size) as pipe:
        request = pipe.request(settings)
        if asked["preview_maps"] is not None:
            from glassine.runtime.collage_picture import render

            check_output(asked["preview_maps"], overwrite=asked["overwrite"])
            save_png(asked["preview_maps"], render(pipe, layers, request), overwrite=asked["overwrite"])
            give({"path": str(asked["preview_maps"])}, str(asked["preview_maps"]), as_json)
            return
        path = out if out is not None else Path(f"glassine-{request.seed}.png")
        check_output(path, overwrite=asked["overwrite"])
        inputs = collage_inputs(pipe, layers, request)
        inputs = with_controls(inputs, controls, pipe.size, request.fit, engine=engine_of(asked))
        warn_of_memory(pipe, request, inputs, low_memory=asked["low_memory"])
        result = watch(pipe.run(request, inputs), asked["preview"])
        save_png(path, result.pixels, text=result.text, overwrite=asked["overwrite"])
        report = {"path": str(path), "seed": request.seed, "evaluations": result.evaluations}
        give({**report, "seconds": result.seconds, "notices": result.notices}, str(path), as_json)
        say_memory(pipe, asked)


def _asked_for(path: Path | None, asked: dict[str, Any]) -> tuple[Project, list[Control]]:
    """What PROJECT or --from says, and the controls."""
    from glassine.runtime.collage_project import Project, read_project, replayed
    from glassine.runtime.control_pictures import replayed_controls
    from glassine.runtime.metadata import read_record

    controls, replay = controls_of(asked), asked["replay"]
    if (path is None) == (replay is None):
        raise click.UsageError("give a PROJECT, or --from PICTURE.png to draw a collage again; one of them")
    if path is not None:
        return read_project(path, asked["prompt"]), controls
    record = read_record(replay)
    prompt = {} if asked["prompt"] is None else {"prompt": asked["prompt"]}
    project = Project(
        collage=replayed(record, replay.parent),
        settings={**record.request, **prompt},
        size=record.size,
        notices=record.notices,
    )
    return project, controls if controls else replayed_controls(record, replay.parent)


def _with_frozen(collage: Collage, previous: Path | None, only: Sequence[str]) -> Collage:
    """The collage on an earlier picture, and with change 0 for all that shall not be drawn again."""
    if previous is not None:
        collage = dataclasses.replace(collage, previous=previous)
    if not only:
        return collage
    known = [layer.words for layer in collage.layers]
    strange = [words for words in only if words not in known]
    if strange:
        raise click.UsageError(
            f'--only "{strange[0]}": no layer has these words; there are {", ".join(filter(None, known))}'
        )
    layers = [layer if layer.words in only else dataclasses.replace(layer, change=0.0) for layer in collage.layers]
    return dataclasses.replace(collage, layers=layers, background_change=0.0)
