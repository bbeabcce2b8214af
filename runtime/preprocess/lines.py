"""Lines from a picture, white on black: what the canny, scribble and line-art nets look at.

Every function takes (H, W, 3) uint8 RGB and returns a map of the same shape. Formulas: ControlNet's annotators.
"""

from __future__ import annotations

import cv2
import numpy as np

from glassine.errors import RequestError
from glassine.runtime.image import Bytes


def canny(pixels: Bytes, *, low: float, high: float) -> Bytes:
    """Find edges by Canny's detector (3x3 Sobel, L1 gradient of the strongest channel, no blur before).

    Args:
        low, high: thresholds of the gradient, 0 to 2040; edges above `high` count, and those above `low` touching them.

    Raises:
        RequestError: low is above high.
    """
    if low > high:
        raise RequestError(f"canny: low is {low:g} and high is {high:g}; expected low <= high")
    return _rgb(np.asarray(cv2.Canny(np.ascontiguousarray(pixels), low, high), np.uint8))


def threshold(pixels: Bytes, *, threshold: float) -> Bytes:
    """White where the darkest channel is above `threshold`."""
    return _white(pixels.min(axis=-1) > threshold)


def scribble(pixels: Bytes, *, threshold: float) -> Bytes:
    """Draw rough strokes where the picture is darker than its surroundings (XDoG).

    A difference of Gaussians of sigma 0.5 and 5; white where twice the difference, in whole levels, exceeds
    `threshold`. Source: Winnemoeller, Kyprianidis and Olsen 2012, "XDoG".
    """
    darker = (_blurred(pixels, 5.0) - _blurred(pixels, 0.5)).min(axis=-1)
    # Whole levels of 255 - difference, rounded down, because that is the map the threshold was tuned on.
    difference = 255 - np.clip(255 - darker, 0, 255).astype(np.uint8).astype(np.int32)
    return _white(2 * difference > threshold)


def lineart(pixels: Bytes, *, sigma: float, floor: float) -> Bytes:
    """Draw lines as bright as the picture is darker than its blurred self; the median line becomes 127.

    Args:
        sigma: of the blur, in pixels. floor: differences up to here, in levels, are not counted as lines.
    """
    intensity = np.clip((_blurred(pixels, sigma) - pixels).min(axis=-1), 0, 255)
    lines = intensity[intensity > floor]
    usual = max(16.0, float(np.median(lines))) if lines.size else 16.0  # 16: noise is not blown up into lines
    return _rgb(np.clip(intensity * np.float32(127 / usual), 0, 255).astype(np.uint8))


def _blurred(pixels: Bytes, sigma: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), sigma), np.float32)


def _white(where: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Bytes:
    return _rgb(where.astype(np.uint8) * np.uint8(255))


def _rgb(grey: Bytes) -> Bytes:
    return np.repeat(grey[..., None], 3, axis=-1)
