"""LayerDiffuse's networks beside the UNet (Zhang and Agrawala 2024, arXiv 2402.17113): latents <-> transparency.

    decoder   a picture and its latent -> alpha and colour
    encoder   alpha and colour -> what to add to the latent of the picture
    control   a picture that is given -> what to add to the attentions of a UNet that draws what belongs to it

Channels are A, R, G, B: alpha comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glassine.errors import ConversionError
from glassine.models import mil as mb
from glassine.models.attention import FORMS, query_scale, to_image, to_tokens
from glassine.models.config import (
    Attention,
    FrameControlConfig,
    Layout,
    TransparentDecoderConfig,
    TransparentEncoderConfig,
)
from glassine.models.layers import Scope, Var, Weights, build, conv, dense, group_norm, resnet, upsample
from glassine.models.mil import Program
from glassine.models.sharing import control_name

EPS = 1e-5  # of every GroupNorm of the decoder
LATENT_LEVEL = 3  # where the picture has become as small as its latent
# The scores of all heads that are in memory at once: 2**26 are 134 MB in fp16. Heads are 8 wide and many, so that one
# matrix of scores at 1024 pixels would be 32 x 4096 x 4096, a gigabyte.
SCORES = 2**26


def transparent_decoder(
    config: TransparentDecoderConfig,
    weights: Weights,
    *,
    height: int = 512,
    width: int = 512,
    attention: Attention = "split",
    layout: Layout = "channels_first",
) -> Program:
    """Write the decoder as a program.

    height, width: pixels, multiples of 64 (`config.downscale`).

    Inputs:
        pixel (1, 3, height, width) fp16: the picture that the VAE made, RGB in [0, 1].
        latent (1, latent_channels, height/8, width/8) fp16: what it was made of, divided by the family's latent scale.

    Output: argb (1, 4, height, width) fp32, nominally in [0, 1], not clipped; the colour is not multiplied by alpha.

    Raises:
        ConversionError: a size that does not halve evenly down to the deepest level.
    """
    if height % config.downscale or width % config.downscale:
        raise ConversionError(
            f"transparent decoder: {width}x{height} pixels; expected multiples of {config.downscale}: pad the picture"
        )
    # The spelling of GroupNorm is that of `split` in every form: a group at 1024 pixels is eight million numbers, whose
    # sum and whose squares leave fp16.
    decoder = _Decoder(config, Scope(weights, "split", layout), attention)
    cell = 2**LATENT_LEVEL
    return build(
        {
            "pixel": ((1, 3, height, width), np.float16),
            "latent": ((1, config.latent_channels, height // cell, width // cell), np.float16),
        },
        decoder.decode,
        attention=attention,
    )


@dataclass(frozen=True, slots=True)
class _Decoder:
    """The steps of the decoder; `w` is its root, `form` that of its attention."""

    config: TransparentDecoderConfig
    w: Scope
    form: Attention

    def decode(self, pixel: Var, latent: Var) -> dict[str, Var]:
        """Append the network to the program being built."""
        kept = self._down(conv(self.w / "conv_in", pixel, self.config.channels[0]), latent)
        x = self._up(self._middle(kept[-1]), kept)
        x = group_norm(self.w / "conv_norm_out", x, self.config.norm_groups, eps=EPS)
        return {"argb": conv(self.w / "conv_out", mb.silu(x=x, name="silu_out"), 4)}

    def _down(self, x: Var, latent: Var) -> list[Var]:
        """Halve the size level by level; return the result of every step, the last one being the deepest."""
        config, kept = self.config, [x]
        for level, channels in enumerate(config.channels):
            w = self.w / "down_blocks" / level
            if level == LATENT_LEVEL:
                # Only the way down goes on with the latent: what was kept of the step before stays without.
                x = mb.add(x=x, y=conv(self.w / "latent_conv_in", latent, x.shape[1], kernel=1), name="with_latent")
            for i in range(config.layers):
                x = self._step(w, i, x, channels, attends=config.attention[level])
                kept.append(x)
            if level < len(config.channels) - 1:
                x = conv(w / "downsamplers.0.conv", x, channels, stride=2)
                kept.append(x)
        return kept

    def _middle(self, x: Var) -> Var:
        w, channels = self.w / "mid_block", self.config.channels[-1]
        return self._step(w, 1, self._step(w, 0, x, channels, attends=True), channels, attends=False)

    def _up(self, x: Var, kept: list[Var]) -> Var:
        """Double the size level by level, each step beside what the way down kept."""
        config, kept = self.config, list(kept)
        for level, (channels, attends) in enumerate(
            zip(reversed(config.channels), reversed(config.attention), strict=True)
        ):
            w = self.w / "up_blocks" / level
            for i in range(config.layers + 1):
                x = mb.concat(values=(x, kept.pop()), axis=1, name=(w / "resnets" / i).op("concat"))
                x = self._step(w, i, x, channels, attends=attends)
            if kept:
                x = upsample(w / "upsamplers.0", x, height=kept[-1].shape[2], width=kept[-1].shape[3])
        return x

    def _step(self, w: Scope, i: int, x: Var, channels: int, *, attends: bool) -> Var:
        x = resnet(w / "resnets" / i, x, channels, groups=self.config.norm_groups, eps=EPS)
        return self._attention(w / "attentions" / i, x) if attends else x

    def _attention(self, w: Scope, x: Var) -> Var:
        """Self-attention over all cells, added to its input."""
        image, (_, channels, height, width) = x, x.shape
        x = to_tokens(w, group_norm(w / "group_norm", x, self.config.norm_groups, eps=EPS))
        q = dense(w / "to_q", x, channels, scale=query_scale(self.form, self.config.head_dim))
        k, v = (dense(w / name, x, channels) for name in ("to_k", "to_v"))
        attend = FORMS["sdpa", w.layout] if self.form == "sdpa" else _in_chunks
        x = dense(w / "to_out.0", attend(w, q, k, v, channels // self.config.head_dim), channels)
        return mb.add(x=to_image(w, x, height=height, width=width), y=image, name=w.op())


def _in_chunks(w: Scope, q: Var, k: Var, v: Var, heads: int) -> Var:
    """Attend with all heads at once, for as many queries at a time as keep to SCORES.

    For `split` too: one product a head would be thousands of operations on matrices that are 8 wide.
    """
    axis = 3 if w.channels_first else 1
    tokens = q.shape[axis]
    rows = max(1, SCORES // (heads * tokens))
    whole, rest = divmod(tokens, rows)
    attend = FORMS["einsum", w.layout]
    if whole + (rest > 0) == 1:
        return attend(w, q, k, v, heads)
    chunks = mb.split(x=q, split_sizes=[rows] * whole + [rest] * (rest > 0), axis=axis, name=w.op("queries"))
    done = [attend(w / f"chunk{i}", chunk, k, v, heads) for i, chunk in enumerate(chunks)]
    return mb.concat(values=done, axis=axis, name=w.op("chunks"))


def transparent_encoder(
    config: TransparentEncoderConfig, weights: Weights, *, height: int = 512, width: int = 512
) -> Program:
    """Write the offset encoder as a program.

    height, width: pixels, multiples of 8.

    Input: argb (1, 4, height, width) fp16 in [0, 1]; the colours of transparent pixels are filled in (`pad_rgb`).

    Output: offset (1, latent_channels, height/8, width/8) fp32: times the factor of the file and the deviation of the
    picture's latent, what to add to that latent.

    Raises:
        ConversionError: a size is not a whole number of latent cells.
    """
    if height % 8 or width % 8:
        raise ConversionError(f"transparent encoder: {width}x{height} pixels; expected multiples of 8")
    w = Scope(weights, "split", "channels_first")

    def encode(argb: Var) -> dict[str, Var]:
        x = _convolutions(w / "blocks", argb, config.widths)
        last = w / "blocks" / (2 * len(config.widths))
        return {"offset": conv(last, mb.silu(x=x, name=last.op("silu")), config.latent_channels)}

    return build({"argb": ((1, 4, height, width), np.float16)}, encode)


def _convolutions(w: Scope, x: Var, widths: Sequence[int]) -> Var:
    """Convolve with SiLU between, none after the last; from the third on every second one halves the size."""
    for i, channels in enumerate(widths):
        if i:
            x = mb.silu(x=x, name=(w / (2 * i)).op("silu"))
        x = conv(w / (2 * i), x, channels, stride=2 if i in {2, 4, 6} else 1)
    return x


def frame_control(config: FrameControlConfig, weights: Weights, *, height: int = 512, width: int = 512) -> Program:
    """Write the control encoder of a UNet whose frames share attentions, with the part that those would compute anew.

    The signal depends on the picture alone, so each attention's two convolutions are here, not in the UNet: run once a
    picture, not once a step.

    height, width: pixels.

    Input: image (1, 3, height, width) fp16 in [-1, 1], over grey where it was transparent.

    Outputs, for every attention of the UNet `NAME_control` (frames, C, h, w) fp32: inputs of the UNet by these names.
    """
    w = Scope(weights, "split", "channels_first")

    def control(image: Var) -> dict[str, Var]:
        x, signals = image, []
        for block in range(max(signal for _, _, signal in config.units) + 1):
            place = w / f"blocks_{block}"
            if block:
                x = mb.silu(x=conv(place / 0, x, config.widths[-1], stride=2), name=(place / 0).op("silu"))
                x = conv(place / 2, x, config.widths[-1])
            else:
                x = _convolutions(place, x, config.widths)
            x = mb.silu(x=x, name=place.op("signal"))
            signals.append(x)
        return {
            control_name(unit): _frames(w / unit / "control_convs", signals[signal], channels, config.frames)
            for unit, channels, signal in config.units
        }

    return build({"image": ((1, 3, height, width), np.float16)}, control)


def _frames(w: Scope, signal: Var, channels: int, frames: int) -> Var:
    """Two convolutions a frame: (1, C', h, w) -> (frames, channels, h, w)."""
    results = []
    for frame in range(frames):
        x = mb.silu(x=conv(w / frame / 0, signal, signal.shape[1]), name=(w / frame).op("silu"))
        results.append(conv(w / frame / 2, x, channels, kernel=1))
    return mb.concat(values=results, axis=0, name=w.op())
