"""The arrays of one picture: source, change map and whatever conditioning or noise was made elsewhere.

Files, PIL images and arrays all arrive here, are brought to the model's size, and leave as `Inputs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError
from glassine.runtime.change_map import is_description, parse, soften
from glassine.runtime.control import ReadyControl
from glassine.runtime.image import (
    Fit,
    Picture,
    Source,
    White,
    fit_map,
    fit_picture,
    over_grey,
    read_map,
    read_picture,
    to_model,
)
from glassine.runtime.layer_attention import PlacedWords
from glassine.runtime.metadata import Record, file_sha256

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSource:
    """Where a change map comes from.

    map: a grey picture or array, or words such as "gradient:left-right". mask: black and white instead; values of
    half and above may change. softness: pixels of soft border outside the mask. white: what white means in a picture.
    """

    map: Source | None = None
    mask: Source | None = None
    softness: float = 0.0
    white: White = "change"

    def __post_init__(self) -> None:
        if self.map is not None and self.mask is not None:
            raise RequestError("got a map and a mask; give one of them (a mask is a map of two values)")
        if self.softness < 0 or not np.isfinite(self.softness):
            raise RequestError(f"softness is {self.softness} pixels, expected 0 or more")
        if self.softness and self.mask is None:
            raise RequestError("softness is the soft border of a mask; give a mask, or paint the border into the map")

    @property
    def source(self) -> Source | None:
        """The map or the mask, whichever was given."""
        return self.map if self.map is not None else self.mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a picture is drawn from beside its settings; all optional, all of the model's size.

    image: (1, 3, H, W) float32 in [-1, 1]. pixels: (H, W, 3) uint8, the same picture, for the protected bytes. To draw
        with transparency: pixels (H, W, 4), straight alpha, and the image stands over mid-grey.
    change_map: (H, W) float32, 0 = keep, 1 = may change completely.
    latents: (1, 4, h, w) the initial noise e, unit normal. noise: index -> (1, 4, h, w), the noise of stochastic steps.
    context, negative_context: (1, tokens, width) conditioning made elsewhere; SDXL's comes with pooled, negative_pooled
        (1, d).
    layers: (H, W, 4) uint8, straight alpha, the pictures that a layer model is given, by their names ("fg", "bg").
    control_map: (H, W) float32 in [0, 1], how much controls count where, if they have no map of their own.
    words: which words of the prompt belong where, of a collage. collage: what it is, for the picture's metadata.
    controls: what steers it beside the prompt, see `control_pictures.with_controls`.
    files: what image and map were, for the picture's metadata. notices: what was done to them, for the user.
    """

    image: Float | None = None
    pixels: NDArray[np.uint8] | None = None
    icc_profile: bytes | None = None
    change_map: Float | None = None
    latents: Float | None = None
    noise: Callable[[int], Float] | None = None
    context: Float | None = None
    negative_context: Float | None = None
    pooled: Float | None = None
    negative_pooled: Float | None = None
    layers: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    control_map: Float | None = None
    words: PlacedWords | None = None
    collage: dict[str, Any] | None = None
    controls: tuple[ReadyControl, ...] = ()
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def read_inputs(
    image: Source | None,
    maps: MapSource,
    width: int,
    height: int,
    *,
    fit: Fit = "crop",
    keep_alpha: bool = False,
    **arrays: object,
) -> Inputs:
    """Read the source picture and its change map and bring both to the model's size.

    Args:
        image: the picture to change, or None to draw from noise.
        maps: where its change map comes from; an empty `MapSource` is no map.
        width, height: pixels, the model's.
        fit: what to do with a picture of another shape.
        keep_alpha: read the picture as RGBA, to draw with transparency.
        arrays: further fields of `Inputs`.

    Raises:
        RequestError: a file cannot be read, sizes do not agree, or there is a map and no picture.
    """
    if image is None:
        if maps.source is not None:
            raise RequestError("a change map says how much of a picture may change; give the picture too (--image)")
        return Inputs(**arrays)  # type: ignore[arg-type]
    picture = read_picture(image, keep_alpha=keep_alpha)
    fitted = fit_picture(picture, width, height, fit)
    values, described, notices = _change_map(maps, picture, width, height, fit)
    files = {"image": describe(image, picture.pixels)}
    if described is not None:
        files["change_map"] = described
    return Inputs(
        image=over_grey(fitted.pixels) if keep_alpha else to_model(fitted.pixels),
        pixels=fitted.pixels,
        icc_profile=fitted.icc_profile,
        change_map=values,
        files=files,
        notices=(*fitted.notices, *notices),
        **arrays,  # type: ignore[arg-type]
    )


def _change_map(
    maps: MapSource, picture: Picture, width: int, height: int, fit: Fit
) -> tuple[Float | None, dict[str, str] | None, tuple[str, ...]]:
    """The map at the model's size, its description for the metadata, and notices."""
    source = maps.source
    if source is None:
        return None, None, ()
    if isinstance(source, str) and is_description(source):
        values = parse(source, width, height)
        described = {"name": source, "sha256": "", "kind": "words", "white": maps.white}
        return (values if maps.white == "change" else 1 - values), described, ()
    read = read_map(source, white=maps.white)
    fitted = fit_map(read, picture.size, width, height, fit)
    described = {**describe(source, read.values), "kind": "map", "white": maps.white}
    values = fitted.values
    if maps.mask is not None:
        values = soften(values >= 0.5, maps.softness)
        described.update(kind="mask", softness=str(maps.softness))
    return values, described, fitted.notices


def replayed_inputs(record: Record, folder: Path, image: Path | None, maps: MapSource) -> tuple[Path | None, MapSource]:
    """Find the source picture and map that a PNG was drawn from; those given take their place.

    Files are looked for by name in `folder` (the PNG's own) and the current one, and must not have changed.

    Raises:
        RequestError: a file is not there or has other content, or it was an array in Python.
    """
    if image is None and "image" in record.inputs:
        image = _recorded_file(record, "image", folder)
    if maps.source is None and "change_map" in record.inputs:
        said = record.inputs["change_map"]
        white: White = "keep" if said.get("white") == "keep" else "change"
        if said.get("kind") == "words":
            maps = MapSource(map=said["name"], white=white)
        elif said.get("kind") == "mask":
            softness = _recorded_softness(said.get("softness", "0"))
            maps = MapSource(mask=_recorded_file(record, "change_map", folder), softness=softness, white=white)
        else:
            maps = MapSource(map=_recorded_file(record, "change_map", folder), white=white)
    return image, maps


def _recorded_softness(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(
            f"the recorded softness is {text[:60]!r}, expected a number; give --mask and --softness"
        ) from None


def _recorded_file(record: Record, role: str, folder: Path) -> Path:
    option = {"image": "--image", "change_map": "--map or --mask"}[role]
    return recorded_file(record.inputs[role], role, folder, option)


def recorded_file(said: Mapping[str, str], role: str, folder: Path, option: str) -> Path:
    """Return the file that a PNG was drawn from, if it lies in `folder` or the current one and is the same.

    Raises:
        RequestError: it is not there or has other content, or it was an array; says that `option` gives another.
    """
    if not said["name"]:
        raise RequestError(f"the {role} of this picture was an array in Python, not a file; give it with {option}")
    # Only the plain name counts: a PNG must not make Glassine read files elsewhere.
    for place in (folder, Path.cwd()):
        path = place / Path(said["name"]).name
        if path.is_file():
            if file_sha256(path) == said["sha256"]:
                return path
            raise RequestError(f"{path}: changed since the picture was drawn from it; give the {role} with {option}")
    raise RequestError(f"{said['name']}: the {role} this picture was drawn from is not here; give it with {option}")


def describe(source: Source, content: NDArray[np.generic]) -> dict[str, str]:
    """Return a file's name and hash, never its folder (pictures are shared), or the hash of anything else's content."""
    if isinstance(source, (str, Path)):
        return {"name": Path(source).name, "sha256": file_sha256(Path(source))}
    return {"name": "", "sha256": hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()}
