"""What LayerDiffuse's networks mean, in plain PyTorch float32: the judge of their packages, as `reference.py` is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.convert.reference import Weights, attention, conv, group_norm, resnet
from glassine.convert.weights import WeightSource
from glassine.models.config import FrameControlConfig, TransparentDecoderConfig


def transparent_decoder(
    config: TransparentDecoderConfig, source: WeightSource, pixel: Tensor, latent: Tensor
) -> Tensor:
    """Decode a picture (1, 3, H, W) in [0, 1] and its latent to alpha and colour (1, 4, H, W)."""
    w, groups = Weights(source), config.norm_groups

    def layer(block: Weights, index: int, x: Tensor) -> Tensor:
        x = resnet(block / "resnets" / index, x, groups, 1e-5)
        inner = block / "attentions" / index
        if "to_q.weight" not in inner:
            return x
        tokens = group_norm(inner / "group_norm", x, groups, 1e-5).flatten(2).transpose(1, 2)
        attended = attention(inner, tokens, tokens, x.shape[1] // config.head_dim)
        return x + attended.transpose(1, 2).reshape(x.shape)

    x = conv(w / "conv_in", pixel)
    kept = [x]
    for level in range(len(config.channels)):
        block = w / "down_blocks" / level
        if x.shape[-2:] == latent.shape[-2:]:
            x = x + conv(w / "latent_conv_in", latent)
        for index in range(config.layers):
            x = layer(block, index, x)
            kept.append(x)
        if "downsamplers.0.conv.weight" in block:
            x = conv(block / "downsamplers" / 0 / "conv", x, stride=2)
            kept.append(x)
    x = resnet(w / "mid_block" / "resnets" / 1, layer(w / "mid_block", 0, x), groups, 1e-5)
    for level in range(len(config.channels)):
        block = w / "up_blocks" / level
        for index in range(config.layers + 1):
            x = layer(block, index, torch.cat([x, kept.pop()], dim=1))
        if "upsamplers.0.conv.weight" in block:
            x = conv(block / "upsamplers" / 0 / "conv", F.interpolate(x, scale_factor=2.0))
    return conv(w / "conv_out", F.silu(group_norm(w / "conv_norm_out", x, groups, 1e-5)))


def transparent_encoder(source: WeightSource, argb: Tensor) -> Tensor:
    """Encode alpha and colour (1, 4, H, W) to the offset of a latent."""
    w = Weights(source) / "blocks"
    x = argb
    for place in range(0, 18, 2):
        x = conv(w / place, F.silu(x) if place else x, stride=2 if place in {4, 8, 12} else 1)
    return x


def frame_control(config: FrameControlConfig, source: WeightSource, image: Tensor) -> dict[str, Tensor]:
    """What a picture (1, 3, H, W) in [-1, 1] adds to every attention, by the name of the UNet's input."""
    w, x, signals = Weights(source), image, []
    for block, places in enumerate((range(0, 16, 2), (0, 2), (0, 2), (0, 2))):
        for place in places:
            halves = place in {4, 8, 12} if block == 0 else place == 0
            if f"blocks_{block}.{place}.weight" in w:
                x = F.silu(conv(w / f"blocks_{block}" / place, x, stride=2 if halves else 1))
        signals.append(x)
    return {
        f"{unit.replace('.', '_')}_control": torch.cat(
            [
                conv(place / frame / 2, F.silu(conv(place / frame / 0, signals[signal])))
                for frame in range(config.frames)
            ]
        )
        for unit, _, signal in config.units
        for place in (w / unit / "control_convs",)
    }
