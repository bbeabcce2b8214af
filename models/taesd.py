"""TAESD's decoder (Ollin Boer Bohan, MIT): a picture from latents far faster than the VAE, for previews."""

from __future__ import annotations

import numpy as np

from glassine.models import mil as mb
from glassine.models.config import TinyDecoderConfig
from glassine.models.layers import Scope, Var, Weights, build, conv
from glassine.models.mil import Program


def taesd_decoder(
    config: TinyDecoderConfig, weights: Weights, *, batch: int = 1, height: int = 64, width: int = 64
) -> Program:
    """Write the decoder as a program.

    height, width: latent cells.

    Input: z (B, latent_channels, height, width) fp16: latents as they are denoised, not divided by the latent scale.

    Output: image (B, 3, 8*height, 8*width) fp32, around [-1, 1].
    """
    root = Scope(weights, "einsum", "channels_first")

    def decode(z: Var) -> dict[str, Var]:
        layers = root / "decoder.layers"
        x = mb.mul(x=mb.tanh(x=mb.mul(x=z, y=np.float16(1 / 3)), name="clamped"), y=np.float16(3.0), name="z_clamped")
        x = mb.relu(x=conv(layers / 0, x, config.channels), name="first")
        index = 2
        for level, blocks in enumerate(config.blocks):
            for _ in range(blocks):
                x = _block(layers / index, x)
                index += 1
            if level == len(config.blocks) - 1:
                x = conv(layers / index, x, 3)
            else:
                x = _double(layers / (index + 1), x)
                index += 2
        return {"image": mb.sub(x=mb.mul(x=x, y=np.float16(2.0), name="twice"), y=np.float16(1.0), name="picture")}

    return build({"z": ((batch, config.latent_channels, height, width), np.float16)}, decode)


def _block(w: Scope, x: Var) -> Var:
    """Three convolutions with a skip around them."""
    h = x
    for i in (0, 2, 4):
        h = conv(w / "conv" / i, h, x.shape[1])
        h = mb.relu(x=h, name=w.op(f"relu{i}")) if i < 4 else h
    return mb.relu(x=mb.add(x=h, y=x, name=w.op("sum")), name=w.op())


def _double(w: Scope, x: Var) -> Var:
    """Every cell four times, and a convolution without bias."""
    x = mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2, name=w.op("double"))
    weight = w("weight", (x.shape[1], x.shape[1], 3, 3))
    return mb.conv(x=x, weight=weight, pad_type="custom", pad=[1] * 4, name=w.op())
