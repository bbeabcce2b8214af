"""Latents -> picture: the VAE, the composite that returns protected pixels, and previews that need no model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine.errors import EngineError
from glassine.runtime.engine.contract import Predict
from glassine.runtime.image import check_finite, to_pixels

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

CELL = 8  # pixels a side of one latent cell

# Latent channel -> RGB in [-1, 1], and a bias: a least-squares fit of SD 1.4's decoder, by keturn,
# "Decoding latents to RGB without upscaling", discuss.huggingface.co/t/23204. It holds for latents times 0.18215.
SD1_PREVIEW = np.array(
    [
        [0.298, 0.207, 0.208],
        [0.187, 0.286, 0.173],
        [-0.158, 0.189, 0.264],
        [-0.184, -0.271, -0.473],
        [0.0, 0.0, 0.0],
    ],
    np.float32,
)


def decode_latents(predict: Predict, latents: Float, *, latent_scale: float) -> Bytes:
    """Decode latents into pixels (H, W, 3) uint8; the arguments and errors are those of `decode_image`."""
    return to_pixels(decode_image(predict, latents, latent_scale=latent_scale))


def decode_image(predict: Predict, latents: Float, *, latent_scale: float) -> Float:
    """Decode latents.

    Args:
        predict: the VAE decoder: z (1, 4, h, w) -> image (1, 3, H, W), around [-1, 1].
        latents: (1, 4, h, w) float32. latent_scale: what the encoder multiplied with.

    Returns:
        (1, 3, H, W) float32, around [-1, 1].

    Raises:
        EngineError: the decoder's answer is not a picture, or holds NaN or infinity.
    """
    image = predict(z=latents / np.float32(latent_scale)).get("image")
    if image is None or image.ndim != 4 or image.shape[:2] != (1, 3):
        got = "nothing" if image is None else image.shape
        raise EngineError(f'VAE decoder: output "image" is {got}, expected (1, 3, H, W)')
    return check_finite(image.astype(np.float32))


def composite(decoded: Bytes, source: Bytes, live: NDArray[Any], *, guard: int = 1, feather: int = CELL) -> Bytes:
    """Put the source's own bytes back wherever the map protects them.

    A decoder changes every pixel a little, also where the latents are the source's. A pixel is protected if its
    latent cell and the ring of `guard` cells around that have n = 0; from the border of that region inwards the
    decoded picture fades in over `feather` pixels.

    Args:
        decoded, source: (H, W, 3) uint8.
        live: (h, w); not 0 where a cell may change: the n-table, or a mask.
        guard: rings of cells around the live ones that the decoder may draw too.
        feather: pixels of the fade, even; at most 8 * guard leaves every live cell fully decoded.

    Returns:
        (H, W, 3) uint8; protected pixels are the source's, byte for byte.
    """
    share = decoded_share(live, guard=guard, feather=feather)[..., None]
    mixed: Bytes = np.rint(decoded * share + source * (1 - share)).astype(np.uint8)
    return np.where(share == 0, source, np.where(share == 1, decoded, mixed))


def decoded_share(live: NDArray[Any], *, guard: int = 1, feather: int = CELL) -> Float:
    """Return the share (8h, 8w) of the decoded picture in `composite`: exactly 0 where protected.

    The fade is a box filter over the region shrunk by the filter's radius: 0 outside the region whatever its shape.
    """
    region = _grown(live != 0, guard).repeat(CELL, axis=0).repeat(CELL, axis=1)
    radius = feather // 2
    shrunk = ~_grown(~region, radius)
    return np.asarray(_box_sum(shrunk, radius) / (2 * radius + 1) ** 2, np.float32)


def preview(latents: Float, matrix: Float = SD1_PREVIEW) -> Bytes:
    """Return a rough picture (8h, 8w, 3) uint8 of latents (1, 4, h, w), without a model and in about a millisecond.

    Args:
        matrix: (5, 3), a row per latent channel and the bias: RGB in [-1, 1].
    """
    image = np.tensordot(matrix[:-1], latents[0], axes=(0, 0)) + matrix[-1][:, None, None]
    small = to_pixels(np.nan_to_num(image, nan=0.0)[None])
    height, width = small.shape[:2]
    return np.asarray(Image.fromarray(small).resize((width * CELL, height * CELL), Image.Resampling.BILINEAR))


def measure_preview(predict: Predict, *, height: int, width: int, latent_scale: float) -> Float:
    """Return the (5, 3) matrix for `preview` of a VAE that is not Stable Diffusion 1's: decode patches, and fit.

    One decoding of random patches of 4x4 cells, which is what a decoder turns into plain colours.

    Args:
        predict, latent_scale: as `decode_latents`. height, width: h and w of the latents.
    """
    patches = np.random.default_rng(0).normal(0, 0.7, (1, 4, -(-height // 4), -(-width // 4)))
    latents = patches.repeat(4, axis=2).repeat(4, axis=3)[:, :, :height, :width].astype(np.float32)
    pixels = decode_latents(predict, latents, latent_scale=latent_scale)
    colours = pixels.reshape(height, CELL, width, CELL, 3).mean(axis=(1, 3)).reshape(-1, 3) / 127.5 - 1
    rows = np.concatenate([latents[0].reshape(4, -1), np.ones((1, height * width))]).T
    return np.asarray(np.linalg.lstsq(rows, colours, rcond=None)[0], np.float32)


def _grown(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Return where a square of `radius` around a cell holds any True."""
    return _box_sum(mask, radius) > 0


def _box_sum(mask: NDArray[np.bool_], radius: int) -> NDArray[np.int64]:
    """Count the True in a square of `radius` around each cell; the border is repeated outwards."""
    counts = np.pad(mask, radius, mode="edge").astype(np.int64)
    for axis in (0, 1):
        sums = np.cumsum(counts, axis=axis)
        sums = np.insert(sums, 0, 0, axis=axis)
        length = mask.shape[axis]
        counts = sums.take(range(2 * radius + 1, 2 * radius + 1 + length), axis) - sums.take(range(length), axis)
    return counts
