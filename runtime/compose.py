"""RGBA pictures over each other and over backgrounds: straight alpha, back to front, gamma-encoded sRGB.

This is the composition that drawing tools do by default, and that LayerDiffuse's pictures were made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from glassine.errors import RequestError
from glassine.runtime.decode import CELL, decoded_share
from glassine.runtime.image import Source, fit_picture, read_picture
from glassine.runtime.transparency import pad_rgb

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

CHECKERBOARD = "checkerboard"
_CHECKS = (0.45, 0.55)  # the greys LayerDiffuse shows transparency over
_TOP = 16384  # pixels a side that `resized` makes at most


def over(layers: Sequence[Bytes]) -> Bytes:
    """Lay pictures over each other, the first at the back.

    Where a layer is opaque its bytes stay, where it is clear those behind it do; in between the colours are mixed by
    their alpha and rounded once, at the end. Where the result is clear it has the colours of the backmost layer.

    Args:
        layers: one or more (H, W, 4) uint8, straight alpha, all of one size.

    Returns:
        (H, W, 4) uint8, straight alpha.

    Raises:
        RequestError: no layers, or layers of different sizes.

    Source: Porter and Duff 1984, "Compositing digital images", the operator "over".
    """
    if not layers:
        raise RequestError("no layers to compose; give at least one picture")
    for number, layer in enumerate(layers, 1):
        if layer.shape != layers[0].shape:
            raise RequestError(
                f"layer {number} is {layer.shape[1]}x{layer.shape[0]}, the first is {layers[0].shape[1]}x"
                f"{layers[0].shape[0]}; expected one size for all"
            )
    alpha = layers[0][..., 3:] / 255
    colours = layers[0][..., :3] * alpha
    for layer in layers[1:]:
        front = layer[..., 3:] / 255
        colours = layer[..., :3] * front + colours * (1 - front)
        alpha = front + alpha * (1 - front)
    straight = np.where(alpha > 0, colours / np.maximum(alpha, 1e-12), layers[0][..., :3])
    return np.asarray(np.rint(np.concatenate([straight, alpha * 255], axis=-1)), np.uint8)


def flatten(rgba: Bytes, background: Bytes) -> Bytes:
    """Show a picture (H, W, 4) over an opaque background (H, W, 3); (H, W, 3) uint8."""
    return np.ascontiguousarray(over([opaque(background), rgba])[..., :3])


def opaque(pixels: Bytes) -> Bytes:
    """(H, W, 3) -> (H, W, 4) uint8 with alpha 255."""
    return np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])


def background(what: str | Source, width: int, height: int) -> Bytes:
    """Return a background (H, W, 3) uint8.

    Args:
        what: "checkerboard", a colour as CSS writes it ("white", "#ff8800", "rgb(0,0,0)"), or a picture, cropped to
            fit. A file that is named like a colour is reached as ./red.

    Raises:
        RequestError: neither a colour nor a picture that can be read.
    """
    if isinstance(what, str):
        if what == CHECKERBOARD:
            return checkerboard(width, height)
        try:
            colour = ImageColor.getrgb(what)
        except ValueError:
            if not Path(what).exists():
                raise RequestError(
                    f"background {what!r}: neither {CHECKERBOARD!r}, nor a colour such as white or #ff8800, nor a file"
                ) from None
        else:
            return np.full((height, width, 3), colour[:3], np.uint8)
    scaled = read_picture(what, name="background")
    if scaled.size == (width, height):
        return scaled.pixels
    fitted = fit_picture(scaled, -(-width // CELL) * CELL, -(-height // CELL) * CELL).pixels
    return np.ascontiguousarray(fitted[:height, :width])


def checkerboard(width: int, height: int) -> Bytes:
    """Return the grey checks (H, W, 3) uint8 that stand for transparency; 16 of them along the shorter side."""
    side = max(min(width, height) // 16, 1)
    light = (np.arange(height)[:, None] // side + np.arange(width) // side) % 2
    return np.asarray(np.repeat((255 * np.array(_CHECKS))[light][..., None], 3, axis=-1), np.uint8)


def composite_rgba(decoded: Bytes, source: Bytes, live: NDArray[Any]) -> Bytes:
    """Put the source's own bytes back wherever the map protects them, for RGBA pictures.

    As `decode.composite`; in the fade between both, colours are mixed by their alpha, so that what lies under alpha 0
    does not shine through.

    Args:
        decoded, source: (H, W, 4) uint8, straight alpha. live: (h, w), not 0 where a latent cell may change.
    """
    share = decoded_share(live)[..., None].astype(np.float64)
    parts = [(decoded, share), (source, 1 - share)]
    alpha = sum(picture[..., 3:] * part for picture, part in parts)
    colours = sum(picture[..., :3] * (picture[..., 3:] * part) for picture, part in parts)
    plain = sum(picture[..., :3] * part for picture, part in parts)
    straight = np.where(alpha > 0, colours / np.maximum(alpha, 1e-12), plain)
    mixed: Bytes = np.rint(np.concatenate([straight, alpha], axis=-1)).astype(np.uint8)
    return np.asarray(np.where(share == 0, source, np.where(share == 1, decoded, mixed)))


def resized(rgba: Bytes, width: int, height: int) -> Bytes:
    """Bring a transparent picture to another size: colours and alpha apart, both with Lanczos, and joined again.

    Colours under alpha 0 are first continued from those around them, so that nothing bleeds in where another tool
    has blackened them.

    Args:
        rgba: (H, W, 4) uint8, straight. width, height: pixels.

    Raises:
        RequestError: a side is not between 1 and 16384.
    """
    if not (1 <= width <= _TOP and 1 <= height <= _TOP):
        raise RequestError(f"size {width}x{height}: expected sides of 1 to {_TOP} pixels")
    if rgba.shape[:2] == (height, width):
        return rgba
    clear = rgba[..., 3:] == 0
    colours = np.where(clear, np.rint(pad_rgb(rgba) * 255).astype(np.uint8), rgba[..., :3]) if clear.any() else rgba
    parts = (np.ascontiguousarray(colours[..., :3]), rgba[..., 3])
    size = (width, height)
    return np.dstack([np.asarray(Image.fromarray(part).resize(size, Image.Resampling.LANCZOS)) for part in parts])
