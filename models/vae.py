"""The VAE, both ways: pictures (1, 3, H, W) in [-1, 1] -> moments of latents, latents -> pictures.

Its one attention has a single head over every cell of the latent, between two resnets at the lowest resolution.
"""

from __future__ import annotations

import numpy as np

from glassine.errors import ConversionError
from glassine.models import mil as mb
from glassine.models.attention import attention as attend
from glassine.models.attention import to_image, to_tokens
from glassine.models.config import Attention, Layout, VAEConfig
from glassine.models.layers import Scope, Var, Weights, build, conv, group_norm, resnet, upsample
from glassine.models.mil import Program

VAEDtype = type[np.float16] | type[np.float32]
EPS = 1e-6  # of every GroupNorm of the VAE


def vae_encoder(
    config: VAEConfig,
    weights: Weights,
    *,
    batch: int = 1,
    height: int = 512,
    width: int = 512,
    attention: Attention = "split",
    layout: Layout = "channels_first",
    dtype: VAEDtype = np.float16,
) -> Program:
    """Write the encoder as a program.

    height, width: pixels, multiples of 8 (`config.downscale`). dtype: see `vae_decoder`.

    Input: x (B, 3, height, width) `dtype` in [-1, 1].

    Output: latent (B, 2*latent_channels, height/8, width/8) fp32: the mean, then the logarithm of the variance; neither
    sampled nor scaled.

    Raises:
        ConversionError: a size is not a whole number of latent cells.
    """
    if height % config.downscale or width % config.downscale:
        raise ConversionError(
            f"VAE encoder: {width}x{height} pixels; expected multiples of {config.downscale}, the size of a latent cell"
        )
    root = Scope(weights, attention, layout, dtype=dtype)

    def encode(x: Var) -> dict[str, Var]:
        w = root / "encoder"
        x = conv(w / "conv_in", x, config.channels[0])
        for level, channels in enumerate(config.channels):
            block = w / "down_blocks" / level
            for i in range(config.layers):
                x = resnet(block / "resnets" / i, x, channels, groups=config.norm_groups, eps=EPS)
            if level < len(config.channels) - 1:
                x = _downsample(block / "downsamplers.0", x)
        x = _out(w, _middle(w / "mid_block", x, config.norm_groups), config.norm_groups, 2 * config.latent_channels)
        return {"latent": conv(root / "quant_conv", x, 2 * config.latent_channels, kernel=1)}

    return build({"x": ((batch, 3, height, width), dtype)}, encode, attention=attention)


def vae_decoder(
    config: VAEConfig,
    weights: Weights,
    *,
    batch: int = 1,
    height: int = 64,
    width: int = 64,
    attention: Attention = "split",
    layout: Layout = "channels_first",
    dtype: VAEDtype = np.float16,
) -> Program:
    """Write the decoder as a program.

    height, width: latent cells. dtype: of weights, arithmetic and input; SDXL's own VAE overflows fp16.

    Input: z (B, latent_channels, height, width) `dtype`, already divided by the family's latent scale.

    Output: image (B, 3, 8*height, 8*width) fp32, nominally in [-1, 1], not clipped.
    """
    root = Scope(weights, attention, layout, dtype=dtype)

    def decode(z: Var) -> dict[str, Var]:
        w = root / "decoder"
        x = conv(root / "post_quant_conv", z, config.latent_channels, kernel=1)
        x = conv(w / "conv_in", x, config.channels[-1])
        x = _middle(w / "mid_block", x, config.norm_groups)
        for level, channels in enumerate(reversed(config.channels)):
            block = w / "up_blocks" / level
            for i in range(config.layers + 1):
                x = resnet(block / "resnets" / i, x, channels, groups=config.norm_groups, eps=EPS)
            if level < len(config.channels) - 1:
                x = upsample(block / "upsamplers.0", x, height=2 * x.shape[2], width=2 * x.shape[3])
        return {"image": _out(w, x, config.norm_groups, 3)}

    return build({"z": ((batch, config.latent_channels, height, width), dtype)}, decode, attention=attention)


def _downsample(w: Scope, x: Var) -> Var:
    """Halve the size with a convolution that sees one row and column of zeros at the bottom and right alone."""
    channels = x.shape[1]
    x = mb.pad(x=x, pad=[0, 0, 0, 0, 0, 1, 0, 1], mode="constant", constant_val=w.dtype(0), name=w.op("pad"))
    w = w / "conv"
    return mb.conv(
        x=x,
        weight=w("weight", (channels, channels, 3, 3)),
        bias=w("bias", (channels,)),
        strides=[2, 2],
        pad_type="valid",
        name=w.op(),
    )


def _middle(w: Scope, x: Var, groups: int) -> Var:
    channels = x.shape[1]
    x = resnet(w / "resnets.0", x, channels, groups=groups, eps=EPS)
    x = _attention(w / "attentions.0", x, groups)
    return resnet(w / "resnets.1", x, channels, groups=groups, eps=EPS)


def _attention(w: Scope, x: Var, groups: int) -> Var:
    """Self-attention with one head over all cells, added to its input."""
    image, (batch, channels, height, width) = x, x.shape
    x = group_norm(w / "group_norm", x, groups, eps=EPS, flat=not w.channels_first)
    if w.channels_first:
        tokens = to_tokens(w, x)
        x = to_image(w, attend(w, tokens, tokens, heads=1, bias=True), height=height, width=width)
    else:
        tokens = mb.transpose(x=x, perm=[0, 2, 1], name=w.op("tokens"))
        x = mb.transpose(x=attend(w, tokens, tokens, heads=1, bias=True), perm=[0, 2, 1])
        x = mb.reshape(x=x, shape=(batch, channels, height, width), name=w.op("image"))
    return mb.add(x=x, y=image, name=w.op())


def _out(w: Scope, x: Var, groups: int, channels: int) -> Var:
    x = mb.silu(x=group_norm(w / "conv_norm_out", x, groups, eps=EPS), name=w.op("silu"))
    return conv(w / "conv_out", x, channels)
