"""Collage: cut-out pictures and their words -> one picture to start from, and maps of what each may become.

    layers, back to front -> visible weights v -> composite
                                               -> change map   c = sum of v c_layer + v_background c_background
                                               -> control map  k = sum of v k_layer
                                               -> where the words of each layer belong

v is what of each layer is seen: its alpha times the clearness of all layers in front of it; with the background they
add up to 1 everywhere. There is one latent and one loop: the change map is an ordinary one, and the words enter as
inputs of the UNet (`collage_inputs.py`, `layer_attention.py`).

Source: Collage Diffusion (Sarukkai et al. 2023, arXiv 2303.00262). Two things differ from its published code, which
counts alpha twice at soft edges and compares the map with the time of a step: here c is the share of the steps, as in
every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.change_map import blurred
from glassine.runtime.compose import background as background_of
from glassine.runtime.compose import resized
from glassine.runtime.image import Source, read_picture

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GREY = "#969696"  # behind the layers, where nothing else is said
BLUR = 10.0  # pixels
_STRONGEST = 10.0


@dataclass(frozen=True, slots=True)
class Layer:
    """One cut-out picture of a collage. None is a choice by its size, see `strengths`.

    image: with an alpha channel. words: part of the prompt, which is drawn where the layer is seen; "" = none.
    occurrence: which one, from 1, where the words stand in the prompt several times.
    x, y: the left upper corner, pixels of the canvas. width, height: there; one alone keeps the shape, None and None
        the picture's own size. rotation: degrees clockwise, around its centre. opacity: 0 to 1.
    attract: how strongly its words are drawn where it is seen, repel: how strongly they are kept away from elsewhere; 0
        is off, 1 as strong as the strongest that the network itself thinks of.
    change: how much of it may be drawn anew, 0 (stays as it is) to 1. control: how much control nets count where it is
        seen, 0 to 1.
    """

    image: Source
    words: str = ""
    _: KW_ONLY
    occurrence: int | None = None
    x: float = 0.0
    y: float = 0.0
    width: float | None = None
    height: float | None = None
    rotation: float = 0.0
    opacity: float = 1.0
    attract: float | None = None
    repel: float | None = None
    change: float | None = None
    control: float | None = None

    def __post_init__(self) -> None:
        for name in ("x", "y", "rotation"):
            _check(self, name, -math.inf, math.inf)
        for name in ("width", "height"):
            _check(self, name, 1, 1 << 14)
        for name, most in (
            ("opacity", 1),
            ("change", 1),
            ("control", 1),
            ("attract", _STRONGEST),
            ("repel", _STRONGEST),
        ):
            _check(self, name, 0, most)

    @property
    def name(self) -> str:
        """What messages call it: its words, or its file."""
        if self.words:
            return f'layer "{self.words}"'
        return (
            f"layer {self.image}" if not isinstance(self.image, (np.ndarray, Image.Image)) else "a layer without words"
        )


def _check(layer: Layer, name: str, least: float, most: float) -> None:
    value = getattr(layer, name)
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise RequestError(f"{layer.name}: {name} is {value}, expected {least:g} to {most:g}")


@dataclass(frozen=True, slots=True)
class Collage:
    """Layers over a background, the first at the back.

    background: a picture, cropped to fit, or a colour such as "#969696". background_change: how much of it may be drawn
        anew, 0 to 1; None = as much as of the layer that may change most.
    blur: of the change map, pixels of the canvas; what is kept exactly begins three times as far from what changes.
    canvas: (width, height) that positions are meant for; None = the model's size.
    previous: a picture drawn of the same collage: layers with change 0, and the background, are as it shows them.
    """

    layers: Sequence[Layer]
    _: KW_ONLY
    background: Source = GREY
    background_change: float | None = None
    blur: float = BLUR
    canvas: tuple[int, int] | None = None
    previous: Source | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise RequestError("a collage without layers; give it at least one")
        if self.background_change is not None and not 0 <= self.background_change <= 1:
            raise RequestError(f"background_change is {self.background_change}, expected 0 (keep) to 1 (change)")
        if not 0 <= self.blur <= 1 << 12:
            raise RequestError(f"blur is {self.blur} pixels, expected 0 to 4096")
        if self.canvas is not None and not all(0 < side <= 1 << 16 for side in self.canvas):
            raise RequestError(f"canvas is {self.canvas}, expected (width, height) in pixels")


class Strengths(NamedTuple):
    """How strongly a layer counts in each way; the fields of `Layer`."""

    attract: float
    repel: float
    change: float
    control: float


def strengths(share: float, *, front: bool) -> Strengths:
    """Return the strengths of a layer that says none and whose longer side is `share` of the canvas, 0 to 1.

    Small things need more help to come out; the front-most layer is changed least.

    Source: the "auto" button of Collage Diffusion's interface.
    """
    small = 1 - share
    return Strengths(0.2 + 0.4 * small, 0.9 - 0.5 * share, 0.4 if front else 0.5 + 0.2 * share, 0.3 + 0.6 * small)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """A collage of the model's size.

    strengths: of each layer, said or chosen. pixels: (H, W, 3) uint8, what is drawn from. visible: (layers, H, W)
    float32, v. change, control: (H, W) float32. notices: for the user.
    """

    layers: tuple[Layer, ...]
    strengths: tuple[Strengths, ...]
    pixels: Bytes
    visible: Float
    change: Float
    control: Float
    notices: tuple[str, ...]


def arrange(collage: Collage, width: int, height: int) -> Arranged:
    """Put the layers where they belong on a canvas of the model's size.

    Raises:
        RequestError: a picture cannot be read, is not seen anywhere on the canvas, or the canvas has another shape.
    """
    scale = _scale(collage, width, height)
    placed, said = [], []
    for index, layer in enumerate(collage.layers):
        rgba, share = _placed(layer, width, height, scale)
        placed.append(rgba)
        said.append(_settled(layer, strengths(share, front=index == len(collage.layers) - 1)))
    opacities = (np.float32(layer.opacity / 255) for layer in collage.layers)
    visible, behind = visible_weights([rgba[..., 3] * opacity for rgba, opacity in zip(placed, opacities, strict=True)])
    pasted = [collage.previous is None or one.change > 0 for one in said]
    change_behind = collage.background_change
    if change_behind is None:
        change_behind = max(one.change for one in said)
    change = combined(visible, [one.change for one in said], behind, change_behind)
    seen = zip(collage.layers, visible, strict=True)
    return Arranged(
        layers=tuple(collage.layers),
        strengths=tuple(said),
        pixels=_composite(_ground(collage, width, height), placed, visible * np.array(pasted)[:, None, None]),
        visible=visible,
        change=blurred(change, collage.blur * scale),
        control=combined(visible, [one.control for one in said], behind, 0.0),
        notices=tuple(f"{layer.name} is covered by those in front of it" for layer, v in seen if not v.any()),
    )


def visible_weights(alphas: Sequence[Float]) -> tuple[Float, Float]:
    """Return what is seen of each layer, (layers, H, W), and of what is behind them all, (H, W); they add up to 1.

    Args:
        alphas: (H, W) in [0, 1], back to front.
    """
    seen, clear = [], np.ones_like(alphas[0])
    for alpha in reversed(alphas):
        seen.append(alpha * clear)
        clear = clear * (1 - alpha)
    return np.stack(seen[::-1]), clear


def combined(visible: Float, values: Sequence[float], behind: Float, value_behind: float) -> Float:
    """Return the map (H, W) in [0, 1] that has each layer's value where it is seen, in its share where several are."""
    mixed = np.tensordot(np.array(values, np.float32), visible, axes=1) + np.float32(value_behind) * behind
    return np.asarray(np.clip(mixed, 0, 1), np.float32)


def _scale(collage: Collage, width: int, height: int) -> float:
    """Pixels of the model a pixel of the canvas."""
    if collage.canvas is None:
        return 1.0
    across, down = width / collage.canvas[0], height / collage.canvas[1]
    if abs(across / down - 1) > 0.02:
        raise RequestError(
            f"the canvas is {collage.canvas[0]}x{collage.canvas[1]}, the model {width}x{height}, which is another "
            "shape; choose a canvas, or one of the model's sizes, that fits"
        )
    return across


def _ground(collage: Collage, width: int, height: int) -> Bytes:
    """What is behind the layers, (H, W, 3) uint8: the background, or the picture that was drawn before."""
    if collage.previous is None:
        return background_of(collage.background, width, height)
    drawn = read_picture(collage.previous, name="the earlier picture")
    if drawn.size != (width, height):
        raise RequestError(
            f"{drawn.name}: is {drawn.size[0]}x{drawn.size[1]}, the model {width}x{height}; expected a picture that "
            "it drew of the same collage"
        )
    return drawn.pixels


def _settled(layer: Layer, auto: Strengths) -> Strengths:
    """What the layer says, and what is chosen where it says nothing."""
    own = (getattr(layer, name) for name in Strengths._fields)
    return Strengths(*(chosen if said is None else said for said, chosen in zip(own, auto, strict=True)))


def _placed(layer: Layer, width: int, height: int, scale: float) -> tuple[Bytes, float]:
    """The layer alone on a canvas of the model's size, (H, W, 4) uint8, and its longer side's share of the canvas."""
    own = read_picture(layer.image, name=layer.name, keep_alpha=True).pixels
    across, down = _size(layer, own.shape[1], own.shape[0])
    rgba = _turned(resized(own, max(1, round(across * scale)), max(1, round(down * scale))), layer.rotation)
    left = round((layer.x + across / 2) * scale - rgba.shape[1] / 2)
    top = round((layer.y + down / 2) * scale - rgba.shape[0] / 2)
    canvas = np.zeros((height, width, 4), np.uint8)
    rows, columns = (slice(max(0, at), max(0, at + side)) for at, side in ((top, rgba.shape[0]), (left, rgba.shape[1])))
    inside = rgba[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    if inside.size:
        canvas[rows, columns] = inside
    if not canvas[..., 3].any():
        clear = not own[..., 3].any()
        where = "is transparent everywhere" if clear else f"lies outside of the canvas of {width}x{height}"
        raise RequestError(
            f"{layer.name}: {where}; its corner is at {layer.x:g},{layer.y:g}, its size {across:g}x{down:g}"
        )
    return canvas, min(1.0, max(across * scale / width, down * scale / height))


def _size(layer: Layer, width: int, height: int) -> tuple[float, float]:
    """Width and height on the canvas of a layer whose picture has `width` x `height` pixels."""
    across, down = layer.width, layer.height
    if across is None:
        across = width if down is None else width * down / height
    return across, height * across / width if down is None else down


def _turned(rgba: Bytes, degrees: float) -> Bytes:
    """Turn a picture clockwise; it grows to hold its corners. Colours are mixed by their alpha."""
    turns, rest = divmod(degrees, 90)
    if rest == 0:
        return np.rot90(rgba, -int(turns) % 4)
    return np.asarray(Image.fromarray(rgba).rotate(-degrees, Image.Resampling.BICUBIC, expand=True))


def _composite(ground: Bytes, placed: Sequence[Bytes], weights: Float) -> Bytes:
    """What is drawn from: every layer in its share `weights`, and `ground` in what is left; rounded once."""
    mixed = ground * (1 - weights.sum(axis=0, dtype=np.float64))[..., None]
    for rgba, weight in zip(placed, weights, strict=True):
        mixed += rgba[..., :3] * weight[..., None].astype(np.float64)
    return np.asarray(np.rint(np.clip(mixed, 0, 255)), np.uint8)
