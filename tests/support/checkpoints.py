"""Random Stable Diffusion 1.x checkpoints in the layouts people have: LDM single files and diffusers folders.

The keys are written out from LDM's own construction of its networks, not from the converter's tables: a mistake in one
does not hide in the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Shapes = dict[str, tuple[int, ...]]

ITEM_SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "I8": 1}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a checkpoint; the default is a small one with everything SD 1.5 has."""

    unet: tuple[int, ...] = (32, 64, 64, 64)
    context: int = 64
    attention: tuple[bool, ...] = (True, True, True, False)
    vae: tuple[int, ...] = (32, 32, 48, 64)
    text_layers: int = 3
    vocabulary: int = 49408
    heads: int = 2
    groups: int = 16
    metadata: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> dict[str, str]:
        """What such a file has to say in its metadata, as shapes cannot tell it."""
        said = {"glassine.heads": str(self.heads), "glassine.norm_groups": str(self.groups)}
        return {**said, **self.metadata}


TINY = Sizes()
SD15 = Sizes(unet=(320, 640, 1280, 1280), context=768, vae=(128, 256, 512, 512), text_layers=12, heads=8, groups=32)


def _conv(out: Shapes, name: str, cout: int, cin: int, k: int) -> None:
    out[f"{name}.weight"] = (cout, cin, k, k)
    out[f"{name}.bias"] = (cout,)


def _linear(out: Shapes, name: str, cout: int, cin: int, bias: bool = True) -> None:
    out[f"{name}.weight"] = (cout, cin)
    if bias:
        out[f"{name}.bias"] = (cout,)


def _norm(out: Shapes, name: str, channels: int) -> None:
    out[f"{name}.weight"] = (channels,)
    out[f"{name}.bias"] = (channels,)


def ldm_unet(sizes: Sizes) -> Shapes:
    """openaimodel.UNetModel of v1-inference.yaml, 2 residual blocks a level."""
    out: Shapes = {}
    ch = sizes.unet[0]
    emb = 4 * ch

    def res(name: str, cin: int, cout: int) -> None:
        _norm(out, f"{name}.in_layers.0", cin)
        _conv(out, f"{name}.in_layers.2", cout, cin, 3)
        _linear(out, f"{name}.emb_layers.1", cout, emb)
        _norm(out, f"{name}.out_layers.0", cout)
        _conv(out, f"{name}.out_layers.3", cout, cout, 3)
        if cin != cout:
            _conv(out, f"{name}.skip_connection", cout, cin, 1)

    def transformer(name: str, c: int) -> None:
        _norm(out, f"{name}.norm", c)
        _conv(out, f"{name}.proj_in", c, c, 1)
        block = f"{name}.transformer_blocks.0"
        for attn, width in (("attn1", c), ("attn2", sizes.context)):
            _linear(out, f"{block}.{attn}.to_q", c, c, bias=False)
            _linear(out, f"{block}.{attn}.to_k", c, width, bias=False)
            _linear(out, f"{block}.{attn}.to_v", c, width, bias=False)
            _linear(out, f"{block}.{attn}.to_out.0", c, c)
        _linear(out, f"{block}.ff.net.0.proj", 8 * c, c)
        _linear(out, f"{block}.ff.net.2", c, 4 * c)
        for i in (1, 2, 3):
            _norm(out, f"{block}.norm{i}", c)
        _conv(out, f"{name}.proj_out", c, c, 1)

    _linear(out, "time_embed.0", emb, ch)
    _linear(out, "time_embed.2", emb, emb)
    _conv(out, "input_blocks.0.0", ch, 4, 3)
    stack, number = [ch], 1
    for level, width in enumerate(sizes.unet):
        for _ in range(2):
            res(f"input_blocks.{number}.0", ch, width)
            ch = width
            if sizes.attention[level]:
                transformer(f"input_blocks.{number}.1", ch)
            stack.append(ch)
            number += 1
        if level < len(sizes.unet) - 1:
            _conv(out, f"input_blocks.{number}.0.op", ch, ch, 3)
            stack.append(ch)
            number += 1
    res("middle_block.0", ch, ch)
    transformer("middle_block.1", ch)
    res("middle_block.2", ch, ch)
    number = 0
    for level, width in reversed(list(enumerate(sizes.unet))):
        for i in range(3):
            res(f"output_blocks.{number}.0", ch + stack.pop(), width)
            ch = width
            if sizes.attention[level]:
                transformer(f"output_blocks.{number}.1", ch)
            if i == 2 and level > 0:
                _conv(out, f"output_blocks.{number}.{2 if sizes.attention[level] else 1}.conv", ch, ch, 3)
            number += 1
    _norm(out, "out.0", ch)
    _conv(out, "out.2", 4, ch, 3)
    return out


def ldm_vae(sizes: Sizes) -> Shapes:
    """ldm.modules.diffusionmodules.model Encoder and Decoder, with the two 1x1 convolutions of AutoencoderKL."""
    out: Shapes = {}

    def res(name: str, cin: int, cout: int) -> None:
        _norm(out, f"{name}.norm1", cin)
        _conv(out, f"{name}.conv1", cout, cin, 3)
        _norm(out, f"{name}.norm2", cout)
        _conv(out, f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            _conv(out, f"{name}.nin_shortcut", cout, cin, 1)

    def middle(name: str, c: int) -> None:
        res(f"{name}.mid.block_1", c, c)
        _norm(out, f"{name}.mid.attn_1.norm", c)
        for letter in ("q", "k", "v", "proj_out"):
            _conv(out, f"{name}.mid.attn_1.{letter}", c, c, 1)
        res(f"{name}.mid.block_2", c, c)

    ch = sizes.vae[0]
    _conv(out, "encoder.conv_in", ch, 3, 3)
    for level, width in enumerate(sizes.vae):
        for i in range(2):
            res(f"encoder.down.{level}.block.{i}", ch, width)
            ch = width
        if level < len(sizes.vae) - 1:
            _conv(out, f"encoder.down.{level}.downsample.conv", ch, ch, 3)
    middle("encoder", ch)
    _norm(out, "encoder.norm_out", ch)
    _conv(out, "encoder.conv_out", 8, ch, 3)
    _conv(out, "decoder.conv_in", ch, 4, 3)
    middle("decoder", ch)
    for level, width in reversed(list(enumerate(sizes.vae))):
        for i in range(3):
            res(f"decoder.up.{level}.block.{i}", ch, width)
            ch = width
        if level > 0:
            _conv(out, f"decoder.up.{level}.upsample.conv", ch, ch, 3)
    _norm(out, "decoder.norm_out", ch)
    _conv(out, "decoder.conv_out", 3, ch, 3)
    _conv(out, "quant_conv", 8, 8, 1)
    _conv(out, "post_quant_conv", 4, 4, 1)
    return out


def clip_text(sizes: Sizes) -> Shapes:
    """Hugging Face's CLIPTextModel, with text_model."""
    out: Shapes = {}
    width = sizes.context
    out["text_model.embeddings.token_embedding.weight"] = (sizes.vocabulary, width)
    out["text_model.embeddings.position_embedding.weight"] = (77, width)
    for i in range(sizes.text_layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(out, f"{layer}.self_attn.{name}", width, width)
        _norm(out, f"{layer}.layer_norm1", width)
        _norm(out, f"{layer}.layer_norm2", width)
        _linear(out, f"{layer}.mlp.fc1", 4 * width, width)
        _linear(out, f"{layer}.mlp.fc2", width, 4 * width)
    _norm(out, "text_model.final_layer_norm", width)
    return out


def ldm_checkpoint(sizes: Sizes) -> Shapes:
    """A whole single file of SD 1.x, without the buffers that `extras` adds."""
    return {
        **{f"cond_stage_model.transformer.{key}": shape for key, shape in clip_text(sizes).items()},
        **{f"first_stage_model.{key}": shape for key, shape in ldm_vae(sizes).items()},
        **{f"model.diffusion_model.{key}": shape for key, shape in ldm_unet(sizes).items()},
    }


def values(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 values, different in every tensor, of the scale that keeps a network's activations near 1."""
    rng = np.random.default_rng(seed)
    result = {}
    for key, shape in shapes.items():
        if len(shape) == 1 and key.endswith("weight"):
            result[key] = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
            scale = 1.0 if "embedding.weight" in key else fan_in**-0.5
            result[key] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return result


def encode(array: np.ndarray, dtype: str) -> bytes:
    """The bytes of float32 values in a safetensors dtype; fp8 is cut off, not rounded: any valid bytes will do."""
    if dtype == "BF16":
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    if dtype == "F8_E5M2":
        return (array.astype("<f2").view("<u2") >> 8).astype(np.uint8).tobytes()
    if dtype == "F8_E4M3":
        bits = array.astype("<f2").view("<u2").astype(np.int32)
        exponent = ((bits >> 10) & 31) - 8  # bias 15 -> 7
        code = np.where(exponent <= 0, 0, np.minimum(exponent, 15) << 3 | (bits >> 7) & 7)
        return ((bits >> 8 & 128) | np.minimum(code, 126)).astype(np.uint8).tobytes()
    return array.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4"}[dtype]).tobytes()


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str | Callable[[str], str] = "F16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file by the letter of the format."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    blobs, offset = [], 0
    for key, array in tensors.items():
        kind = dtype if isinstance(dtype, str) else dtype(key)
        blob = encode(array, kind)
        header[key] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            file.write(blob)
    return path


def write_checkpoint(path: Path, sizes: Sizes = TINY, *, dtype: str = "F16", seed: int = 0) -> Path:
    """Write a whole single-file checkpoint with the buffers and leftovers that real ones carry."""
    tensors = values(ldm_checkpoint(sizes), seed)
    extras = {
        "alphas_cumprod": np.linspace(0.999, 0.0047, 1000, dtype=np.float32),
        "betas": np.linspace(0.00085, 0.012, 1000, dtype=np.float32),
        "model_ema.decay": np.float32(0.9999).reshape(()),
        "model_ema.diffusion_modelinput_blocks00weight": np.ones((3, 3), np.float32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77, dtype=np.float32)[None],
    }

    def kind(key: str) -> str:
        return "I64" if key.endswith("position_ids") else "F32" if key in extras else dtype

    return write_safetensors(path, {**tensors, **extras}, dtype=kind, metadata=sizes.header())


def diffusers_names(part: str, sizes: Sizes) -> dict[str, str]:
    """LDM key -> diffusers key of the "unet" or the "vae", found by building both lists side by side.

    LDM and diffusers construct the same layers in the same order block by block; only the words differ.
    """
    if part == "unet":
        return {key: _diffusers_unet_key(key) for key in ldm_unet(sizes)}
    return {key: _diffusers_vae_key(key, len(sizes.vae)) for key in ldm_vae(sizes)}


def _diffusers_unet_key(key: str) -> str:
    words = key.split(".")
    inner = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
    inner |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}

    def resnet(rest: list[str]) -> str:
        joined = ".".join(rest[:-1])
        return f"{inner[joined]}.{rest[-1]}"

    single = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    single |= {"out.0": "conv_norm_out", "out.2": "conv_out"}
    if ".".join(words[:-1]) in single:
        return f"{single['.'.join(words[:-1])]}.{words[-1]}"
    if words[0] == "middle_block":
        i = int(words[1])
        rest = words[2:]
        if i == 1:
            return "mid_block.attentions.0." + ".".join(rest)
        return f"mid_block.resnets.{i // 2}.{resnet(rest)}"
    i, j, rest = int(words[1]), int(words[2]), words[3:]
    if words[0] == "input_blocks":
        if i == 0:
            return f"conv_in.{words[3]}"
        level, layer = divmod(i - 1, 3)
        if rest[0] == "op":
            return f"down_blocks.{level}.downsamplers.0.conv.{rest[1]}"
        side = "down"
    else:
        level, layer = divmod(i, 3)
        if rest[0] == "conv":
            return f"up_blocks.{level}.upsamplers.0.conv.{rest[1]}"
        side = "up"
    if j == 1:
        return f"{side}_blocks.{level}.attentions.{layer}." + ".".join(rest)
    return f"{side}_blocks.{level}.resnets.{layer}.{resnet(rest)}"


def _diffusers_vae_key(key: str, levels: int) -> str:
    words = key.split(".")
    if words[0] in {"quant_conv", "post_quant_conv"} or words[1] in {"conv_in", "conv_out"}:
        return key
    coder, kind, rest = words[0], words[1], words[2:]
    if kind == "norm_out":
        return f"{coder}.conv_norm_out.{rest[0]}"
    if kind == "mid":
        if rest[0] == "attn_1":
            name = {"norm": "group_norm", "proj_out": "to_out.0"}.get(rest[1], f"to_{rest[1]}")
            return f"{coder}.mid_block.attentions.0.{name}.{rest[2]}"
        return f"{coder}.mid_block.resnets.{int(rest[0][-1]) - 1}.{'.'.join(rest[1:])}"
    level = int(rest[0])
    block = f"{coder}.{kind}_blocks.{level if kind == 'down' else levels - 1 - level}"
    if rest[1] in {"downsample", "upsample"}:
        return f"{block}.{rest[1]}rs.0.conv.{rest[3]}"
    tail = ".".join(rest[3:]).replace("nin_shortcut", "conv_shortcut")
    return f"{block}.resnets.{rest[2]}.{tail}"


def diffusers_configs(sizes: Sizes) -> dict[str, dict[str, object]]:
    """The config.json of each part, as diffusers and transformers write them."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in sizes.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(sizes.attention)]
    levels = len(sizes.vae)
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": sizes.heads,
            "block_out_channels": list(sizes.unet),
            "cross_attention_dim": sizes.context,
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": 2,
            "norm_num_groups": sizes.groups,
            "sample_size": 64,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": list(sizes.vae),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": sizes.groups,
            "scaling_factor": 0.18215,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "hidden_act": "quick_gelu",
            "hidden_size": sizes.context,
            "intermediate_size": 4 * sizes.context,
            "num_attention_heads": max(1, sizes.context // 64),
            "num_hidden_layers": sizes.text_layers,
            "vocab_size": sizes.vocabulary,
            "max_position_embeddings": 77,
        },
    }


def write_diffusers(folder: Path, sizes: Sizes = TINY, *, dtype: str = "F16", seed: int = 0) -> Path:
    """Write a diffusers folder with the very values of `write_checkpoint(..., seed=seed)`."""
    tensors = values(ldm_checkpoint(sizes), seed)
    prefixes = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    }
    for part, config in diffusers_configs(sizes).items():
        place = folder / part
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
        prefix = prefixes[part]
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if part != "text_encoder":
            names = diffusers_names(part, sizes)
            own = {names[key]: value for key, value in own.items()}
        # diffusers keeps the VAE's attention as matrices, LDM as 1x1 convolutions.
        own = {
            key: value[:, :, 0, 0] if part == "vae" and ".attentions." in key and value.ndim == 4 else value
            for key, value in own.items()
        }
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_safetensors(place / f"{stem}.safetensors", own, dtype=dtype)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        )
    )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder
