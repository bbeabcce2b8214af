"""T2I-Adapters: a picture that says where things go -> features to add on a UNet's way down. Run once a picture.

The data's way: blocks of pixels become channels -> level by level, convolutions with skips; every level is a feature.
"""

from __future__ import annotations

import numpy as np

from glassine.models import mil as mb
from glassine.models.config import AdapterConfig
from glassine.models.layers import Inputs, Scope, Var, Weights, build, conv
from glassine.models.mil import Program


def adapter(config: AdapterConfig, weights: Weights, *, height: int = 64, width: int = 64) -> Program:
    """Write the adapter as a program; sizes are static.

    height, width: latent cells; 8 times that are multiples of `shrink`.

    Input: controlnet_cond (1, hint_channels, 8 height, 8 width) fp16, in [0, 1].
    Outputs: adapter_residual_0 ... (1, C, h, w) fp32, as the UNet's `feature_shapes`.
    """
    inputs: Inputs = {"controlnet_cond": ((1, config.hint_channels, 8 * height, 8 * width), np.float16)}
    w = Scope(weights, "split", "channels_first") / "adapter"

    def features(controlnet_cond: Var) -> dict[str, Var]:
        x = mb.pixel_unshuffle(x=controlnet_cond, downscale_factor=np.uint32(config.shrink), name="cells")
        if not config.light:
            x = conv(w / "conv_in", x, config.channels[0])
        found = {}
        for level in range(len(config.channels)):
            x = _level(config, w / "body" / level, level, x)
            found[f"adapter_residual_{level}"] = x
        return found

    return build(inputs, features)


def _level(config: AdapterConfig, w: Scope, level: int, x: Var) -> Var:
    """Halve the size where this level does, then come to its channels."""
    channels = config.channels[level]
    if config.halved[level]:
        x = mb.avg_pool(
            x=x,
            kernel_sizes=[2, 2],
            strides=[2, 2],
            pad_type="valid",
            exclude_padding_from_average=True,
            ceil_mode=True,
            name=w.op("halved"),
        )
    inner = channels // 4 if config.light else channels
    if config.light or x.shape[1] != inner:
        x = conv(w / "in_conv", x, inner, kernel=1)
    for i in range(config.layers):
        block = w / "resnets" / i
        h = mb.relu(x=conv(block / "block1", x, inner), name=block.op("relu"))
        x = mb.add(x=conv(block / "block2", h, inner, kernel=3 if config.light else 1), y=x, name=block.op())
    return conv(w / "out_conv", x, channels, kernel=1) if config.light else x
