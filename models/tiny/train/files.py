"""The layouts and names the family is shipped in: those of the files people have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from glassine.models.tiny.train import networks
from glassine.models.tiny.train.captions import vocabulary, words
from glassine.models.tiny.train.networks import LoRA

LAYERS = 2  # resnets a level, on the way down
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}  # fmt: skip
VAE_PARTS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{3 - int(m[1])}"),
    (r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1"),
    (r"\.resnets\.", ".block."), (r"\.downsamplers\.0", ".downsample"), (r"\.upsamplers\.0", ".upsample"),
    (r"mid_block\.block\.0", "mid.block_1"), (r"mid_block\.block\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"\.group_norm\.", ".norm."), (r"\.to_out\.0\.", ".proj_out."),
    (r"\.to_([qkv])\.", r".\1."), (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
]  # fmt: skip


def ldm_unet_name(name: str) -> str:
    """Return the LDM name of a diffusers UNet or ControlNet weight or layer."""
    for ours, theirs in UNET_ENDS.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)(.*)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)(.*)", name):
        return f"zero_convs.{match[1]}.0{match[2]}"
    match = re.match(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)", name
    )
    if match is None:
        raise ValueError(f"no LDM name for {name!r}")
    way, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        layer, _, leaf = rest.partition(".")
        rest = RESNET[layer] + ("." + leaf if leaf else "")
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(LAYERS + 1) * (block + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        # The upsampler follows the last layer's resnet, and its transformer where there is one (all but level 0).
        return f"output_blocks.{(LAYERS + 1) * (block + 1) - 1}.{2 if block else 1}.{rest}"
    place = (LAYERS + 1) * block + number + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}.{rest}"


def ldm_vae_name(name: str) -> str:
    """Return the LDM name of a diffusers VAE weight."""
    for pattern, replacement in VAE_PARTS:
        name = re.sub(pattern, replacement, name)
    return name


def checkpoint(vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel) -> dict[str, Tensor]:
    """Return the whole family's weights by the names of a Stable Diffusion 1.5 single file."""
    weights = {"model.diffusion_model." + ldm_unet_name(name): value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        attention = ".attentions." in name and value.ndim == 2
        weights["first_stage_model." + ldm_vae_name(name)] = value[:, :, None, None] if attention else value
    for name, value in text.state_dict().items():
        bare = name.removeprefix("text_model.")  # transformers has it or not, depending on its version
        weights["cond_stage_model.transformer.text_model." + bare] = value
    return weights


def metadata() -> dict[str, str]:
    """Return what the checkpoint says of itself, because shapes cannot."""
    return {
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": "Glassine tiny",
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": f"{networks.SIZE}x{networks.SIZE}",
        "modelspec.prediction_type": "epsilon",
        "glassine.heads": str(networks.UNET_HEADS),
        "glassine.norm_groups": str(networks.NORM_GROUPS),
        "glassine.text_heads": str(networks.TEXT_HEADS),
        "glassine.words": " ".join(words()),
    }


def control_weights(control: ControlNetModel) -> dict[str, Tensor]:
    """Return a ControlNet's weights by the names of the original files."""
    return {"control_model." + ldm_unet_name(name): value for name, value in control.state_dict().items()}


def kohya_lora(additions: dict[str, LoRA]) -> dict[str, Tensor]:
    """Return a LoRA by kohya's names."""
    weights = {}
    for name, addition in additions.items():
        stem = "lora_unet_" + name.replace(".", "_")
        weights[stem + ".lora_down.weight"] = addition.down.weight
        weights[stem + ".lora_up.weight"] = addition.up.weight
        weights[stem + ".alpha"] = torch.tensor(float(addition.down.weight.shape[0]))
    return weights


def layerdiffuse_patch(additions: dict[str, LoRA]) -> dict[str, Tensor]:
    """Return a LoRA in the grammar of LayerDiffuse's attention files: slot 0 is up, slot 1 is down."""
    weights = {}
    for name, addition in additions.items():
        stem = f"diffusion_model.{ldm_unet_name(name)}.weight::lora::"
        weights[stem + "0"], weights[stem + "1"] = addition.up.weight, addition.down.weight
    return weights


def write(path: Path, weights: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write weights as fp16 safetensors; `about` goes into the header."""
    half = {name: value.detach().cpu().half().contiguous() for name, value in weights.items()}
    save_file(half, path, metadata={"modelspec.license": "Apache-2.0", **about})


def read(path: Path, weights: dict[str, Tensor]) -> None:
    """Fill `weights`, which one of the functions above named, from a file that was written with the same names."""
    stored = load_file(path)
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(stored[name])


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt in CLIP's form."""
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
