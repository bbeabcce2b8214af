"""Collages as files: a project in JSON, an OpenRaster file of a drawing program, or what a PNG says it was drawn from.

    {"prompt": "a red cup and a blue book on a table", "seed": 7, "model": "dreamshaper", "background": "table.png",
     "layers": [{"image": "book.png", "words": "a blue book", "x": 40, "y": 300, "width": 220, "rotation": 15},
                {"image": "cup.png", "words": "a red cup", "x": 250, "y": 210, "change": 0.4}]}

Layers come back to front, with the fields of `Layer`; beside them stand those of `Collage`, `model`, `size`, and
settings by their names in `Request`. Paths are taken from the project's folder. In an OpenRaster file the names of the
layers are their words.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageColor

from glassine.errors import RequestError
from glassine.runtime.collage import Collage, Layer
from glassine.runtime.compose import CHECKERBOARD
from glassine.runtime.image import Source
from glassine.runtime.inputs import describe, recorded_file
from glassine.runtime.metadata import Record
from glassine.runtime.openraster import SUFFIX, read_openraster
from glassine.runtime.prompt import plain_text
from glassine.runtime.request import Request

PROJECT, LAYERS = "project.json", f"layers{SUFFIX}"  # what a folder of layers has
_LAYER = tuple(known.name for known in dataclasses.fields(Layer) if known.name != "_")
_COLLAGE = tuple(known.name for known in dataclasses.fields(Collage) if known.name != "_")
_SETTINGS = tuple(known.name for known in dataclasses.fields(Request) if known.name != "layers")
_LONGEST = 1 << 22  # characters of a project that are read
Json = dict[str, Any]
Find = Callable[[Any, str], Source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """What a file asks for. settings: fields of `Request`. model: a folder. size: (width, height), one of its sizes."""

    collage: Collage
    settings: Json = field(default_factory=dict)
    model: Path | None = None
    size: tuple[int, int] | None = None
    notices: tuple[str, ...] = ()


def read_project(path: Path, prompt: str | None = None) -> Project:
    """Read a project: a JSON file, an OpenRaster file, or a folder that has a project.json or a layers.ora.

    Args:
        prompt: of an OpenRaster file, which has none; elsewhere it takes the place of the project's own.

    Raises:
        RequestError: it cannot be read, or says what makes no sense.
    """
    if path.is_dir():
        inside = next((path / name for name in (PROJECT, LAYERS) if (path / name).is_file()), None)
        if inside is None:
            raise RequestError(f"{path}: has neither {PROJECT} nor {LAYERS}")
        path = inside
    if path.suffix.lower() == SUFFIX:
        return _from_openraster(path, prompt)
    raw = _json(path)
    unknown = sorted(set(raw) - {*_COLLAGE, *_SETTINGS, "model", "size"})
    if unknown:
        raise RequestError(f"{path}: unknown fields {unknown}; a project has {', '.join(('model', 'size', *_COLLAGE))} "
                           "and the settings of a picture")  # fmt: skip
    settings = {name: raw[name] for name in _SETTINGS if name in raw}
    model = _typed(raw, "model", str)
    return Project(
        collage=collage_of(raw, lambda value, what: _found(path.parent, value, what)),
        settings={**settings, **({"prompt": prompt} if prompt is not None else {})},
        model=None if model is None else path.parent / model,
        size=_pair(raw, "size"),
    )


def collage_of(raw: Mapping[str, Any], find: Find) -> Collage:
    """Return the collage that the fields of `raw` describe; `find` gives the picture that one of them names.

    Raises:
        RequestError: a field that is unknown, missing or of the wrong type.
    """
    layers = raw.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise RequestError('"layers": expected a list of objects, back to front, each with an "image"')
    said: Json = {name: _number(raw, name) for name in ("background_change", "blur") if raw.get(name) is not None}
    said |= {name: find(raw[name], name) for name in ("background", "previous") if raw.get(name) is not None}
    return Collage(
        [_layer(layer, number, find) for number, layer in enumerate(layers, 1)], canvas=_pair(raw, "canvas"), **said
    )


def _layer(raw: Json, number: int, find: Find) -> Layer:
    unknown = sorted(set(raw) - set(_LAYER))
    if unknown or raw.get("image") is None:
        what = f"unknown fields {unknown}" if unknown else 'no "image"'
        raise RequestError(f"layer {number}: {what}; a layer has {', '.join(_LAYER)}")
    numbers = {name: _number(raw, name) for name in _LAYER if name not in ("image", "words", "occurrence")}
    words, occurrence = _typed(raw, "words", str), _typed(raw, "occurrence", int)
    given = {
        name: value
        for name, value in {**numbers, "words": words, "occurrence": occurrence}.items()
        if value is not None
    }
    return Layer(find(raw["image"], f"image of layer {number}"), **given)


def recorded(collage: Collage) -> Json:
    """Return what a picture says about a collage, as plain JSON values: its files without their folders.

    Raises:
        RequestError: a file cannot be read.
    """
    layers = [{**_said(layer), "image": _described(layer.image)} for layer in collage.layers]
    grounds = {
        name: _described(getattr(collage, name))
        for name in ("background", "previous")
        if getattr(collage, name) is not None
    }
    return {**_said(collage), **grounds, "layers": layers}


def replayed(record: Record, folder: Path) -> Collage:
    """Return the collage that a PNG was drawn from; its files are looked for in `folder` and the current one.

    Raises:
        RequestError: it was no collage, or a file is not there or has other content.
    """
    if record.collage is None:
        raise RequestError("this picture is no collage; draw it again with: glassine generate --from")

    def find(said: Any, what: str) -> Source:
        if isinstance(said, str):
            return _colour(said, what)
        if not (isinstance(said, dict) and all(isinstance(said.get(key), str) for key in ("name", "sha256"))):
            raise RequestError(f"the recorded {what} is {str(said)[:60]!r}, expected name and sha256")
        return recorded_file(said, what, folder, "a project")

    return collage_of(record.collage, find)


def _said(settings: Layer | Collage) -> Json:
    """The fields that are not as they are by default, but for pictures and layers."""
    pictures = ("image", "background", "previous", "layers", "_")
    fields = [known for known in dataclasses.fields(settings) if known.name not in pictures]
    return {
        known.name: getattr(settings, known.name) for known in fields if getattr(settings, known.name) != known.default
    }


def _described(source: Source) -> str | dict[str, str]:
    """A colour as it is; a file's name and sha256; the sha256 of what an array or a PIL image holds."""
    if isinstance(source, str) and _is_colour(source):
        return source
    if not isinstance(source, (str, Path)):
        return describe(source, np.asarray(source))
    try:
        return describe(source, np.empty(0))
    except OSError as error:
        raise RequestError(f"{source}: cannot be read ({error.strerror or error})") from None


def _is_colour(text: str) -> bool:
    try:
        ImageColor.getrgb(text)
    except ValueError:
        return text == CHECKERBOARD
    return True


def _colour(text: str, what: str) -> str:
    if not _is_colour(text):
        raise RequestError(f"the recorded {what} is {text[:60]!r}, expected a colour")
    return text


def _found(folder: Path, value: Any, what: str) -> Source:
    """The picture that a project names, or a colour."""
    if not (isinstance(value, str) and value and "\0" not in value):
        raise RequestError(f'"{what}" is {str(value)[:60]!r}, expected the path of a picture')
    return value if what == "background" and _is_colour(value) else folder / value


def _from_openraster(path: Path, prompt: str | None) -> Project:
    """The layers of a drawing: the lowest is the background if it covers everything; names in the prompt are words."""
    if prompt is None:
        raise RequestError(f"{path}: an OpenRaster file has no prompt; give one with --prompt")
    stack, canvas = read_openraster(path)
    shown = [layer for layer in stack if layer.visible]
    background = shown[0] if shown and shown[0].covers(canvas) else None
    text, layers, notices = plain_text(prompt).lower(), [], []
    for layer in shown[1:] if background is not None else shown:
        named = layer.name.strip().lower() in text
        if not named:
            notices.append(f'layer "{layer.name}": its name is not in the prompt, so no words are drawn where it lies')
        words = layer.name.strip() if named else ""
        layers.append(Layer(layer.pixels, words, x=layer.x, y=layer.y, opacity=layer.opacity))
    ground: Json = {} if background is None else {"background": background.pixels}
    return Project(
        collage=Collage(layers, canvas=canvas, **ground), settings={"prompt": prompt}, notices=tuple(notices)
    )


def _json(path: Path) -> Json:
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = json.loads(text) if len(text) <= _LONGEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{path}: cannot be read ({error}); expected a project in JSON, or an OpenRaster file"
        ) from None
    if not isinstance(raw, dict):
        raise RequestError(f"{path}: expected one JSON object with prompt and layers")
    return raw


def _typed(raw: Mapping[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    if value is not None and type(value) is not kind:
        raise RequestError(f'"{name}" is {str(value)[:60]!r}, expected {"a text" if kind is str else "a whole number"}')
    return value


def _number(raw: Mapping[str, Any], name: str) -> float | None:
    value = raw.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise RequestError(f'"{name}" is {str(value)[:60]!r}, expected a number')
    return value


def _pair(raw: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    value = raw.get(name)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)):
        raise RequestError(f'"{name}" is {value!r}, expected [width, height] in pixels')
    return value[0], value[1]
