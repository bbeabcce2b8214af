"""What the networks mean, in plain PyTorch float32 on the source's own weights: the judge of a converted package.

Written from the definitions (Ho et al. 2020, Rombach et al. 2022, Radford et al. 2021) and independent of the
descriptions in `models`: it reads the weights by canonical name and the sizes from the weights' shapes where it can.
Every weight is read when it is used and dropped after that, so a reference needs little memory beyond activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.convert.weights import WeightSource
from glassine.models.config import TextEncoderConfig, TinyDecoderConfig, UNetConfig, VAEConfig


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights under a prefix, as float32 tensors: `w / "conv1"` is one level deeper.

    given: the network's inputs, for the few places that have one of their own.
    """

    source: WeightSource
    prefix: str = ""
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __truediv__(self, name: str | int) -> Weights:
        return Weights(self.source, f"{self.prefix}{name}.", self.given)

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.source.shapes

    def __call__(self, name: str) -> Tensor:
        """Read one weight, in the source's shape."""
        key = f"{self.prefix}{name}"
        shape = self.source.shapes[key]
        return torch.from_numpy(self.source.read(key, 0, math.prod(shape)).astype(np.float32)).reshape(shape)

    def bias(self) -> Tensor | None:
        """The bias of this layer, if it has one."""
        return self("bias") if "bias" in self else None


def conv(w: Weights, x: Tensor, stride: int = 1) -> Tensor:
    """Convolve; the padding keeps the size at stride 1."""
    weight = w("weight")
    return F.conv2d(x, weight, w.bias(), stride=stride, padding=weight.shape[-1] // 2)


def dense(w: Weights, x: Tensor) -> Tensor:
    """Apply a linear layer to (B, S, C); its matrix may be stored as a 1x1 convolution."""
    return F.linear(x, w("weight").flatten(1), w.bias())


def group_norm(w: Weights, x: Tensor, groups: int, eps: float) -> Tensor:
    """Normalise over groups of channels and all positions."""
    return F.group_norm(x, groups, w("weight"), w("bias"), eps)


def layer_norm(w: Weights, x: Tensor) -> Tensor:
    """Normalise over the last axis."""
    return F.layer_norm(x, x.shape[-1:], w("weight"), w("bias"), 1e-5)


def resnet(w: Weights, x: Tensor, groups: int, eps: float, temb: Tensor | None = None) -> Tensor:
    """Two convolutions behind GroupNorm and SiLU, the time added in between, around a shortcut."""
    y = conv(w / "conv1", F.silu(group_norm(w / "norm1", x, groups, eps)))
    if temb is not None:
        y = y + dense(w / "time_emb_proj", F.silu(temb))[:, :, None, None]
    y = conv(w / "conv2", F.silu(group_norm(w / "norm2", y, groups, eps)))
    return y + (conv(w / "conv_shortcut", x) if "conv_shortcut.weight" in w else x)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, S, C) -> (B, heads, S, C/heads)."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def attention(w: Weights, x: Tensor, context: Tensor, heads: int) -> Tensor:
    """Multi-head attention of (B, S, C) over `context`."""
    if "temporal.weight" in w or "temporal_o.weight" in w:
        return _shared_attention(w, x, context, heads)
    q = _split(dense(w / "to_q", x), heads)
    k, v = (_split(dense(w / name, context), heads) for name in ("to_k", "to_v"))
    bias = _layer_bias(w, q, k) if "collage_table" in w.given and context is not x else None
    y = F.scaled_dot_product_attention(q, k, v, bias)
    return dense(w / "to_out" / 0, y.transpose(1, 2).flatten(2))


def _layer_bias(w: Weights, q: Tensor, k: Tensor) -> Tensor:
    """What Collage Diffusion adds to the scores of (B, heads, S, d): (B, 1, S, tokens), see models/collage.py."""
    masks = next(
        x.flatten(2)
        for name, x in w.given.items()
        if name.startswith("collage_masks_") and x[0, 0].numel() == q.shape[2]
    )
    wanted = torch.einsum("brq,btr->bqt", masks, w.given["collage_table"][:, :, 0])
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    bias: Tensor = wanted * scores.amax(dim=(1, 2))[:, None]
    return bias[:, None]


def _shared_attention(w: Weights, x: Tensor, context: Tensor, heads: int) -> Tensor:
    """LayerDiffuse's attention over rows (sample, frame): each by its frame's matrices, then over a position's frames.

    Frames' matrices lie one below the other; one frame has an affine map instead of the second attention.
    """
    frames = 1 if "temporal.weight" in w else len(w("to_out.0.bias")) // x.shape[-1]
    control = w.given.get(f"{w.prefix[:-1].replace('.', '_')}_control")
    added = torch.zeros(()) if control is None else control.flatten(2).mT.repeat(len(x) // frames, 1, 1)
    context = x + added if context is x else context
    x = x + added

    def by_frame(name: str, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        matrices = w(f"{name}.weight").chunk(frames)
        biases = [None] * frames if bias is None else list(bias.chunk(frames))
        return torch.stack([F.linear(row, matrices[i % frames], biases[i % frames]) for i, row in enumerate(rows)])

    q, k, v = (
        _split(by_frame(name, rows), heads) for name, rows in (("to_q", x), ("to_k", context), ("to_v", context))
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = by_frame("to_out.0", y, w("to_out.0.bias"))
    if frames == 1:
        return added + y + dense(w / "temporal", F.layer_norm(x + y, x.shape[-1:], eps=1e-6))
    n = w / "temporal_n"
    t = dense(w / "temporal_i", F.layer_norm(x + y, x.shape[-1:], n("weight"), n("bias"), 1e-6))
    # (samples, frames, S, C) -> (samples, S, heads, frames, d)
    q, k, v = (
        dense(w / f"temporal_{letter}", t)
        .reshape(-1, frames, t.shape[1], heads, t.shape[2] // heads)
        .permute(0, 2, 3, 1, 4)
        for letter in "qkv"
    )
    t = F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
    return added + y + dense(w / "temporal_o", t)


def transformer(w: Weights, x: Tensor, context: Tensor, heads: int, groups: int) -> Tensor:
    """Norm, projection, transformer blocks over the pixels, projection, around a shortcut."""
    batch, channels, height, width = x.shape
    y = group_norm(w / "norm", x, groups, 1e-6).flatten(2).transpose(1, 2)
    y = dense(w / "proj_in", y)
    index = 0
    while f"transformer_blocks.{index}.norm1.weight" in w:
        block = w / "transformer_blocks" / index
        own = layer_norm(block / "norm1", y)
        y = y + attention(block / "attn1", own, own, heads)
        y = y + attention(block / "attn2", layer_norm(block / "norm2", y), context, heads)
        value, gate = dense(block / "ff" / "net" / 0 / "proj", layer_norm(block / "norm3", y)).chunk(2, dim=-1)
        y = y + dense(block / "ff" / "net" / 2, value * F.gelu(gate))
        index += 1
    y = dense(w / "proj_out", y)
    return x + y.transpose(1, 2).reshape(batch, channels, height, width)


def sinusoid(x: Tensor, width: int) -> Tensor:
    """Embed (N,) as (N, width): cosines, then sines, of frequencies 1 to 1/10000."""
    half = width // 2
    angles = x[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def mlp(w: Weights, x: Tensor) -> Tensor:
    """Two dense layers with SiLU between."""
    return dense(w / "linear_2", F.silu(dense(w / "linear_1", x)))


def embedding(config: UNetConfig, w: Weights, inputs: Mapping[str, Tensor]) -> Tensor:
    """Time, and where the network reads them LCM's guidance and SDXL's sizes and pooled text, as one vector."""
    x = sinusoid(inputs["timestep"], config.channels[0])
    if "timestep_cond" in inputs:
        x = x + dense(w / "time_embedding" / "cond_proj", inputs["timestep_cond"])
    temb = mlp(w / "time_embedding", x)
    if "time_ids" in inputs:
        sizes = sinusoid(inputs["time_ids"].flatten(), 256).reshape(len(temb), -1)
        temb = temb + mlp(w / "add_embedding", torch.cat([inputs["text_embeds"], sizes], dim=1))
    return temb


@dataclass(frozen=True, slots=True)
class Ways:
    """The steps of a UNet that has embedded its time: down, through the middle, and up."""

    config: UNetConfig
    w: Weights
    temb: Tensor
    context: Tensor

    def layer(self, block: Weights, index: int, x: Tensor, heads: int) -> Tensor:
        """A resnet, and a transformer where there is one."""
        x = resnet(block / "resnets" / index, x, self.config.norm_groups, 1e-5, self.temb)
        if f"attentions.{index}.norm.weight" in block:
            x = transformer(block / "attentions" / index, x, self.context, heads, self.config.norm_groups)
        return x

    def down(self, x: Tensor, features: Sequence[Tensor] = ()) -> list[Tensor]:
        """Everything the way down keeps; `features` are an adapter's, added where T2I-Adapter does."""
        kept = [x]
        for level, heads in enumerate(self.config.heads):
            block = self.w / "down_blocks" / level
            for index in range(self.config.layers):
                x = self.layer(block, index, x, heads)
                kept.append(x)
            feature = features[level] if level < len(features) else None
            attends = "attentions.0.norm.weight" in block
            if feature is not None and attends:
                x = kept[-1] = x + feature
            if "downsamplers.0.conv.weight" in block:
                x = conv(block / "downsamplers" / 0 / "conv", x, stride=2)
                kept.append(x)
            if feature is not None and not attends:
                x = kept[-1] = x + feature
        return kept

    def middle(self, x: Tensor) -> Tensor:
        """One resnet or two, a transformer between them."""
        block = self.w / "mid_block"
        if "resnets.0.norm1.weight" in block:
            x = self.layer(block, 0, x, self.config.heads[-1])
        if "resnets.1.norm1.weight" in block:
            x = resnet(block / "resnets" / 1, x, self.config.norm_groups, 1e-5, self.temb)
        return x

    def up(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        """Back to the latents' size, beside what was kept."""
        for level, heads in enumerate(reversed(self.config.heads)):
            block = self.w / "up_blocks" / level
            for index in range(self.config.layers + 1):
                x = self.layer(block, index, torch.cat([x, kept.pop()], dim=1), heads)
            if "upsamplers.0.conv.weight" in block:
                x = conv(block / "upsamplers" / 0 / "conv", F.interpolate(x, size=kept[-1].shape[-2:]))
        return x


def unet(config: UNetConfig, source: WeightSource, inputs: Mapping[str, Tensor]) -> Tensor:
    """Predict the noise.

    Args:
        inputs: as the package has them: sample (B, channels, h, w), timestep (B,), encoder_hidden_states
            (B, context_dim, 1, tokens), and what else the network reads.
    """
    w = Weights(source, given=inputs)
    context = inputs["encoder_hidden_states"][:, :, 0].transpose(1, 2)
    ways = Ways(config, w, embedding(config, w, inputs), context)
    residuals, features = (
        [tensor for name, tensor in inputs.items() if name.startswith(f"{kind}_residual_")]
        for kind in ("additional", "adapter")
    )
    sample = torch.cat([inputs[name] for name in ("sample", "condition") if name in inputs], dim=1)
    kept = ways.down(conv(w / "conv_in", sample), features)
    x = ways.middle(kept[-1])
    if len(features) > len(config.channels):
        x = x + features[-1]
    if residuals:
        kept = [skip + residual for skip, residual in zip(kept, residuals[:-1], strict=True)]
        x = x + residuals[-1]
    x = ways.up(x, kept)
    return conv(w / "conv_out", F.silu(group_norm(w / "conv_norm_out", x, config.norm_groups, 1e-5)))


def _vae_middle(w: Weights, x: Tensor, groups: int) -> Tensor:
    x = resnet(w / "resnets" / 0, x, groups, 1e-6)
    inner = w / "attentions" / 0
    tokens = group_norm(inner / "group_norm", x, groups, 1e-6).flatten(2).transpose(1, 2)
    x = x + attention(inner, tokens, tokens, 1).transpose(1, 2).reshape(x.shape)
    return resnet(w / "resnets" / 1, x, groups, 1e-6)


def vae_encoder(config: VAEConfig, source: WeightSource, x: Tensor) -> Tensor:
    """Encode (B, 3, H, W) to the moments (B, 2*latent_channels, H/8, W/8)."""
    root, groups = Weights(source), config.norm_groups
    w = root / "encoder"
    x = conv(w / "conv_in", x)
    for level in range(len(config.channels)):
        block = w / "down_blocks" / level
        for index in range(config.layers):
            x = resnet(block / "resnets" / index, x, groups, 1e-6)
        if "downsamplers.0.conv.weight" in block:
            down = block / "downsamplers" / 0 / "conv"
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), down("weight"), down.bias(), stride=2)
    x = _vae_middle(w / "mid_block", x, groups)
    x = conv(w / "conv_out", F.silu(group_norm(w / "conv_norm_out", x, groups, 1e-6)))
    return conv(root / "quant_conv", x)


def vae_decoder(config: VAEConfig, source: WeightSource, z: Tensor) -> Tensor:
    """Decode (B, latent_channels, h, w) to (B, 3, 8h, 8w)."""
    root, groups = Weights(source), config.norm_groups
    w = root / "decoder"
    x = _vae_middle(w / "mid_block", conv(w / "conv_in", conv(root / "post_quant_conv", z)), groups)
    for level in range(len(config.channels)):
        block = w / "up_blocks" / level
        for index in range(config.layers + 1):
            x = resnet(block / "resnets" / index, x, groups, 1e-6)
        if "upsamplers.0.conv.weight" in block:
            x = conv(block / "upsamplers" / 0 / "conv", F.interpolate(x, scale_factor=2.0))
    return conv(w / "conv_out", F.silu(group_norm(w / "conv_norm_out", x, groups, 1e-6)))


def tiny_decoder(config: TinyDecoderConfig, source: WeightSource, z: Tensor) -> Tensor:
    """Decode (B, latent_channels, h, w) roughly to (B, 3, 8h, 8w), as TAESD does."""
    layers = Weights(source) / "decoder" / "layers"
    x = F.relu(conv(layers / 0, 3 * torch.tanh(z / 3)))
    index = 2
    for level, blocks in enumerate(config.blocks):
        for _ in range(blocks):
            w = layers / index / "conv"
            x = F.relu(x + conv(w / 4, F.relu(conv(w / 2, F.relu(conv(w / 0, x))))))
            index += 1
        if level < len(config.blocks) - 1:
            x = conv(layers / (index + 1), F.interpolate(x, scale_factor=2.0))
            index += 2
    return 2 * conv(layers / index, x) - 1


def text_encoder(config: TextEncoderConfig, source: WeightSource, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode token ids (1, tokens).

    Returns:
        The hidden state (1, tokens, width) of the last layer that is not skipped, the pooled output (1, width or
        projection_dim) and the hidden states of all layers (layers, tokens, width); the states are behind the final
        LayerNorm if the encoder is used so, the pooled output always is.
    """
    root = Weights(source)
    w = root / "text_model"
    activate: Callable[[Tensor], Tensor] = F.gelu if config.activation == "gelu" else _quick_gelu
    table, places = (w / "embeddings" / name for name in ("token_embedding", "position_embedding"))
    x = table("weight")[ids] + places("weight")[: ids.shape[1]]
    states = []
    for index in range(config.layers):
        layer = w / "encoder" / "layers" / index
        own = layer / "self_attn"
        y = layer_norm(layer / "layer_norm1", x)
        q, k, v = (_split(dense(own / f"{name}_proj", y), config.heads) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(own / "out_proj", y.transpose(1, 2).flatten(2))
        y = dense(layer / "mlp" / "fc1", layer_norm(layer / "layer_norm2", x))
        x = x + dense(layer / "mlp" / "fc2", activate(y))
        states.append(layer_norm(w / "final_layer_norm", x) if config.final_norm else x)
    last = layer_norm(w / "final_layer_norm", x)
    end = config.vocab_size - config.added_tokens - 1  # of text: behind it are only learned words
    pooled = last[torch.arange(len(ids)), (ids == end).int().argmax(dim=1)]
    if config.projection_dim is not None:
        pooled = dense(root / "text_projection", pooled)
    return states[-1 - config.skip], pooled, torch.cat(states)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
