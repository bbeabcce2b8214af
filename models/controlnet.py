"""ControlNets: noisy latents, a time, a text and a picture that says where things go -> what to add to a UNet's skips.

The data's way: the hint, eight times the latents' size, becomes a picture of theirs -> added behind the first
convolution -> the UNet's own way down and middle -> one 1x1 convolution for every result.

A ControlNet++ takes several hints at once, of several kinds. What becomes of each before the sum depends on neither the
latents nor the time, so that is a program of its own, `union_hint`, which runs once a hint and picture.
"""

from __future__ import annotations

import numpy as np

from glassine.models import mil as mb
from glassine.models.config import Attention, ControlNetConfig, Layout
from glassine.models.layers import (
    Inputs,
    Scope,
    Var,
    Weights,
    as_image,
    build,
    conv,
    dense,
    embedding_mlp,
    layer_norm,
    sinusoid,
)
from glassine.models.mil import Program
from glassine.models.unet import TIME_IDS_WIDTH, UNet


def controlnet(
    config: ControlNetConfig,
    weights: Weights,
    *,
    batch: int = 2,
    height: int = 64,
    width: int = 64,
    tokens: int = 77,
    attention: Attention = "split",
    layout: Layout = "channels_first",
) -> Program:
    """Write the ControlNet as a program; sizes are static.

    height, width: latent cells (pixels / 8). tokens: 77 for each chunk of the prompt.

    Inputs, with Apple's names and shapes: sample, timestep, encoder_hidden_states, time_ids and text_embeds as the
    UNet's (the text is absent where no step has a transformer), and
        controlnet_cond (B, hint_channels, 8 height, 8 width) fp16, in [0, 1];
        ControlNet++: fused_hint (B, C, height, width) fp16 in its place, the sum of what `union_hint` made of every
        hint, and control_type (B, control_types) fp32, 1 at the kinds of the hints and 0 elsewhere.

    Outputs: additional_residual_0 ... (B, C, h, w) fp32, shaped as `skip_shapes`, the last one for the middle.
    """
    half = config.unet
    inputs: Inputs = {
        "sample": ((batch, half.in_channels, height, width), np.float16),
        "timestep": ((batch,), np.float32),
    }
    if config.control_types is None:
        inputs["controlnet_cond"] = (_hint_shape(config, batch, height, width), np.float16)
    else:
        inputs["fused_hint"] = ((batch, half.channels[0], height, width), np.float16)
        inputs["control_type"] = ((batch, config.control_types), np.float32)
    if half.mid_depth or any(map(any, half.down_depths)):
        inputs["encoder_hidden_states"] = ((batch, half.context_dim, 1, tokens), np.float16)
    if half.time_ids is not None and half.pooled_dim is not None:
        inputs["time_ids"] = ((batch, half.time_ids), np.float32)
        inputs["text_embeds"] = ((batch, half.pooled_dim), np.float16)
    w = Scope(weights, attention, layout)

    def residuals(
        sample: Var,
        timestep: Var,
        controlnet_cond: Var | None = None,
        fused_hint: Var | None = None,
        encoder_hidden_states: Var | None = None,
        control_type: Var | None = None,
        **embeddings: Var,
    ) -> dict[str, Var]:
        net = UNet(half, w)
        embedded = net.embed(timestep, **embeddings)
        x = conv(w / "conv_in", sample, half.channels[0])
        hint = fused_hint
        if controlnet_cond is not None:
            hint = _hint(config, w / "controlnet_cond_embedding", controlnet_cond)
        if control_type is not None:
            embedded = mb.add(x=embedded, y=_embedded_type(w / "control_add_embedding", control_type, half.channels[0]))
        given = net.given(embedded, encoder_hidden_states)
        kept = net.down(mb.add(x=x, y=hint, name="hinted"), given)
        middle = net.middle(kept[-1], given)
        places = [*(w / "controlnet_down_blocks" / i for i in range(len(kept))), w / "controlnet_mid_block"]
        return {
            f"additional_residual_{i}": _residual(config, place, result)
            for i, (place, result) in enumerate(zip(places, [*kept, middle], strict=True))
        }

    return build(inputs, residuals, attention=attention)


def union_hint(
    config: ControlNetConfig,
    weights: Weights,
    *,
    height: int = 128,
    width: int = 128,
    attention: Attention = "split",
    layout: Layout = "channels_first",
) -> Program:
    """Write what a ControlNet++ makes of one hint as a program.

    Inputs: controlnet_cond (1, hint_channels, 8 height, 8 width) fp16, in [0, 1]; control_type (1, control_types) fp32,
        1 at its kind; control_weight (1,) fp32: 1, or what it counts among several.

    Output: fused_hint (1, C, height, width) fp32.
    """
    assert config.control_types is not None
    inputs: Inputs = {
        "controlnet_cond": (_hint_shape(config, 1, height, width), np.float16),
        "control_type": ((1, config.control_types), np.float32),
        "control_weight": ((1,), np.float32),
    }
    w = Scope(weights, attention, layout)

    def fuse(controlnet_cond: Var, control_type: Var, control_weight: Var) -> dict[str, Var]:
        hint = _hint(config, w / "controlnet_cond_embedding", controlnet_cond)
        weight = mb.reshape(x=mb.cast(x=control_weight, dtype="fp16"), shape=(1, 1, 1, 1), name="weight")
        seen = mb.add(x=hint, y=_fused(config, w, hint, control_type, weight), name="seen")
        return {"fused_hint": mb.cast(x=mb.mul(x=seen, y=weight, name="weighted"), dtype="fp32", name="fused")}

    return build(inputs, fuse, attention=attention)


def _hint_shape(config: ControlNetConfig, batch: int, height: int, width: int) -> tuple[int, ...]:
    scale = 2 ** (len(config.hint_widths) - 1)
    return batch, config.hint_channels, scale * height, scale * width


def _hint(config: ControlNetConfig, w: Scope, x: Var) -> Var:
    """Encode the hint: (B, hint_channels, 8h, 8w) -> (B, C, h, w)."""
    x = mb.silu(x=conv(w / "conv_in", x, config.hint_widths[0]))
    for i, channels in enumerate(config.hint_widths[1:]):
        x = mb.silu(x=conv(w / "blocks" / (2 * i), x, x.shape[1]))
        x = mb.silu(x=conv(w / "blocks" / (2 * i + 1), x, channels, stride=2))
    return conv(w / "conv_out", x, config.unet.channels[0])


def _residual(config: ControlNetConfig, w: Scope, x: Var) -> Var:
    """One result for the UNet; pooled ones are one vector, repeated over the picture so that shapes stay."""
    if not config.pooled:
        return conv(w, x, x.shape[1], kernel=1)
    # The mean goes through the 1x1 convolution as each of its pixels would.
    vector = conv(w, _mean(x), x.shape[1], kernel=1)
    return mb.add(x=mb.mul(x=x, y=np.float16(0), name=w.op("place")), y=vector, name=w.op("everywhere"))


def _mean(x: Var) -> Var:
    """(B, C, h, w) -> (B, C, 1, 1), axis by axis, so that even sums kept in fp16 stay finite."""
    return mb.reduce_mean(x=mb.reduce_mean(x=x, axes=[3], keep_dims=True), axes=[2], keep_dims=True)


def _embedded_type(w: Scope, control_type: Var, channels: int) -> Var:
    """What kind of hint it is, as a vector beside the time's: a sinusoid of each 0 or 1, as of a number."""
    batch, types = control_type.shape
    x = sinusoid(mb.reshape(x=control_type, shape=(batch * types,)), TIME_IDS_WIDTH, name="control_type_sinusoid")
    return embedding_mlp(w, mb.reshape(x=x, shape=(batch, types * TIME_IDS_WIDTH)), 4 * channels)


def _fused(config: ControlNetConfig, w: Scope, hint: Var, control_type: Var, weight: Var) -> Var:
    """What a ControlNet++ adds to its hint everywhere, (1, C, 1, 1): a transformer's view of the hint's mean and kind.

    Its attention was built to look from row to row of a batch (PyTorch's default order of axes), not from hint to hint
    or to the latents, and rows that are drawn together have the same hints: the softmax then averages equal values,
    whatever queries and keys say. So each hint sees itself alone.
    """
    channels, types = hint.shape[1], control_type.shape[1]
    kind = mb.matmul(x=mb.cast(x=control_type, dtype="fp16"), y=w("task_embedding", (types, channels)), name="task")
    x = mb.mul(x=mb.add(x=_mean(hint), y=mb.expand_dims(x=kind, axes=[2, 3])), y=weight, name="task_weighted")
    axis = 1
    if not w.channels_first:
        axis, x = -1, mb.squeeze(x=x, axes=[2, 3])
    for i in range(config.fusion_layers):
        layer = w / "transformer_layes" / i  # so it is spelt in the files
        value = dense(layer / "attn.to_v", layer_norm(layer / "ln_1", x, axis=axis), channels)
        x = mb.add(x=x, y=dense(layer / "attn.to_out.0", value, channels))
        h = dense(layer / "mlp.c_fc", layer_norm(layer / "ln_2", x, axis=axis), 4 * channels)
        h = mb.mul(x=h, y=mb.sigmoid(x=mb.mul(x=h, y=np.float16(1.702))), name=layer.op("quick_gelu"))
        x = mb.add(x=x, y=dense(layer / "mlp.c_proj", h, channels))
    return as_image(dense(w / "spatial_ch_projs", x, channels))
