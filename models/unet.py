"""The UNet of every Stable Diffusion family: noisy latents, a time and a text -> what the family predicts.

The data's way: embed the time (and, for SDXL, sizes and pooled text) -> conv_in -> levels down, keeping what each step
made -> the middle -> levels up, reading what was kept -> conv_out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from glassine.models import mil as mb
from glassine.models.attention import Attend, attention, to_image, to_tokens, transformer_block
from glassine.models.collage import MASKS, MASKS_A_LAYER, TABLE, LayerBias, biased_attention, mask_sizes
from glassine.models.config import Attention, Layout, UNetConfig
from glassine.models.layers import (
    Inputs,
    Scope,
    Var,
    Weights,
    build,
    conv,
    dense,
    embedding_mlp,
    group_norm,
    resnet,
    sinusoid,
    upsample,
)
from glassine.models.mil import Program
from glassine.models.sharing import Frames, attention_units, control_name, shared_attention

TIME_IDS_WIDTH = 256  # each number of SDXL's micro-conditioning becomes a sinusoid of this width


def unet(
    config: UNetConfig,
    weights: Weights,
    *,
    batch: int = 2,
    height: int = 64,
    width: int = 64,
    tokens: int = 77,
    attention: Attention = "split",
    layout: Layout = "channels_first",
) -> Program:
    """Write the UNet as a program; sizes are static.

    height, width: latent cells (pixels / 8), any size. tokens: 77 for each chunk of the prompt.

    Inputs, with Apple's names and shapes:
        sample (B, in_channels, height, width) fp16.
        timestep (B,) fp32: Apple declares fp16, which holds no fraction of t above 512 and rounds the sinusoid's angle.
        encoder_hidden_states (B, context_dim, 1, tokens) fp16.
        SDXL: time_ids (B, 6 or 5) fp32, for the same reason, and text_embeds (B, pooled_dim) fp16.
        LCM: timestep_cond (B, timestep_cond_dim) fp16, the guidance embedding.
        Controlled: additional_residual_0 ... (B, C, h, w) fp32, as `skip_shapes`, the last one for the middle.
        Adapted: adapter_residual_0 ... (B, C, h, w) fp32, see `feature_shapes`.
        Conditioned: condition (B, condition_channels, height, width) fp16, clean latents; `sample` is 4 channels then.
        Collage: collage_masks_LEVEL (B, 2 x layers, h, w) fp16 for every level that reads text, and collage_table
            (B, tokens, 1, 2 x layers) fp16, see `collage.py`.
        Frames: B is samples x frames; where a picture is given, `control_name` of every attention (frames, C, h, w).

    Output: noise_pred (B, out_channels, height, width) fp32.
    """
    inputs: Inputs = {
        "sample": ((batch, config.in_channels - config.condition_channels, height, width), np.float16),
        "timestep": ((batch,), np.float32),
        "encoder_hidden_states": ((batch, config.context_dim, 1, tokens), np.float16),
    }
    if config.condition_channels:
        inputs["condition"] = ((batch, config.condition_channels, height, width), np.float16)
    if config.time_ids is not None and config.pooled_dim is not None:
        inputs["time_ids"] = ((batch, config.time_ids), np.float32)
        inputs["text_embeds"] = ((batch, config.pooled_dim), np.float16)
    if config.timestep_cond_dim is not None:
        inputs["timestep_cond"] = ((batch, config.timestep_cond_dim), np.float16)
    if config.collage:
        count = MASKS_A_LAYER * config.collage
        for level, cells in mask_sizes(config, height, width).items():
            inputs[f"{MASKS}{level}"] = ((batch, count, *cells), np.float16)
        inputs[TABLE] = ((batch, tokens, 1, count), np.float16)
    inputs |= _steering_inputs(config, batch, height, width)
    net = UNet(config, Scope(weights, attention, layout))
    return build(inputs, net.predict, attention=attention)


def _steering_inputs(config: UNetConfig, batch: int, height: int, width: int) -> Inputs:
    """What control networks and adapters add; fp32, as they give it, so that a host sums without a cast."""
    inputs: Inputs = {}
    if config.residuals:
        shapes = skip_shapes(config, height, width)
        for i, shape in enumerate([*shapes, shapes[-1]]):
            inputs[f"additional_residual_{i}"] = ((batch, *shape), np.float32)
    for i, shape in enumerate(feature_shapes(config, height, width)):
        inputs[f"adapter_residual_{i}"] = ((batch, *shape), np.float32)
    if config.frame_control:
        sizes = [(height, width)]
        for _ in config.channels[1:]:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        for unit, channels, level in attention_units(config):
            inputs[control_name(unit)] = ((config.frames, channels, *sizes[level]), np.float32)
    return inputs


def skip_shapes(config: UNetConfig, height: int, width: int) -> list[tuple[int, int, int]]:
    """(channels, rows, columns) of everything the way down keeps for the way up; the middle is like the last."""
    shapes = [(config.channels[0], height, width)]
    for level, channels in enumerate(config.channels):
        shapes += [(channels, height, width)] * config.layers
        if level < len(config.channels) - 1:
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((channels, height, width))
    return shapes


def feature_shapes(config: UNetConfig, height: int, width: int) -> list[tuple[int, int, int]]:
    """(channels, rows, columns) of the features that adapters add: one a level, then the middle.

    A level with attention takes its feature before it halves the size, one without behind that.
    """
    shapes = []
    for level, channels in enumerate(config.channels):
        halved = (-(-height // 2), -(-width // 2)) if level < len(config.channels) - 1 else (height, width)
        shapes.append((channels, height, width) if any(config.down_depths[level]) else (channels, *halved))
        height, width = halved
    return [*shapes, (config.channels[-1], height, width)][: config.features]


@dataclass(frozen=True, slots=True)
class Given:
    """What every step reads besides its picture: the embedded time, after SiLU, and the text as tokens.

    context: None where no step has a transformer. attend: how its blocks do.
    """

    temb: Var
    context: Var | None
    attend: Attend = attention


@dataclass(frozen=True, slots=True)
class UNet:
    """The steps of one UNet; `w` is its root. A ControlNet takes those of the way down and the middle."""

    config: UNetConfig
    w: Scope

    def predict(self, sample: Var, timestep: Var, encoder_hidden_states: Var, **embeddings: Var) -> dict[str, Var]:
        """Append the network to the program being built."""
        steering = {name: embeddings.pop(name) for name in list(embeddings) if "_residual_" in name}
        residuals, features = (
            [mb.cast(x=x, dtype="fp16") for name, x in steering.items() if name.startswith(kind)]
            for kind in ("additional_", "adapter_")
        )
        if self.config.condition_channels:
            sample = mb.concat(values=(sample, embeddings.pop("condition")), axis=1, name="conditioned")
        control = {name: embeddings.pop(name) for name in list(embeddings) if name.endswith("_control")}
        table = embeddings.pop(TABLE, None)
        masks = [embeddings.pop(name) for name in list(embeddings) if name.startswith(MASKS)]
        given = self.given(self.embed(timestep, **embeddings), encoder_hidden_states)
        if table is not None:
            bias = LayerBias({mask.shape[2] * mask.shape[3]: mask for mask in masks}, table)
            given = replace(given, attend=partial(biased_attention, bias=bias))
        if self.config.frames:
            given = replace(given, attend=partial(shared_attention, frames=Frames(self.config.frames, control)))
        kept = self.down(conv(self.w / "conv_in", sample, self.config.channels[0]), given, features)
        x = self.middle(kept[-1], given)
        if len(features) > len(self.config.channels):
            x = mb.add(x=x, y=features[-1], name="adapted_middle")
        if residuals:
            *down, middle = residuals
            kept = [mb.add(x=x, y=y, name=f"controlled_{i}") for i, (x, y) in enumerate(zip(kept, down, strict=True))]
            x = mb.add(x=x, y=middle, name="controlled_middle")
        x = self._up(x, kept, given)
        x = group_norm(self.w / "conv_norm_out", x, self.config.norm_groups, eps=1e-5)
        return {"noise_pred": conv(self.w / "conv_out", mb.silu(x=x), self.config.out_channels)}

    def given(self, embedded: Var, encoder_hidden_states: Var | None) -> Given:
        """What the steps read, of `embed` and the text in Apple's layout."""
        context = encoder_hidden_states
        if context is not None and not self.w.channels_first:
            context = mb.transpose(x=mb.squeeze(x=context, axes=[2]), perm=[0, 2, 1], name="context")
        return Given(mb.silu(x=embedded, name="temb_silu"), context)

    def embed(
        self,
        timestep: Var,
        time_ids: Var | None = None,
        text_embeds: Var | None = None,
        timestep_cond: Var | None = None,
    ) -> Var:
        """Everything that is not a place in the picture, as one vector a sample."""
        config, w = self.config, self.w
        x = sinusoid(timestep, config.channels[0], name="timestep_sinusoid")
        if timestep_cond is not None:
            # The guidance embedding shifts the sinusoid; both are (B, C) here, the layout begins with the dense layers.
            flat = Scope(w.weights, w.attention, "channels_last", w.path) / "time_embedding.cond_proj"
            x = mb.add(x=x, y=dense(flat, timestep_cond, config.channels[0], bias=False))
        temb = embedding_mlp(w / "time_embedding", x, 4 * config.channels[0])
        if time_ids is None:
            return temb
        batch, numbers = time_ids.shape
        x = sinusoid(mb.reshape(x=time_ids, shape=(batch * numbers,)), TIME_IDS_WIDTH, name="time_ids_sinusoid")
        x = mb.reshape(x=x, shape=(batch, numbers * TIME_IDS_WIDTH))
        x = mb.concat(values=(text_embeds, x), axis=-1, name="micro_conditioning")
        return mb.add(x=temb, y=embedding_mlp(w / "add_embedding", x, 4 * config.channels[0]))

    def down(self, x: Var, given: Given, features: Sequence[Var] = ()) -> list[Var]:
        """Halve the size level by level; return the result of every step, the last one being the deepest.

        features: what adapters add, see `feature_shapes`; unlike a ControlNet's residuals the way down reads them too.
        """
        config = self.config

        def adapted(x: Var, level: int) -> Var:
            return mb.add(x=x, y=features[level], name=f"adapted_{level}") if level < len(features) else x

        kept = [x]
        for level, channels in enumerate(config.channels):
            w = self.w / "down_blocks" / level
            attends, heads = any(config.down_depths[level]), config.heads[level]
            for i, depth in enumerate(config.down_depths[level]):
                x = self._step(w, i, x, given, channels=channels, depth=depth, heads=heads)
                if level in config.projected_levels:
                    x = self._transformer(w / "attentions" / i, x, given, depth, heads)
                kept.append(x)
            if attends:
                x = kept[-1] = adapted(x, level)
            if level < len(config.channels) - 1:
                x = conv(w / "downsamplers.0.conv", x, channels, stride=2)
                kept.append(x)
            if not attends:
                x = kept[-1] = adapted(x, level)
        return kept

    def middle(self, x: Var, given: Given) -> Var:
        """Two resnets with a transformer between them; in pruned models one of them, or nothing."""
        config, w = self.config, self.w / "mid_block"
        if config.mid_depth is None:
            return x
        channels, heads = config.channels[-1], config.heads[-1]
        x = self._step(w, 0, x, given, channels=channels, depth=config.mid_depth, heads=heads)
        if config.mid_resnets == 1:
            return x
        return self._step(w, 1, x, given, channels=channels, depth=0, heads=heads)

    def _up(self, x: Var, kept: list[Var], given: Given) -> Var:
        """Double the size level by level, each step beside what the way down kept."""
        config, kept = self.config, list(kept)
        for level, channels in enumerate(reversed(config.channels)):
            w = self.w / "up_blocks" / level
            for i, depth in enumerate(config.up_depths[level]):
                x = mb.concat(values=(x, kept.pop()), axis=1, name=(w / "resnets" / i).op("concat"))
                x = self._step(w, i, x, given, channels=channels, depth=depth, heads=config.heads[-1 - level])
            if kept:
                x = upsample(w / "upsamplers.0", x, height=kept[-1].shape[2], width=kept[-1].shape[3])
        return x

    def _step(self, w: Scope, i: int, x: Var, given: Given, *, channels: int, depth: int, heads: int) -> Var:
        """One resnet and, where `depth` is not 0, one transformer of that many blocks."""
        x = resnet(w / "resnets" / i, x, channels, groups=self.config.norm_groups, eps=1e-5, temb=given.temb)
        return self._transformer(w / "attentions" / i, x, given, depth, heads) if depth else x

    def _transformer(self, w: Scope, x: Var, given: Given, depth: int, heads: int) -> Var:
        """Look around in the picture and at the text: `depth` blocks between two projections, added to the input."""
        image, (height, width) = x, x.shape[2:]
        channels = image.shape[1]
        x = group_norm(w / "norm", x, self.config.norm_groups, eps=1e-6)
        # The projections are linear or 1x1 convolutions by family: the same weights, before or after the reshape.
        if self.config.linear_projection or w.channels_first:
            x = dense(w / "proj_in", to_tokens(w, x), channels)
        else:
            x = to_tokens(w, conv(w / "proj_in", x, channels, kernel=1))
        for i in range(depth):
            x = transformer_block(w / "transformer_blocks" / i, x, given.context, heads=heads, attend=given.attend)
        if self.config.linear_projection or w.channels_first:
            x = to_image(w, dense(w / "proj_out", x, channels), height=height, width=width)
        else:
            x = conv(w / "proj_out", to_image(w, x, height=height, width=width), channels, kernel=1)
        return mb.add(x=x, y=image, name=w.op())
