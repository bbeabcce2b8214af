"""Pictures with something taken away that the net shall give back: detail (tile), sharpness (blur), place (shuffle).

Every function takes (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from glassine.runtime.image import Bytes

_PATCH = 256  # pixels between two points of the noise that `shuffle` moves by


def tile(pixels: Bytes, *, factor: float) -> Bytes:
    """Average the picture down by `factor`; below 1.1 it stays as it is. The result is smaller than `pixels`."""
    if factor < 1.1:
        return pixels
    height, width = pixels.shape[:2]
    size = (max(1, int(width / factor)), max(1, int(height / factor)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def blur(pixels: Bytes, *, sigma: float) -> Bytes:
    """Blur by a Gaussian of `sigma` pixels."""
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)


def shuffle(pixels: Bytes, *, seed: int) -> Bytes:
    """Move the picture's content about by a smooth random field; every place shows some place of the picture.

    Source: ControlNet 1.1's content shuffle; the noise is NumPy's legacy generator, so that seeds agree.
    """
    height, width = pixels.shape[:2]
    noise = np.random.RandomState(seed)  # the generator that others' seeds mean
    across = _smooth(noise, height, width) * (width - 1)
    down = _smooth(noise, height, width) * (height - 1)
    moved = cv2.remap(pixels, across.astype(np.float32), down.astype(np.float32), cv2.INTER_LINEAR)
    return np.asarray(moved, np.uint8)


def _smooth(noise: np.random.RandomState, height: int, width: int) -> NDArray[np.float64]:
    """Return (height, width) in [0, 1]: random points 256 pixels apart or closer, bicubic between them."""
    points = noise.uniform(size=(height // _PATCH + 2, width // _PATCH + 2))
    size = (width + 2 * _PATCH, height + 2 * _PATCH)
    field = np.asarray(cv2.resize(points, size, interpolation=cv2.INTER_CUBIC), np.float64)
    field = field[_PATCH : _PATCH + height, _PATCH : _PATCH + width]
    field = field - field.min()
    return np.asarray(field / field.max() if field.max() > 0 else field)
