"""Random Stable Diffusion checkpoints in the layouts people have: LDM single files and diffusers folders.

The keys are written out from LDM's own construction of its networks, not from the converter's tables: a mistake in one
does not hide in the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

Shapes = dict[str, tuple[int, ...]]

ITEM_SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "I8": 1}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a checkpoint; the default is a small one with everything SD 1.5 has.

    depths: transformer blocks a level; empty is one where there is attention. text_width: of the first text encoder,
    0 = as wide as the context. second_*: SDXL's second text encoder. time_ids: 6 SDXL, 5 its refiner, 0 neither.
    guidance: width of LCM's guidance embedding.
    """

    family: str = "sd15"
    unet: tuple[int, ...] = (32, 64, 64, 64)
    in_channels: int = 4
    context: int = 64
    attention: tuple[bool, ...] = (True, True, True, False)
    depths: tuple[int, ...] = ()
    mid_depth: int = 1
    linear: bool = False
    time_ids: int = 0
    guidance: int = 0
    vae: tuple[int, ...] = (32, 32, 48, 64)
    text_width: int = 0
    text_layers: int = 3
    second_width: int = 0
    second_layers: int = 0
    vocabulary: int = 49408
    heads: int | tuple[int, ...] = 2
    groups: int = 16
    metadata: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> dict[str, str]:
        """What such a file has to say in its metadata, as shapes cannot tell it."""
        heads = self.heads if isinstance(self.heads, tuple) else (self.heads,)
        said = {"glassine.heads": ",".join(map(str, heads)), "glassine.norm_groups": str(self.groups)}
        return {**said, **self.metadata}

    @property
    def blocks(self) -> tuple[int, ...]:
        """Transformer blocks behind each resnet, level by level."""
        return self.depths if self.depths else tuple(int(there) for there in self.attention)

    @property
    def clip_width(self) -> int:
        """The width of the first text encoder."""
        return self.text_width if self.text_width else self.context - self.second_width


TINY = Sizes()
TINY_SD2 = Sizes(family="sd2", linear=True, heads=(1, 2, 2, 2), text_layers=4)
TINY_SDXL = Sizes(
    family="sdxl",
    unet=(32, 64, 64),
    context=112,
    attention=(False, True, True),
    depths=(0, 1, 2),
    mid_depth=2,
    linear=True,
    time_ids=6,
    second_width=48,
    second_layers=3,
    heads=(1, 2, 2),
)
TINY_REFINER = replace(
    TINY_SDXL,
    family="sdxl_refiner",
    unet=(32, 64, 64, 64),
    context=48,
    attention=(False, True, True, False),
    depths=(0, 2, 2, 0),
    time_ids=5,
    heads=(1, 2, 2, 2),
)
TINY_FAMILIES = {"sd15": TINY, "sd2": TINY_SD2, "sdxl": TINY_SDXL, "sdxl_refiner": TINY_REFINER}

SD15 = Sizes(unet=(320, 640, 1280, 1280), context=768, vae=(128, 256, 512, 512), text_layers=12, heads=8, groups=32)
SD21 = replace(SD15, family="sd2", context=1024, linear=True, text_layers=24, heads=(5, 10, 20, 20))
SDXL = replace(
    SD15,
    family="sdxl",
    unet=(320, 640, 1280),
    context=2048,
    attention=(False, True, True),
    depths=(0, 2, 10),
    mid_depth=10,
    linear=True,
    time_ids=6,
    second_width=1280,
    second_layers=32,
    heads=(5, 10, 20),
)
SDXL_REFINER = replace(
    SDXL,
    family="sdxl_refiner",
    unet=(384, 768, 1536, 1536),
    context=1280,
    attention=(False, True, True, False),
    depths=(0, 4, 4, 0),
    mid_depth=4,
    time_ids=5,
    heads=(6, 12, 24, 24),
)
SSD1B = replace(SDXL, depths=(0, 2, 4), mid_depth=0)  # distilled: fewer blocks, none in the middle
FULL_SIZE = {"sd15": SD15, "sd2": SD21, "sdxl": SDXL, "sdxl_refiner": SDXL_REFINER}


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
    """openaimodel.UNetModel of v1-inference.yaml (or v2-inference.yaml, sd_xl_base.yaml), 2 residual blocks a level."""
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

    def transformer(name: str, c: int, depth: int) -> None:
        def projection(name: str) -> None:
            _linear(out, name, c, c) if sizes.linear else _conv(out, name, c, c, 1)

        _norm(out, f"{name}.norm", c)
        projection(f"{name}.proj_in")
        for number in range(depth):
            block = f"{name}.transformer_blocks.{number}"
            for attn, width in (("attn1", c), ("attn2", sizes.context)):
                _linear(out, f"{block}.{attn}.to_q", c, c, bias=False)
                _linear(out, f"{block}.{attn}.to_k", c, width, bias=False)
                _linear(out, f"{block}.{attn}.to_v", c, width, bias=False)
                _linear(out, f"{block}.{attn}.to_out.0", c, c)
            _linear(out, f"{block}.ff.net.0.proj", 8 * c, c)
            _linear(out, f"{block}.ff.net.2", c, 4 * c)
            for i in (1, 2, 3):
                _norm(out, f"{block}.norm{i}", c)
        projection(f"{name}.proj_out")

    _linear(out, "time_embed.0", emb, ch)
    _linear(out, "time_embed.2", emb, emb)
    if sizes.guidance:
        _linear(out, "time_embed.cond_proj", ch, sizes.guidance, bias=False)
    if sizes.time_ids:
        _linear(out, "label_emb.0.0", emb, sizes.second_width + 256 * sizes.time_ids)
        _linear(out, "label_emb.0.2", emb, emb)
    _conv(out, "input_blocks.0.0", ch, sizes.in_channels, 3)
    stack, number = [ch], 1
    for level, width in enumerate(sizes.unet):
        for _ in range(2):
            res(f"input_blocks.{number}.0", ch, width)
            ch = width
            if sizes.blocks[level]:
                transformer(f"input_blocks.{number}.1", ch, sizes.blocks[level])
            stack.append(ch)
            number += 1
        if level < len(sizes.unet) - 1:
            _conv(out, f"input_blocks.{number}.0.op", ch, ch, 3)
            stack.append(ch)
            number += 1
    res("middle_block.0", ch, ch)
    if sizes.mid_depth:
        transformer("middle_block.1", ch, sizes.mid_depth)
        res("middle_block.2", ch, ch)
    number = 0
    for level, width in reversed(list(enumerate(sizes.unet))):
        for i in range(3):
            res(f"output_blocks.{number}.0", ch + stack.pop(), width)
            ch = width
            if sizes.blocks[level]:
                transformer(f"output_blocks.{number}.1", ch, sizes.blocks[level])
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
    width = sizes.clip_width
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


def open_clip_text(sizes: Sizes, width: int, layers: int) -> Shapes:
    """The text side of open_clip's CLIP, as FrozenOpenCLIPEmbedder holds it."""
    out: Shapes = {}
    out["positional_embedding"] = (77, width)
    out["text_projection"] = (width, width)
    out["logit_scale"] = ()
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        _norm(out, f"{block}.ln_1", width)
        out[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        out[f"{block}.attn.in_proj_bias"] = (3 * width,)
        _linear(out, f"{block}.attn.out_proj", width, width)
        _norm(out, f"{block}.ln_2", width)
        _linear(out, f"{block}.mlp.c_fc", 4 * width, width)
        _linear(out, f"{block}.mlp.c_proj", width, 4 * width)
    out["token_embedding.weight"] = (sizes.vocabulary, width)
    _norm(out, "ln_final", width)
    return out


def text_encoders(sizes: Sizes) -> dict[str, Shapes]:
    """The text encoders by the prefix they have in a single file."""
    if sizes.family == "sd2":
        return {"cond_stage_model.model.": open_clip_text(sizes, sizes.clip_width, sizes.text_layers)}
    second = open_clip_text(sizes, sizes.second_width, sizes.second_layers) if sizes.second_width else {}
    if sizes.family == "sdxl":
        return {"conditioner.embedders.0.transformer.": clip_text(sizes), "conditioner.embedders.1.model.": second}
    if sizes.family == "sdxl_refiner":
        return {"conditioner.embedders.0.model.": second}
    return {"cond_stage_model.transformer.": clip_text(sizes)}


def ldm_checkpoint(sizes: Sizes) -> Shapes:
    """A whole single file, without the buffers that `extras` adds."""
    texts = text_encoders(sizes)
    return {
        **{f"{prefix}{key}": shape for prefix, shapes in texts.items() for key, shape in shapes.items()},
        **{f"first_stage_model.{key}": shape for key, shape in ldm_vae(sizes).items()},
        **{f"model.diffusion_model.{key}": shape for key, shape in ldm_unet(sizes).items()},
    }


def write_sparse(path: Path, shapes: Shapes, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a file of fp16 zeros that takes no room on the disk: the header of a full-size model."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


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
    single |= {"out.0": "conv_norm_out", "out.2": "conv_out", "time_embed.cond_proj": "time_embedding.cond_proj"}
    single |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
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


def hugging_face_text(open_clip: Mapping[str, np.ndarray], layers: int | None = None) -> dict[str, np.ndarray]:
    """open_clip's tensors under Hugging Face's names: `layers` layers, or all of them and the projection."""
    out = {
        "text_model.embeddings.position_embedding.weight": open_clip["positional_embedding"],
        "text_model.embeddings.token_embedding.weight": open_clip["token_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"text_model.final_layer_norm.{kind}"] = open_clip[f"ln_final.{kind}"]
    words = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    words["attn.out_proj"] = "self_attn.out_proj"
    number = 0
    while f"transformer.resblocks.{number}.ln_1.weight" in open_clip and number != layers:
        block, layer = f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}"
        for kind in ("weight", "bias"):
            for theirs, ours in words.items():
                out[f"{layer}.{ours}.{kind}"] = open_clip[f"{block}.{theirs}.{kind}"]
            for letter, third in zip("qkv", np.split(open_clip[f"{block}.attn.in_proj_{kind}"], 3), strict=True):
                out[f"{layer}.self_attn.{letter}_proj.{kind}"] = third
        number += 1
    if layers is None:
        out["text_projection.weight"] = open_clip["text_projection"].T
    return out


def _text_config(cls: str, act: str, width: int, layers: int, vocabulary: int, pad: int) -> dict[str, object]:
    return {
        "architectures": [cls],
        "hidden_act": act,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 77,
        "projection_dim": width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": pad,
    }


def diffusers_configs(sizes: Sizes) -> dict[str, dict[str, object]]:
    """The config.json of each part, as diffusers and transformers write them."""
    attention = [bool(depth) for depth in sizes.blocks]
    levels = len(sizes.vae)
    heads = sizes.heads if isinstance(sizes.heads, int) else list(sizes.heads)
    unet: dict[str, object] = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads,
        "block_out_channels": list(sizes.unet),
        "cross_attention_dim": sizes.context,
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention)],
        "in_channels": sizes.in_channels,
        "layers_per_block": 2,
        "norm_num_groups": sizes.groups,
        "sample_size": 64,
        "use_linear_projection": sizes.linear,
    }
    if any(depth > 1 for depth in sizes.blocks):
        # The middle block has as many as the last level says, also where that level itself has none.
        unet["transformer_layers_per_block"] = [*(max(1, d) for d in sizes.blocks[:-1]), sizes.mid_depth]
    if sizes.time_ids:
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": sizes.second_width + 256 * sizes.time_ids,
        }
    if sizes.guidance:
        unet["time_cond_proj_dim"] = sizes.guidance
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(sizes.vae),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": sizes.groups,
        "scaling_factor": 0.13025 if sizes.time_ids else 0.18215,
    }
    configs = {"unet": unet, "vae": vae}
    if sizes.family == "sd2":
        layers = sizes.text_layers - 1  # diffusers leaves out the layer that is not read
        configs["text_encoder"] = _text_config("CLIPTextModel", "gelu", sizes.clip_width, layers, sizes.vocabulary, 0)
    elif sizes.family != "sdxl_refiner":
        configs["text_encoder"] = _text_config(
            "CLIPTextModel", "quick_gelu", sizes.clip_width, sizes.text_layers, sizes.vocabulary, 49407
        )
    if sizes.second_width:
        configs["text_encoder_2"] = _text_config(
            "CLIPTextModelWithProjection", "gelu", sizes.second_width, sizes.second_layers, sizes.vocabulary, 0
        )
    return configs


def diffusers_tensors(sizes: Sizes, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a single file, or of some of its parts, as diffusers and transformers call them."""

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    parts = {}
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        names = diffusers_names(part, sizes)
        parts[part] = {names[key]: value for key, value in under(prefix).items()}  # none where it is not there
    # diffusers keeps the VAE's attention as matrices, LDM as 1x1 convolutions.
    parts["vae"] = {
        key: value[:, :, 0, 0] if ".attentions." in key and value.ndim == 4 else value
        for key, value in parts["vae"].items()
    }
    for number, prefix in enumerate(text_encoders(sizes)):
        own = under(prefix)
        if not own:
            continue
        if sizes.family == "sd2":
            parts["text_encoder"] = hugging_face_text(own, sizes.text_layers - 1)
        elif sizes.family == "sdxl_refiner" or number == 1:
            parts["text_encoder_2"] = hugging_face_text(own)
        else:
            parts["text_encoder"] = own
    return parts


def write_diffusers(folder: Path, sizes: Sizes = TINY, *, dtype: str = "F16", seed: int = 0) -> Path:
    """Write a diffusers folder with the very values of `write_checkpoint(..., seed=seed)`."""
    tensors = diffusers_tensors(sizes, values(ldm_checkpoint(sizes), seed))
    for part, config in diffusers_configs(sizes).items():
        place = folder / part
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        write_safetensors(place / f"{stem}.safetensors", tensors[part], dtype=dtype)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        )
    )
    name = "StableDiffusionXLPipeline" if sizes.time_ids else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder
