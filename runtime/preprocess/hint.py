"""From a picture to what a control net sees: `hint` reads, preprocesses and brings to the model's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError
from glassine.runtime.engine import EngineOptions
from glassine.runtime.image import Bytes, Fit, Source, check_size, read_map, read_picture
from glassine.runtime.preprocess import resize
from glassine.runtime.preprocess.catalogue import Kind, Value, find
from glassine.runtime.preprocess.network import open_network

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How a picture becomes a control map.

    name: one of `catalogue.KINDS`. settings: its numbers and words; what is not given has its default.
    model: the network, for those that need one: an .mlpackage or .onnx; for "pose" also keypoints as .json.
    fit: a picture of another shape than the model's: "crop" (cover and cut), "fit" (lie inside, margins of the border's
        colour), "stretch". resolution: the short side, in pixels, at which the preprocessor looks at the picture;
        None = pixel perfect, the one at which its map needs no more scaling.

    Raises:
        RequestError: an unknown preprocessor or setting, a value out of range, a model missing or not wanted.
    """

    name: str = "none"
    settings: Mapping[str, Value] = field(default_factory=dict)
    model: Path | None = None
    fit: Fit = "crop"
    resolution: int | None = None

    def __post_init__(self) -> None:
        kind = find(self.name)
        kind.checked(self.name, self.settings)
        if self.model is not None and kind.needs not in ("network", "keypoints"):
            raise RequestError(f"{self.name}: needs no network, got {self.model}; leave it out")
        if self.model is None and kind.needs == "network":
            raise RequestError(f"{self.name}: needs a network; give one as {self.name}=FILE.mlpackage or FILE.onnx")
        if self.fit not in ("crop", "fit", "stretch"):
            raise RequestError(f'{self.name}: fit is "{self.fit}", expected crop, fit or stretch')
        if self.resolution is not None and not 64 <= self.resolution <= 8192:
            raise RequestError(f"{self.name}: resolution is {self.resolution}, expected 64 to 8192 pixels")

    @classmethod
    def read(cls, words: str, *, fit: Fit = "crop", resolution: int | None = None) -> Preprocess:
        """Read NAME[=FILE][,SETTING=VALUE ...], such as "canny,low=50,high=150" or "depth=depth.onnx,near=low".

        Raises:
            RequestError: words of another form, and what the constructor raises.
        """
        first, *rest = words.split(",")
        name, equals, model = first.partition("=")
        settings = dict(_setting(words, word) for word in rest)
        return cls(name=name, settings=settings, model=Path(model) if equals else None, fit=fit, resolution=resolution)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What a control net sees.

    values: (1, 3, H, W) float32 RGB in [0, 1]; for "inpaint" -1 where the mask says to repaint.
    pixels: (H, W, 3) uint8, the same to look at; what is to be repainted is black.
    """

    values: Float
    pixels: Bytes
    notices: tuple[str, ...] = ()


def hint(
    source: Source,
    size: tuple[int, int],
    how: Preprocess | None = None,
    *,
    mask: Source | None = None,
    engine: EngineOptions | None = None,
    name: str = "hint",
) -> Hint:
    """Make the hint for a control net from a picture.

    Args:
        source: a file, a PIL image or an array, as `read_picture` takes it. size: (width, height) of the model.
        how: the preprocessor; None takes the picture as the control map it is.
        mask: for "inpaint": values of half and above are repainted. engine: for networks in an .mlpackage.
        name: what to call an array in messages.

    Raises:
        RequestError: the picture or mask cannot be read, they differ in size, a mask without a use for it or the other
            way round, or a picture too long and thin.
        MissingDependency, EngineError: the model of the preprocessor cannot be run.
    """
    how = Preprocess() if how is None else how
    check_size(*size)
    picture = read_picture(source, name=name)
    if find(how.name).needs == "mask":
        if mask is None:
            raise RequestError(f"{how.name}: needs a mask that says what to repaint")
        return _inpaint(picture.pixels, _mask_of(mask, picture.size), size, how.fit, picture.notices)
    if mask is not None:
        raise RequestError(f"{how.name}: takes no mask; only inpaint does")
    seen = control_map(picture.pixels, size, how, engine=engine)
    pixels = resize.place(seen, size, how.fit)
    return Hint(values=_values(pixels), pixels=pixels, notices=picture.notices)


def control_map(pixels: Bytes, size: tuple[int, int], how: Preprocess, *, engine: EngineOptions | None = None) -> Bytes:
    """Run the preprocessor on (H, W, 3) uint8 RGB and return its map, not yet of the model's `size`."""
    kind = find(how.name)
    run = _runner(kind, how, engine)
    if not kind.scaled:
        return run(pixels)
    height, width = pixels.shape[:2]
    resolution = how.resolution
    if resolution is None:
        resolution = resize.pixel_perfect((width, height), size, how.fit)
    seen = resize.to_resolution(pixels, resolution)
    if not kind.padded:
        return run(seen)
    return run(resize.padded(seen))[: seen.shape[0], : seen.shape[1]]


def _runner(kind: Kind, how: Preprocess, engine: EngineOptions | None) -> Callable[[Bytes], Bytes]:
    """Bind the settings, and what the preprocessor needs beside them."""
    assert kind.run is not None
    bound = partial(kind.run, **kind.checked(how.name, how.settings))
    if kind.needs == "network":
        assert how.model is not None
        return partial(bound, network=open_network(how.model, engine))
    return partial(bound, model=how.model, engine=engine) if kind.needs == "keypoints" else bound


def _mask_of(source: Source, size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = read_map(source, name="mask")
    got = (mask.values.shape[1], mask.values.shape[0])
    if got != size:
        raise RequestError(f"{mask.name}: is {got[0]}x{got[1]}, expected the picture's {size[0]}x{size[1]}")
    return np.asarray(mask.values >= 0.5)


def _inpaint(pixels: Bytes, mask: NDArray[np.bool_], size: tuple[int, int], fit: Fit, notices: tuple[str, ...]) -> Hint:
    # The picture is brought to size before it is cut out, so that no colour of the mask bleeds into it.
    placed, repaint = resize.place(pixels, size, fit), resize.place_mask(mask, size, fit)
    values = np.where(repaint, np.float32(-1), _values(placed))
    return Hint(values=values, pixels=np.where(repaint[..., None], np.uint8(0), placed), notices=notices)


def _values(pixels: Bytes) -> Float:
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)[None].astype(np.float32) / 255)


def _setting(words: str, word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise RequestError(f'"{words}": got "{word}", expected SETTING=VALUE, as in canny,low=50,high=150')
    return name.strip(), value.strip()
