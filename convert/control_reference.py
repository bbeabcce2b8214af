"""What control networks mean, in plain PyTorch float32 on the source's own weights: see `reference.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.convert.reference import Ways, Weights, conv, dense, embedding, layer_norm, mlp, sinusoid
from glassine.convert.weights import WeightSource
from glassine.models.config import AdapterConfig, ControlNetConfig


def controlnet(config: ControlNetConfig, source: WeightSource, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What to add to the UNet's skips and its middle, by the names of the package's outputs.

    Args:
        inputs: as the package has them.
    """
    w = Weights(source)
    temb = embedding(config.unet, w, inputs)
    if "control_type" in inputs:
        kinds, hint = inputs["control_type"], inputs["fused_hint"]
        temb = temb + mlp(w / "control_add_embedding", sinusoid(kinds.flatten(), 256).reshape(len(kinds), -1))
    else:
        hint = _hint(w / "controlnet_cond_embedding", inputs["controlnet_cond"])
    text = inputs.get("encoder_hidden_states")
    context = torch.empty(0) if text is None else text[:, :, 0].transpose(1, 2)
    ways = Ways(config.unet, w, temb, context)
    kept = ways.down(conv(w / "conv_in", inputs["sample"]) + hint)
    results = [conv(w / "controlnet_down_blocks" / i, x) for i, x in enumerate(kept)]
    results.append(conv(w / "controlnet_mid_block", ways.middle(kept[-1])))
    if config.pooled:
        results = [x.mean(dim=(2, 3), keepdim=True).expand_as(x) for x in results]
    return {f"additional_residual_{i}": x for i, x in enumerate(results)}


def _hint(w: Weights, x: Tensor) -> Tensor:
    """Encode the hint: every second convolution halves the picture."""
    x = F.silu(conv(w / "conv_in", x))
    index = 0
    while f"blocks.{index}.weight" in w:
        x = F.silu(conv(w / "blocks" / index, x, stride=1 + index % 2))
        index += 1
    return conv(w / "conv_out", x)


def union_hint(source: WeightSource, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a ControlNet++ makes of one hint of its kind and weight: its small transformer sees each hint alone."""
    w, weight = Weights(source), inputs["control_weight"]
    hint = _hint(w / "controlnet_cond_embedding", inputs["controlnet_cond"])
    x = weight * (hint.mean(dim=(2, 3)) + inputs["control_type"] @ w("task_embedding"))
    index = 0
    while f"transformer_layes.{index}.ln_1.weight" in w:
        layer = w / "transformer_layes" / index
        x = x + dense(layer / "attn" / "to_out" / 0, dense(layer / "attn" / "to_v", layer_norm(layer / "ln_1", x)))
        y = dense(layer / "mlp" / "c_fc", layer_norm(layer / "ln_2", x))
        x = x + dense(layer / "mlp" / "c_proj", y * torch.sigmoid(1.702 * y))
        index += 1
    return {"fused_hint": weight * (hint + dense(w / "spatial_ch_projs", x)[:, :, None, None])}


def adapter(config: AdapterConfig, source: WeightSource, hint: Tensor) -> dict[str, Tensor]:
    """The features of a hint (1, channels, 8h, 8w), by the names of the package's outputs."""
    w = Weights(source) / "adapter"
    x = F.pixel_unshuffle(hint, config.shrink)
    if "conv_in.weight" in w:
        x = conv(w / "conv_in", x)
    features = {}
    for level, halved in enumerate(config.halved):
        block = w / "body" / level
        if halved:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        if "in_conv.weight" in block:
            x = conv(block / "in_conv", x)
        for index in range(config.layers):
            resnet = block / "resnets" / index
            x = x + conv(resnet / "block2", F.relu(conv(resnet / "block1", x)))
        if "out_conv.weight" in block:
            x = conv(block / "out_conv", x)
        features[f"adapter_residual_{level}"] = x
    return features
