"""Random ControlNets and T2I-Adapters in the layouts people have, for the bases of `checkpoints.py`.

Keys and shapes are written from cldm.py's and the adapters' own construction, not from the converter's tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

import numpy as np

Shapes = dict[str, tuple[int, ...]]

# lllyasviel/ControlNet-v1-1, file by file; all have one architecture.
V11 = (
    "control_v11p_sd15_canny",
    "control_v11p_sd15_mlsd",
    "control_v11f1p_sd15_depth",
    "control_v11p_sd15_normalbae",
    "control_v11p_sd15_seg",
    "control_v11p_sd15_inpaint",
    "control_v11p_sd15_lineart",
    "control_v11p_sd15s2_lineart_anime",
    "control_v11p_sd15_openpose",
    "control_v11p_sd15_scribble",
    "control_v11p_sd15_softedge",
    "control_v11e_sd15_shuffle",
    "control_v11e_sd15_ip2p",
    "control_v11f1e_sd15_tile",
)
HINT = (16, 32, 96, 256)
TINY_HINT = (8, 8, 16, 24)


def ldm_control(checkpoints: ModuleType, sizes: object, hint: tuple[int, ...] = TINY_HINT) -> Shapes:
    """cldm.ControlNet: the UNet's input and middle blocks, a hint encoder of eight convolutions, zero convolutions."""
    unet = checkpoints.ldm_unet(sizes)
    out: Shapes = {
        key: shape
        for key, shape in unet.items()
        if key.startswith(("time_embed", "label_emb", "input_blocks", "middle_block"))
    }
    a, b, c, d = hint
    first = unet["input_blocks.0.0.weight"][0]
    for number, (cin, cout) in enumerate([(3, a), (a, a), (a, b), (b, b), (b, c), (c, c), (c, d), (d, first)]):
        out[f"input_hint_block.{2 * number}.weight"] = (cout, cin, 3, 3)
        out[f"input_hint_block.{2 * number}.bias"] = (cout,)
    number = 0
    channels = first
    while True:
        block = {key: shape for key, shape in unet.items() if key.startswith(f"input_blocks.{number}.")}
        if not block:
            break
        for key in ("0.out_layers.3.weight", "0.op.weight", "0.weight"):
            channels = block.get(f"input_blocks.{number}.{key}", (channels,))[0]
        out[f"zero_convs.{number}.0.weight"] = (channels, channels, 1, 1)
        out[f"zero_convs.{number}.0.bias"] = (channels,)
        number += 1
    out["middle_block_out.0.weight"] = (channels, channels, 1, 1)
    out["middle_block_out.0.bias"] = (channels,)
    return out


def diffusers_name(checkpoints: ModuleType, key: str) -> str:
    """A key of `ldm_control` as diffusers' ControlNetModel spells it."""
    words = key.split(".")
    if words[0] == "zero_convs":
        return f"controlnet_down_blocks.{words[1]}.{words[3]}"
    if words[0] == "middle_block_out":
        return f"controlnet_mid_block.{words[2]}"
    if words[0] == "input_hint_block":
        place = int(words[1]) // 2
        name = {0: "conv_in", 7: "conv_out"}.get(place, f"blocks.{place - 1}")
        return f"controlnet_cond_embedding.{name}.{words[2]}"
    name: str = checkpoints._diffusers_unet_key(key)
    return name


def union(checkpoints: ModuleType, sizes: object, types: int = 6) -> Shapes:
    """xinsir's ControlNet++: diffusers' names and a small transformer with a typo in its name."""
    out = {diffusers_name(checkpoints, key): shape for key, shape in ldm_control(checkpoints, sizes).items()}
    width = out["conv_in.weight"][0]
    out["task_embedding"] = (types, width)
    layer = "transformer_layes.0"
    out[f"{layer}.attn.in_proj_weight"], out[f"{layer}.attn.in_proj_bias"] = (3 * width, width), (3 * width,)
    for name, (cout, cin) in {
        f"{layer}.attn.out_proj": (width, width),
        f"{layer}.mlp.c_fc": (4 * width, width),
        f"{layer}.mlp.c_proj": (width, 4 * width),
        "spatial_ch_projs": (width, width),
        "control_add_embedding.linear_1": (4 * width, 256 * types),
        "control_add_embedding.linear_2": (4 * width, 4 * width),
    }.items():
        out[f"{name}.weight"], out[f"{name}.bias"] = (cout, cin), (cout,)
    for norm in ("ln_1", "ln_2"):
        out[f"{layer}.{norm}.weight"] = out[f"{layer}.{norm}.bias"] = (width,)
    return out


def adapter(channels: tuple[int, ...], cells: int, *, light: bool = False) -> Shapes:
    """T2I-Adapter's Adapter (two resnets a level, counted through) or Adapter_light (four a level)."""
    out: Shapes = {}

    def conv(name: str, cout: int, cin: int, k: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (cout, cin, k, k), (cout,)

    width = cells
    if light:
        for level, wide in enumerate(channels):
            conv(f"body.{level}.in_conv", wide // 4, width, 1)
            for i in range(4):
                conv(f"body.{level}.body.{i}.block1", wide // 4, wide // 4, 3)
                conv(f"body.{level}.body.{i}.block2", wide // 4, wide // 4, 3)
            conv(f"body.{level}.out_conv", wide, wide // 4, 1)
            width = wide
        return out
    conv("conv_in", channels[0], cells, 3)
    width = channels[0]
    for level, wide in enumerate(channels):
        for i in range(2):
            if width != wide:
                conv(f"body.{2 * level + i}.in_conv", wide, width, 1)
            conv(f"body.{2 * level + i}.block1", wide, wide, 3)
            conv(f"body.{2 * level + i}.block2", wide, wide, 1)
            width = wide
    return out


def control_lora(whole: Mapping[str, np.ndarray], rank: int = 4) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Cut matrices and convolutions of the copied half into up and down; return the file and the products up @ down."""
    rng = np.random.default_rng(9)
    file: dict[str, np.ndarray] = {"lora_controlnet": np.zeros(0, np.float32)}
    products = {}
    for key, value in whole.items():
        copied = not key.startswith(("input_hint_block", "zero_convs", "middle_block_out"))
        if not copied or value.ndim < 2:
            file[key] = value
            continue
        stem = key.removesuffix(".weight")
        cin = math.prod(value.shape[1:])
        up = (0.1 * rng.standard_normal((value.shape[0], rank))).astype(np.float16).astype(np.float32)
        down = (cin**-0.5 * rng.standard_normal((rank, cin))).astype(np.float16).astype(np.float32)
        convolution = value.ndim == 4
        file[f"{stem}.up"] = up[:, :, None, None] if convolution else up
        file[f"{stem}.down"] = down.reshape(rank, *value.shape[1:])
        products[key] = (up @ down).reshape(value.shape)
    return file, products
