"""Colours: the picture itself, its negative, its lightness for recolouring nets, and a grid of its colours.

Every function takes (H, W, 3) uint8 RGB and returns a map of the same shape.
"""

from __future__ import annotations

import cv2
import numpy as np

from glassine.runtime.image import Bytes


def unchanged(pixels: Bytes) -> Bytes:
    """Return the picture as it is: a map made elsewhere, or for nets that look at pictures (tile, ip2p, shuffle)."""
    return pixels


def invert(pixels: Bytes) -> Bytes:
    """Return the negative: black lines on white paper become what line nets expect."""
    return 255 - pixels


def luminance(pixels: Bytes, *, gamma: float) -> Bytes:
    """Return CIE L* as grey, (L / 255)^gamma."""
    return _grey(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB), np.uint8)[..., 0], gamma)


def intensity(pixels: Bytes, *, gamma: float) -> Bytes:
    """Return HSV's value, the largest channel, as grey, (V / 255)^gamma."""
    return _grey(pixels.max(axis=-1), gamma)


def with_luminance(drawn: Bytes, source: Bytes) -> Bytes:
    """Give a drawn picture the L* of the picture it recolours; hue and chroma stay (both (H, W, 3), one size)."""
    lab = np.array(cv2.cvtColor(drawn, cv2.COLOR_RGB2LAB), np.uint8)
    lab[..., 0] = np.asarray(cv2.cvtColor(source, cv2.COLOR_RGB2LAB), np.uint8)[..., 0]
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)


def with_intensity(drawn: Bytes, source: Bytes) -> Bytes:
    """Give a drawn picture the HSV value of the picture it recolours; hue and saturation stay."""
    hsv = np.array(cv2.cvtColor(drawn, cv2.COLOR_RGB2HSV), np.uint8)
    hsv[..., 2] = source.max(axis=-1)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def grid(pixels: Bytes, *, cell: int) -> Bytes:
    """Return squares of `cell` pixels, each with one colour of the picture (bicubic down, nearest up)."""
    height, width = pixels.shape[:2]
    few = cv2.resize(pixels, (max(1, width // cell), max(1, height // cell)), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.resize(few, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def _grey(channel: Bytes, gamma: float) -> Bytes:
    levels = np.rint((np.arange(256) / 255) ** gamma * 255).astype(np.uint8)
    return np.repeat(levels[channel][..., None], 3, axis=-1)
