"""Maps that a network sees in the picture: depth, normals, soft edges, segments. Its numbers become the net's colours.

Every function takes (H, W, 3) uint8 RGB and the network, and returns a map of the same shape.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError
from glassine.runtime.image import Bytes
from glassine.runtime.preprocess.ade20k import ADE20K
from glassine.runtime.preprocess.network import Network

Float = NDArray[np.float32]


def depth(pixels: Bytes, *, network: Network, input: str, multiple: int, near: str) -> Bytes:
    """Return depth as grey, stretched over 0..255, near = white.

    Args:
        near: what the network gives to what is near: "high" (inverse depth: MiDaS, Depth Anything) or "low" (metres:
            ZoeDepth, Depth Pro).

    Raises:
        EngineError: the output has several channels.
    """
    values = _one_channel(network, network(pixels, normal=input, multiple=multiple))
    values = values if near == "high" else -values
    span = float(values.max() - values.min())
    grey = (values - values.min()) * (255 / span) if span > 0 else np.zeros_like(values)
    return _rgb(_to_size(grey, pixels))


def normal(pixels: Bytes, *, network: Network, input: str, multiple: int, output: str) -> Bytes:
    """Return unit normals as colours, 127.5 (n + 1): red is left, green is up, blue is towards the viewer.

    Args:
        output: "signed", x, y, z in [-1, 1], or "unit", the same in [0, 1].

    Raises:
        EngineError: the output has fewer than three channels (a fourth, its certainty, is not used).
    """
    values = network(pixels, normal=input, multiple=multiple)
    if len(values) not in (3, 4):
        raise EngineError(f"{network.name}: its output has {len(values)} channels, expected 3: the normal's x, y and z")
    n = values[:3] if output == "signed" else 2 * values[:3] - 1
    n = np.ascontiguousarray(np.moveaxis(n, 0, -1))
    height, width = pixels.shape[:2]
    n = np.asarray(cv2.resize(n, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    length = np.sqrt((n * n).sum(axis=-1, keepdims=True))
    return _bytes(np.float32(127.5) * (n / np.maximum(length, np.float32(1e-6)) + 1))


def softedge(pixels: Bytes, *, network: Network, input: str, multiple: int, output: str, lines: str) -> Bytes:
    """Return lines as grey, white on black.

    Args:
        output: "unit" (0..1), "logits" (before the sigmoid) or "bytes" (0..255).
        lines: "bright", or "dark" for networks that draw black on white, as line-art networks do.
    """
    values = _one_channel(network, network(pixels, normal=input, multiple=multiple))
    if output == "logits":
        values = np.asarray(1 / (1 + np.exp(-np.clip(values, -80, 80))), np.float32)
    grey = np.clip(values if output == "bytes" else values * 255, 0, 255)
    return _rgb(_to_size(grey if lines == "bright" else 255 - grey, pixels))


def segment(pixels: Bytes, *, network: Network, input: str, multiple: int) -> Bytes:
    """Return every pixel's class as its colour of ADE20K.

    The network gives either logits, a channel a class, or the class itself.

    Raises:
        EngineError: more than 150 classes, or classes that are no whole numbers.
    """
    values = network(pixels, normal=input, multiple=multiple)
    height, width = pixels.shape[:2]
    if len(values) == 1:
        classes = np.asarray(cv2.resize(values[0], (width, height), interpolation=cv2.INTER_NEAREST), np.float32)
    else:
        classes = _strongest(values, (width, height))
    if classes.min() < 0 or classes.max() >= len(ADE20K) or (classes != np.rint(classes)).any():
        raise EngineError(
            f"{network.name}: gives classes from {classes.min():g} to {classes.max():g}, expected whole numbers from 0 "
            f"to {len(ADE20K) - 1}: the net knows the {len(ADE20K)} classes of ADE20K"
        )
    return ADE20K[classes.astype(np.int64)]


def _strongest(logits: Float, size: tuple[int, int]) -> Float:
    """Return the channel that is largest at each pixel of (width, height); logits are bilinear between their points."""
    best = np.full((size[1], size[0]), -np.inf, np.float32)
    classes = np.zeros((size[1], size[0]), np.float32)
    for index, channel in enumerate(logits):  # one at a time: 150 channels of a large picture would fill the memory
        values = np.asarray(cv2.resize(channel, size, interpolation=cv2.INTER_LINEAR), np.float32)
        better = values > best
        best[better], classes[better] = values[better], index
    return classes


def _one_channel(network: Network, values: Float) -> Float:
    if len(values) != 1:
        raise EngineError(f"{network.name}: its output has {len(values)} channels, expected one")
    return np.asarray(values[0])


def _to_size(grey: Float, pixels: Bytes) -> Bytes:
    height, width = pixels.shape[:2]
    if grey.shape != (height, width):
        smaller = height * width < grey.size
        grey = np.asarray(
            cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC), np.float32
        )
    return _bytes(grey)


def _bytes(values: Float) -> Bytes:
    return np.asarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _rgb(grey: Bytes) -> Bytes:
    return np.repeat(grey[..., None], 3, axis=-1)
