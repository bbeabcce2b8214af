"""Sizes around a preprocessor: the picture it looks at, and its control map brought to the model's size.

The rules are those of the ControlNet extension for A1111, whose users tuned their thresholds by them: `pixel_perfect`
picks the resolution at which no scaling is left after the preprocessor, `to_resolution` scales the picture for it, and
`place` scales the map so that lines stay lines and flat colours stay flat.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError
from glassine.runtime.image import Bytes, Fit

LARGEST = 2**26  # pixels a preprocessor may look at: 8192 x 8192
_LINES = tuple(  # through the middle of 3x3: across, down, both diagonals
    np.array(rows, np.uint8)
    for rows in (
        ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
        ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
        ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
    )
)


def pixel_perfect(size: tuple[int, int], target: tuple[int, int], fit: Fit) -> int:
    """Return the short side, in pixels, at which a preprocessor's map needs no more scaling: round(k * min(W, H)).

    Args:
        size: (width, height) of the picture. target: (width, height) of the model.
        fit: "crop" and "stretch" take k from the side that grows most, "fit" from the other.
    """
    scales = (target[0] / size[0], target[1] / size[1])
    return max(1, round(min(size) * (min(scales) if fit == "fit" else max(scales))))


def to_resolution(pixels: Bytes, resolution: int) -> Bytes:
    """Scale (H, W, 3) so that its short side has `resolution` pixels; bicubic up, area down.

    Raises:
        RequestError: the picture is so long and thin that the scaled one exceeds `LARGEST` pixels.
    """
    height, width = pixels.shape[:2]
    k = resolution / min(height, width)
    return _resized(pixels, (round(width * k), round(height * k)), cv2.INTER_CUBIC if k > 1 else cv2.INTER_AREA)


def padded(pixels: Bytes) -> Bytes:
    """Repeat the right and bottom edges until both sides are multiples of 64, as the networks here expect."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % 64), (0, -width % 64), (0, 0)), mode="edge")


def place(control_map: Bytes, target: tuple[int, int], fit: Fit) -> Bytes:
    """Bring a control map (H, W, 3) to the model's (width, height).

    Few colours (3 to 199, a segmentation) take the nearest pixel; others are averaged down or bicubic up; a map of
    black and white stays one (Otsu), and lines one pixel wide stay one pixel wide.

    Args:
        fit: "stretch" ("just resize"): each side by itself. "crop" ("crop and resize"): scaled to cover, cut evenly.
            "fit" ("resize and fill"): scaled to lie inside a canvas of the median colour of the map's border.

    Raises:
        RequestError: the map is so long and thin that the scaled one exceeds `LARGEST` pixels.
    """
    if fit == "fit":
        return _inside(control_map, target, _border_median(control_map))
    return _cut(_scaled(control_map, _inner(control_map, target, fit)), target)


def place_mask(mask: NDArray[np.bool_], target: tuple[int, int], fit: Fit) -> NDArray[np.bool_]:
    """Bring an inpaint mask (H, W) to the model's size as `place` does; the margins that "fit" adds are repainted."""
    grey = np.repeat(mask[..., None].astype(np.uint8) * np.uint8(255), 3, axis=-1)
    white = np.full(3, 255, np.uint8)
    placed = _inside(grey, target, white) if fit == "fit" else place(grey, target, fit)
    return np.asarray(placed[..., 0] > 127)


def _inner(pixels: Bytes, target: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """Return the (width, height) that the whole map gets, before it is cut or filled up."""
    if fit == "stretch":
        return target
    height, width = pixels.shape[:2]
    scales = (target[0] / width, target[1] / height)
    k = max(scales) if fit == "crop" else min(scales)
    return max(1, round(width * k)), max(1, round(height * k))


def _cut(pixels: Bytes, target: tuple[int, int]) -> Bytes:
    top, left = (pixels.shape[0] - target[1]) // 2, (pixels.shape[1] - target[0]) // 2
    return np.ascontiguousarray(pixels[top : top + target[1], left : left + target[0]])


def _inside(pixels: Bytes, target: tuple[int, int], colour: Bytes) -> Bytes:
    inner = _inner(pixels, target, "fit")
    canvas: Bytes = np.broadcast_to(colour, (target[1], target[0], 3)).copy()
    top, left = (target[1] - inner[1]) // 2, (target[0] - inner[0]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = _scaled(pixels, inner)
    return canvas


def _border_median(pixels: Bytes) -> Bytes:
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.asarray(np.median(border, axis=0), dtype=np.float64).astype(np.uint8)


def _scaled(pixels: Bytes, size: tuple[int, int]) -> Bytes:
    """Scale a control map in the way that suits what it shows."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    colours = len(np.unique(pixels.astype(np.uint32) @ np.array((1, 256, 65536), np.uint32)))
    if 2 < colours < 200:
        return _resized(pixels, size, cv2.INTER_NEAREST)
    smaller = size[0] * size[1] < width * height
    scaled = _resized(pixels, size, cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
    if colours == 2 and pixels.min() < 16 and pixels.max() > 240:
        grey = scaled.astype(np.float32).mean(axis=-1).astype(np.uint8)
        return np.repeat(_two_valued(grey, thin=_one_pixel_lines(pixels))[..., None], 3, axis=-1)
    return scaled


def _one_pixel_lines(pixels: Bytes) -> bool:
    """Say whether more than half of the white vanishes when everything narrower than three pixels is taken away."""
    square = np.ones((3, 3), np.uint8)
    opened = cv2.dilate(cv2.erode(pixels, square), square)
    return 2 * int((opened < pixels).sum()) > int((pixels > 127).sum())


def _two_valued(grey: Bytes, *, thin: bool) -> Bytes:
    """Return (H, W) of 0 and 255: Otsu's threshold, for lines after keeping ridges only and before thinning."""
    if thin:
        ridge = np.logical_or.reduce([cv2.dilate(grey, line) == grey for line in _LINES])
        grey = np.where(ridge, grey, 0).astype(np.uint8)
    white = np.asarray(cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1], np.uint8)
    return thinned(white) if thin else white


def thinned(white: Bytes) -> Bytes:
    """Thin the white of (H, W) uint8 {0, 255} to lines one pixel wide that are connected as before.

    Source: Zhang and Suen 1984, "A fast parallel algorithm for thinning digital patterns".
    """
    on = np.pad(white > 127, 1)
    while True:
        before = int(on.sum())
        for first in (True, False):
            on[1:-1, 1:-1] &= ~_removable(on, first=first)
        if int(on.sum()) == before:
            return np.asarray(on[1:-1, 1:-1].astype(np.uint8) * np.uint8(255))


def _removable(on: NDArray[np.bool_], *, first: bool) -> NDArray[Any]:
    # P2..P9 of the paper: the neighbours clockwise from the north.
    around = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
    height, width = on.shape
    p = [on[1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx] for dy, dx in around]
    neighbours = sum(q.astype(np.int8) for q in p)
    rises = sum((~p[i] & p[(i + 1) % 8]).astype(np.int8) for i in range(8))
    north, east, south, west = p[0], p[2], p[4], p[6]
    corner = ~(east & south & (north | west)) if first else ~(north & west & (east | south))
    return np.asarray((neighbours >= 2) & (neighbours <= 6) & (rises == 1) & corner)


def _resized(pixels: Bytes, size: tuple[int, int], interpolation: int) -> Bytes:
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if size[0] * size[1] > LARGEST:
        raise RequestError(
            f"a picture of {width}x{height} would become {size[0]}x{size[1]} on the way to the model's size, expected "
            f"at most {LARGEST} pixels; cut it to the part you need, or ask for a lower resolution"
        )
    return np.asarray(cv2.resize(pixels, size, interpolation=interpolation), np.uint8)
