"""The networks of the family: the real classes of Stable Diffusion 1.5 and LayerDiffuse, only narrower."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from glassine.models.tiny.train.captions import TOKENS, vocabulary

Net = TypeVar("Net", bound=nn.Module)
SIZE = 256  # pixels a side
LATENT_SCALE = 0.18215
NORM_GROUPS = 8
UNET_CHANNELS = (32, 48, 64, 64)
UNET_HEADS = 2  # on every level
VAE_CHANNELS = (32, 40, 48, 48)
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 64, 3, 4
HINT_CHANNELS = (8, 16, 24, 32)
HINT_GAIN = 1.9  # of each convolution of the hint encoder at the start: what SiLU takes from small values
ALPHA_CHANNELS = (12, 12, 16, 16, 24, 16, 16)
OFFSET_CHANNELS = (8, 16, 24, 32)


def vae() -> AutoencoderKL:
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8)."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=NORM_GROUPS,
        scaling_factor=LATENT_SCALE,
    )


def text_encoder() -> CLIPTextModel:
    """Token ids (B, 77) -> hidden states (B, 77, TEXT_WIDTH)."""
    vocab, _ = vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=TEXT_HEADS,
            max_position_embeddings=TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
            pad_token_id=vocab["<|endoftext|>"],
        )
    )


def unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet; what adds to a residual stream starts at zero, so that the net starts simple."""
    net = UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=UNET_CHANNELS,
        attention_head_dim=UNET_HEADS,  # diffusers' name for the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=NORM_GROUPS,
    )
    for name, module in net.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
            _zero(module)
    return net


def controlnet(net: UNet2DConditionModel) -> ControlNetModel:
    """Return the trainable copy of the UNet's encoder with its hint encoder and zero convolutions.

    The hint encoder starts so that edges come through it at the strength of the latents: with the usual initialisation
    a sparse drawing of lines fades to less than bf16 can tell from the biases, and is never found. The zero
    convolutions alone make the start harmless.
    """
    control = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=HINT_CHANNELS)
    for module in control.controlnet_cond_embedding.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=HINT_GAIN / (module.in_channels * 9) ** 0.5)
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    return control


def _zero(layer: nn.Module) -> None:
    for weight in layer.parameters():
        nn.init.zeros_(weight)


class AlphaDecoder(nn.Module):
    """LayerDiffuse's transparent decoder: picture (B, 3, H, W) in [0, 1] and latents (B, 4, H/8, W/8) -> [A, R, G, B].

    A UNet of seven levels whose third downsampling meets the latents; attention (heads of 8) on the three lowest.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, last = ALPHA_CHANNELS, len(ALPHA_CHANNELS) - 1
        common = {"temb_channels": None, "resnet_eps": 1e-5, "resnet_groups": 4}
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.latent_conv_in = nn.Conv2d(4, widths[2], 1)
        _zero(self.latent_conv_in)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            ends = {"in_channels": widths[max(level - 1, 0)], "out_channels": width, "num_layers": 2, **common}
            if level < 4:
                self.down_blocks.append(DownBlock2D(**ends))
            else:
                kind = "conv" if level < last else None
                self.down_blocks.append(AttnDownBlock2D(attention_head_dim=8, downsample_type=kind, **ends))
        self.mid_block = UNetMidBlock2D(in_channels=widths[-1], attention_head_dim=8, **common)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            ends = {
                "in_channels": widths[max(level - 1, 0)],
                "prev_output_channel": widths[min(level + 1, last)],
                "out_channels": widths[level],
                "num_layers": 3,
                **common,
            }
            if level >= 4:
                self.up_blocks.append(AttnUpBlock2D(attention_head_dim=8, **ends))
            else:
                self.up_blocks.append(UpBlock2D(add_upsample=level > 0, **ends))
        self.conv_norm_out = nn.GroupNorm(4, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], 4, 3, padding=1)

    def forward(self, picture: Tensor, latents: Tensor) -> Tensor:
        """Return [alpha, R, G, B] (B, 4, H, W), nominally in [0, 1]."""
        h = self.conv_in(picture)
        skips = [h]
        for level, block in enumerate(self.down_blocks):
            if level == 3:
                h = h + self.latent_conv_in(latents)  # the skip stored before stays without the latents
            h, states = block(h)
            skips += states
        h = self.mid_block(h)
        for block in self.up_blocks:
            h = block(h, tuple(skips[-3:]))
            del skips[-3:]
        return self.conv_out(nn.functional.silu(self.conv_norm_out(h)))


class OffsetEncoder(nn.Module):
    """LayerDiffuse's transparent encoder: [A, R, G, B] (B, 4, H, W) in [0, 1] -> latent offset in posterior sigmas."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = OFFSET_CHANNELS
        steps = [(4, a, 1), (a, a, 1), (a, b, 2), (b, b, 1), (b, c, 2), (c, c, 1), (c, d, 2), (d, d, 1), (d, 4, 1)]
        layers: list[nn.Module] = []
        for narrow, wide, stride in steps:
            layers += [nn.Conv2d(narrow, wide, 3, padding=1, stride=stride), nn.SiLU()]
        self.blocks = nn.Sequential(*layers[:-1])
        _zero(self.blocks[-1])

    def forward(self, argb: Tensor) -> Tensor:
        """Return the offset (B, 4, H/8, W/8)."""
        return self.blocks(argb)


class LoRA(nn.Module):
    """A frozen layer and a low-rank addition: W x + up(down(x)); alpha equals the rank, so the scale is 1."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):
            # Like the layer itself: kernel, stride and padding are its own.
            kernel, stride, padding = base.kernel_size[0], base.stride[0], int(base.padding[0])
            self.down: nn.Conv2d | nn.Linear = nn.Conv2d(base.in_channels, rank, kernel, stride, padding, bias=False)
            self.up: nn.Conv2d | nn.Linear = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its addition."""
        return self.base(x) + self.up(self.down(x))


def add_lora(net: nn.Module, targets: tuple[str, ...], rank: int) -> dict[str, LoRA]:
    """Wrap every layer of `net` whose name ends with one of `targets`; return the wrappers by layer name.

    Everything but the additions is frozen.
    """
    net.requires_grad_(False)
    chosen = {
        name: module
        for name, module in net.named_modules()
        if name.endswith(targets) and isinstance(module, nn.Linear | nn.Conv2d)
    }
    wrapped = {}
    for name, module in chosen.items():
        parent, _, leaf = name.rpartition(".")
        wrapped[name] = LoRA(module, rank)
        setattr(net.get_submodule(parent), leaf, wrapped[name])
    return wrapped


def freeze(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return `net` in evaluation mode, without gradients, in this dtype."""
    return net.eval().requires_grad_(False).to(dtype)
