"""Latent transparency: an RGBA picture into latents, and latents back into straight-alpha RGBA.

    source   RGBA -> grey composite -> VAE encoder -> mean + deviation * offset(alpha, padded colours) -> latents
    picture  latents -> VAE decoder -> object on grey -> transparent decoder, 1 or 8 passes -> alpha, red, green, blue

Colours are gamma-encoded sRGB, as everywhere in LayerDiffuse (Zhang and Agrawala 2024, arXiv 2402.17113). Transparent
latents show their object over mid-grey; what the VAE draws is neither the final colour nor to be composited.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, RequestError
from glassine.runtime.decode import CELL, decode_image
from glassine.runtime.engine.contract import Predict
from glassine.runtime.image import over_grey
from glassine.runtime.latents import encode_image

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Passes = Literal[1, 8]

GREY = 0.5  # the background that transparent latents show
PASSES: tuple[Passes, ...] = (1, 8)
DECODER_STEP = 64  # the transparent decoder halves a side six times
_SHRINK = 1.2  # from one level of the colour pyramid to the next

# What the tiny family showed: of an opaque picture's pixels 98.0 % and more have an alpha above 0.97.
OPAQUE_ALPHA, OPAQUE_SHARE = 0.97, 0.96
MISMATCH = 0.6  # the tiny family's pictures: 0.07 to 0.36; a decoder that never saw such latents: 0.88 and more
CLEAR_SHARE = 0.995  # beyond it, what is left is a speck
_FAINT = 0.02  # the least contrast to which a mismatch is held


def pad_rgb(rgba: Bytes) -> Float:
    """Continue the colours of a picture smoothly into its transparent parts.

    Opaque pixels keep their colour; what lies under alpha 0 has no influence; a picture without any alpha is black.

    Args:
        rgba: (H, W, 4) uint8, straight.

    Returns:
        (H, W, 3) float32 in [0, 1].

    A pyramid of premultiplied colours, each level 1/1.2 of the one before, is filled from its smallest level upwards.
    """
    alpha = rgba[..., 3:] / 255
    levels = [np.concatenate([rgba[..., :3] / 255 * alpha, alpha], axis=-1)]
    while min(levels[-1].shape[:2]) > 1:
        height, width = levels[-1].shape[:2]
        shrunk = _area(levels[-1], int(height / _SHRINK), axis=0)
        levels.append(_area(shrunk, int(width / _SHRINK), axis=1))
    top = levels[-1].sum(axis=(0, 1))
    filled = (top[:3] / max(top[3], 1e-8))[None, None]
    for level in reversed(levels):
        for axis in (0, 1):
            filled = _linear(filled, level.shape[axis], axis)
        filled = level[..., :3] + filled * (1 - level[..., 3:])
    return np.asarray(filled, np.float32)


def encode_rgba(
    encoder: Predict, offset: Predict, rgba: Bytes, *, latent_scale: float, offset_scale: float = 1.0
) -> Float:
    """Return a picture's transparent latents, without chance: (mean + deviation * K * E(alpha, colours)) * scale.

    Args:
        encoder: the VAE encoder, as `latents.encode_image` takes it.
        offset: the transparent encoder: argb (1, 4, H, W) in [0, 1] -> offset (1, 4, h, w).
        rgba: (H, W, 4) uint8, straight; the model's size.
        latent_scale: what latents are multiplied with. offset_scale: K, which belongs to the offset encoder's file.

    Returns:
        (1, 4, h, w) float32, ready for the loop.

    Raises:
        RequestError: the picture is fully transparent: there is nothing to encode.
        EngineError: an encoder's answer is of another form, or holds NaN or infinity.
    """
    if not rgba[..., 3].any():
        raise RequestError(
            "the source picture is fully transparent (alpha is 0 everywhere), so there is nothing to change; draw "
            "without --image, or check that the file holds straight alpha"
        )
    argb = np.concatenate([rgba[..., 3:].astype(np.float32) / 255, pad_rgb(rgba)], axis=-1)
    answer = offset(argb=np.ascontiguousarray(np.moveaxis(argb, -1, 0)[None])).get("offset")
    height, width = rgba.shape[0] // CELL, rgba.shape[1] // CELL
    if answer is None or answer.shape != (1, 4, height, width):
        got = "nothing" if answer is None else answer.shape
        raise EngineError(f'transparent encoder: output "offset" is {got}, expected (1, 4, {height}, {width})')
    if not np.isfinite(answer.astype(np.float32)).all():
        raise EngineError("transparent encoder: the offset holds NaN or infinity; run it in fp32")
    noise = np.float32(offset_scale) * answer.astype(np.float32)
    return encode_image(encoder, over_grey(rgba), latent_scale=latent_scale, noise=noise)


@dataclass(frozen=True, slots=True)
class Health:
    """How a decoded transparent picture looks, in figures.

    mismatch: between the picture composited over grey and what the VAE drew, which show the same: the root mean square
        of their difference, divided by that of what the VAE drew against plain grey; 0 is none, 1 nothing in common.
    opaque, clear: shares of pixels with alpha above 0.97 and below 0.03.
    """

    mismatch: float
    opaque: float
    clear: float

    @property
    def notices(self) -> tuple[str, ...]:
        """What is most likely wrong, in words; empty if all is well."""
        notices = []
        if self.mismatch > MISMATCH:
            notices.append(
                f"over grey the transparent picture is not what the VAE drew (mismatch {self.mismatch:.2f}, expected "
                f"less than {MISMATCH}): the transparent decoder is most likely of another family (SD1.5, SDXL) or "
                "another VAE; convert the one that belongs to this model"
            )
        if self.opaque > OPAQUE_SHARE:
            notices.append(
                "no pixel is transparent: the prompt names a background, the transparency patch is not in this UNet, "
                "or it does not fit this checkpoint (strongly retrained and distilled ones lose it)"
            )
        if self.clear > CLEAR_SHARE:
            notices.append("every pixel is transparent: nothing was drawn; try another seed, more steps or guidance")
        return tuple(notices)


@dataclass(frozen=True, slots=True)
class Transparent:
    """A decoded transparent picture.

    rgba: (H, W, 4) uint8, straight alpha; colours continue under alpha 0. grey: (H, W, 3) uint8, what the VAE drew.
    """

    rgba: Bytes
    grey: Bytes
    health: Health


def decode_rgba(
    decoder: Predict, alpha: AlphaDecoder, latents: Float, *, latent_scale: float, passes: Passes = 1
) -> Transparent:
    """Decode transparent latents.

    Args:
        decoder: the VAE decoder. alpha: the transparent decoder. latents: (1, 4, h, w) float32.
        latent_scale: what the encoder multiplied with; both decoders read latents divided by it.
        passes: 8 takes the lower median over all flips and turns; see `AlphaDecoder`.

    Raises:
        EngineError: an answer is of another form, or holds NaN or infinity.
    """
    image = decode_image(decoder, latents, latent_scale=latent_scale)
    pixel = np.clip(image * np.float32(0.5) + np.float32(0.5), 0, 1)
    argb = alpha(pixel, latents / np.float32(latent_scale), passes)
    rgba = np.moveaxis(argb[[1, 2, 3, 0]], 0, -1)
    return Transparent(to_bytes(rgba), to_bytes(np.moveaxis(pixel[0], 0, -1)), health(argb, pixel[0]))


def to_bytes(values: Float) -> Bytes:
    """[0, 1] -> uint8, truncated: the pictures of LayerDiffuse's own code, byte for byte."""
    return np.ascontiguousarray(np.clip(values * np.float32(255), 0, 255).astype(np.uint8))


def health(argb: Float, pixel: Float) -> Health:
    """Measure a decoded picture: argb (4, H, W), pixel (3, H, W) what the VAE drew, both in [0, 1]."""
    alpha = argb[:1]
    composite = GREY + (argb[1:] - GREY) * alpha
    drawn = float(np.sqrt(np.square(pixel - GREY).mean()))
    return Health(
        mismatch=float(np.sqrt(np.square(composite - pixel).mean())) / max(drawn, _FAINT),
        opaque=float((alpha > OPAQUE_ALPHA).mean()),
        clear=float((alpha < 1 - OPAQUE_ALPHA).mean()),
    )


class AlphaDecoder:
    """The transparent decoder at one size, and at the turned one if there is a package for it.

    Pictures smaller than the package are padded with grey at the right and bottom, their latents with `grey_latent`,
    and the answer is cropped back: only multiples of 64 pass through the network.

    Args:
        predict: pixel (1, 3, H, W) in [0, 1], latent (1, 4, H/8, W/8) unscaled -> argb (1, 4, H, W).
        size: (W, H) of its package. turned: the same network at (H, W), for the quarter turns of the ensemble.
        grey_latent: (4,) the unscaled latent of plain grey.
    """

    def __init__(
        self,
        predict: Predict,
        size: tuple[int, int],
        *,
        turned: Predict | None = None,
        grey_latent: Float | None = None,
    ) -> None:
        self._predict = predict
        self._turned = predict if size[0] == size[1] else turned
        self._size = size
        self._grey_latent = np.zeros(4, np.float32) if grey_latent is None else grey_latent

    def __call__(self, pixel: Float, latent: Float, passes: Passes = 1) -> Float:
        """Return (4, H, W) float32 in [0, 1]: alpha, red, green, blue.

        passes: 1, or 8: every flip and quarter turn of the picture, and per number the lower median (the 4th smallest
            of 8), which LayerDiffuse takes. A picture that is not square and has no turned package gets the 4 passes
            that keep its shape, and their mean.

        Raises:
            RequestError: passes is neither 1 nor 8. EngineError: the picture does not fit the package, or the answer
                is of another form.
        """
        if passes not in PASSES:
            raise RequestError(f"passes is {passes!r}, expected 1 or 8")
        height, width = pixel.shape[2:]
        pixel, latent = self._padded(pixel, latent)
        if passes == 1:
            argb = self._once(self._predict, pixel, latent)
        elif self._turned is None:
            argb = np.mean(list(self._views(pixel, latent, turns=(0, 2))), axis=0, dtype=np.float32)
        else:
            argb = np.partition(list(self._views(pixel, latent, turns=(0, 1, 2, 3))), 3, axis=0)[3]
        return np.asarray(argb[:, :height, :width])

    def _padded(self, pixel: Float, latent: Float) -> tuple[Float, Float]:
        width, height = self._size
        down, across = height - pixel.shape[2], width - pixel.shape[3]
        if down == across == 0:
            return pixel, latent
        if min(down, across) < 0 or down % CELL or across % CELL:
            raise EngineError(
                f"transparent decoder: its package is {width}x{height} pixels, the picture {pixel.shape[3]}x"
                f"{pixel.shape[2]}; convert the decoder for this size"
            )
        wide = np.pad(pixel, ((0, 0), (0, 0), (0, down), (0, across)), constant_values=GREY)
        cells = np.broadcast_to(self._grey_latent[None, :, None, None], (1, 4, height // CELL, width // CELL)).copy()
        cells[:, :, : latent.shape[2], : latent.shape[3]] = latent
        return wide, cells

    def _views(self, pixel: Float, latent: Float, turns: tuple[int, ...]) -> Iterator[Float]:
        """The answers for every flip and turn, flipped and turned back."""
        assert self._turned is not None or 1 not in turns
        for flip in (False, True):
            for k in turns:
                predict: Any = self._turned if k % 2 else self._predict
                seen = [np.rot90(array[..., ::-1] if flip else array, k, axes=(2, 3)) for array in (pixel, latent)]
                argb = np.rot90(self._once(predict, *seen), -k, axes=(1, 2))
                yield argb[..., ::-1] if flip else argb

    @staticmethod
    def _once(predict: Predict, pixel: Float, latent: Float) -> Float:
        answer = predict(pixel=np.ascontiguousarray(pixel), latent=np.ascontiguousarray(latent)).get("argb")
        expected = (1, 4, *pixel.shape[2:])
        if answer is None or answer.shape != expected:
            got = "nothing" if answer is None else answer.shape
            raise EngineError(f'transparent decoder: output "argb" is {got}, expected {expected}')
        if not np.isfinite(answer.astype(np.float32)).all():
            raise EngineError("transparent decoder: the picture holds NaN or infinity; run it in fp32")
        return np.asarray(np.clip(answer[0], 0, 1), np.float32)


def decoder_size(width: int, height: int) -> tuple[int, int]:
    """Return the size the transparent decoder works at: both sides rounded up to multiples of 64."""
    return -(-width // DECODER_STEP) * DECODER_STEP, -(-height // DECODER_STEP) * DECODER_STEP


def check_decoder_size(width: int, height: int) -> None:
    """Raise RequestError, naming the two nearest good sizes, unless both sides are multiples of 64."""
    above = decoder_size(width, height)
    if above == (width, height):
        return
    step = DECODER_STEP
    below = (max(step, width // step * step), max(step, height // step * step))
    raise RequestError(
        f"size {width}x{height}: the transparent decoder works on multiples of {step}; the nearest are "
        f"{below[0]}x{below[1]} and {above[0]}x{above[1]} (or let the picture be padded and cropped back)"
    )


def _area(values: NDArray[np.float64], size: int, axis: int) -> NDArray[np.float64]:
    """Shrink one axis: each new cell is the exact mean of the stretch it covers."""
    length = values.shape[axis]
    edges = np.arange(size + 1) * (length / size)
    whole = np.minimum(edges.astype(np.int64), length - 1)
    part = np.expand_dims(edges - whole, tuple(i for i in range(values.ndim) if i != axis))
    sums = np.insert(np.cumsum(values, axis=axis), 0, 0, axis=axis)
    up_to = sums.take(whole, axis) + part * values.take(whole, axis)
    return np.asarray(np.diff(up_to, axis=axis) * (size / length))


def _linear(values: NDArray[np.float64], size: int, axis: int) -> NDArray[np.float64]:
    """Stretch one axis linearly between cell centres; beyond the outermost centres the value stays."""
    length = values.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    low = at.astype(np.int64)
    part = np.expand_dims(at - low, tuple(i for i in range(values.ndim) if i != axis))
    return np.asarray(values.take(low, axis) * (1 - part) + values.take(np.minimum(low + 1, length - 1), axis) * part)
