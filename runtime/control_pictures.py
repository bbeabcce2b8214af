"""The pictures of controls: files -> hints and maps of the model's size; a PNG's record -> the same controls again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glassine.errors import RequestError
from glassine.runtime.change_map import is_description, parse
from glassine.runtime.control import Control, Fit, Float, ReadyControl
from glassine.runtime.engine import EngineOptions
from glassine.runtime.image import Source, fit_map, read_map, read_picture
from glassine.runtime.inputs import Inputs, describe, recorded_file
from glassine.runtime.metadata import Record

PICTURES = ("image", "map", "mask")


def with_controls(
    inputs: Inputs,
    controls: Sequence[Control],
    size: tuple[int, int],
    fit: Fit = "crop",
    *,
    engine: EngineOptions | None = None,
) -> Inputs:
    """Return the inputs of a picture with the pictures of its controls, read and brought to the model's size.

    Args:
        inputs: of the picture; its source is the hint of controls that have none, its change map (half and above) the
            mask of those that inpaint and have none.
        controls: in any order; their residuals are summed.
        size: (width, height) in pixels, the model's. fit: for hints of another shape that do not say it themselves.
        engine: for preprocessors that run a network.

    Raises:
        RequestError: a picture that cannot be read, or has transparent pixels, or is not there.
    """
    ready = tuple(_ready(control, inputs, size, fit, engine) for control in controls)
    notices = tuple(notice for one in ready for notice in one.notices)
    return dataclasses.replace(inputs, controls=ready, notices=(*inputs.notices, *notices))


def _ready(
    control: Control, inputs: Inputs, size: tuple[int, int], fit: Fit, engine: EngineOptions | None
) -> ReadyControl:
    from glassine.runtime.preprocess import Preprocess, hint  # imports OpenCV, which others need not wait for

    fit = control.fit if control.fit is not None else fit
    name = f"hint of {control.net}"
    mask = control.mask
    words = control.preprocess if control.preprocess is not None else ("none" if mask is None else "inpaint")
    how = Preprocess.read(words, fit=fit)
    source: Source | None = control.image
    files: dict[str, dict[str, str]] = {}
    if source is None:
        source, mask = _from_inputs(control, inputs, how.name, mask)
    picture = read_picture(source, name=name)
    if picture.alpha is not None and how.name == "none":
        raise RequestError(
            f"{picture.name}: has transparent pixels, and a hint is taken as it is; put it over the background its net "
            "wants (black for edges), or say preprocess= to make a hint from a photograph"
        )
    made = hint(source, size, how, mask=mask, engine=engine, name=name)
    notices = made.notices
    if picture.size != size:
        said = f"{picture.name}: {_x(picture.size)} brought to {_x(size)} as a hint ({fit})"
        notices = (*notices, said)
    if control.image is not None:
        files["image"] = describe(control.image, picture.pixels)
    if control.mask is not None:
        files["mask"] = describe(control.mask, read_map(control.mask).values)
    control_map, described, further = _map(control, picture.size, size, fit)
    if described is not None:
        files["map"] = described
    if control_map is None:
        control_map = inputs.control_map
    return ReadyControl(control=control, hint=made.values, map=control_map, files=files, notices=(*notices, *further))


def _from_inputs(control: Control, inputs: Inputs, how: str, mask: Source | None) -> tuple[Source, Source | None]:
    """The run's own picture as the hint, and where its change map says half and more as what to inpaint."""
    if inputs.pixels is None:
        raise RequestError(
            f"control {control.net}: has no hint; give it one (--control {control.net}=FILE), or give --image"
        )
    if how == "inpaint" and mask is None:
        if inputs.change_map is None:
            raise RequestError(
                f"control {control.net}: inpainting needs to know where; give the control a mask, or the run (--mask)"
            )
        mask = np.asarray(inputs.change_map >= 0.5)
    return inputs.pixels[..., :3], mask


def _map(
    control: Control, picture_size: tuple[int, int], size: tuple[int, int], fit: Fit
) -> tuple[Float | None, dict[str, str] | None, tuple[str, ...]]:
    """The control map at the model's size, brought there as its hint was; its description; notices."""
    source = control.map
    if source is None:
        return None, None, ()
    if isinstance(source, str) and is_description(source):
        return parse(source, *size), {"name": source, "sha256": "", "kind": "words"}, ()
    read = read_map(source, name=f"map of {control.net}")
    fitted = fit_map(read, picture_size, *size, fit)
    return fitted.values, {**describe(source, read.values), "kind": "map"}, fitted.notices


def replayed_controls(record: Record, folder: Path) -> list[Control]:
    """Return the controls that a PNG was drawn with; its files are looked for in `folder` and the current one.

    Raises:
        RequestError: a record that makes no sense, or a file that is not there or has other content.
    """
    return [_replayed(raw, folder) for raw in record.controls]


def _replayed(raw: Mapping[str, Any], folder: Path) -> Control:
    settings = {name: value for name, value in raw.items() if name != "files"}
    files = raw["files"]
    known = {field.name for field in dataclasses.fields(Control)} - {*PICTURES, "_"}
    if set(settings) != known or Path(str(settings["net"])).name != settings["net"]:
        raise RequestError(f"a recorded control has the settings {sorted(settings)}, expected {sorted(known)}")
    pictures: dict[str, Any] = {}
    for role in PICTURES:
        said = files.get(role)
        if said is not None:
            in_words = role == "map" and said.get("kind") == "words"
            what = f"{role} of {raw['net']}"
            pictures[role] = said["name"] if in_words else recorded_file(said, what, folder, "--control")
    weight = settings.pop("weight")
    try:
        return Control(weight=tuple(weight) if isinstance(weight, list) else weight, **settings, **pictures)
    except TypeError as error:
        raise RequestError(f"a recorded control has a setting of the wrong type ({error})") from None


def _x(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
