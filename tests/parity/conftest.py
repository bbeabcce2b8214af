"""References for parity: diffusers' and transformers' own networks at tiny sizes, with weights exact in fp16."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from glassine.convert.package import write_package
from glassine.convert.program import Requests, lower
from glassine.convert.weights import Arrays
from glassine.models.config import TextEncoderConfig, UNetConfig, VAEConfig
from glassine.runtime.engine import Engine, EngineOptions, open_engine

Arrays32 = dict[str, np.ndarray]

# Depths, heads and projections as the families have them, at a twentieth of the width.
UNETS = {
    "sd1": UNetConfig(
        channels=(32, 64),
        layers=1,
        down_depths=((1,), (0,)),
        up_depths=((0, 0), (1, 1)),
        heads=(2, 2),
        context_dim=24,
        norm_groups=8,
    ),
    "sd2": UNetConfig(
        channels=(32, 64),
        layers=2,
        down_depths=((1, 1), (0, 0)),
        up_depths=((0, 0, 0), (1, 1, 1)),
        heads=(2, 4),
        context_dim=40,
        norm_groups=8,
        linear_projection=True,
    ),
    "sdxl": UNetConfig(
        channels=(32, 64),
        layers=1,
        down_depths=((0,), (2,)),
        mid_depth=2,
        up_depths=((2, 2), (0, 0)),
        heads=(2, 4),
        context_dim=48,
        norm_groups=8,
        linear_projection=True,
        time_ids=6,
        pooled_dim=20,
    ),
    "pruned": UNetConfig(
        in_channels=9,
        channels=(32, 64),
        layers=1,
        down_depths=((0,), (3,)),
        mid_depth=None,
        up_depths=((3, 3), (0, 0)),
        heads=(1, 1),
        context_dim=24,
        norm_groups=8,
    ),
    "lcm": UNetConfig(
        channels=(32, 64),
        layers=1,
        down_depths=((1,), (0,)),
        up_depths=((0, 0), (1, 1)),
        heads=(4, 8),
        context_dim=24,
        norm_groups=8,
        timestep_cond_dim=16,
    ),
}
VAE = VAEConfig(channels=(32, 64), layers=1, norm_groups=8)
TEXTS = {
    "clip_l": TextEncoderConfig(vocab_size=99, width=48, layers=3, heads=3, intermediate=96),
    "open_clip": TextEncoderConfig(
        vocab_size=99, width=64, layers=2, heads=1, intermediate=80, activation="gelu", final_norm=False, skip=1
    ),
    "projected": TextEncoderConfig(
        vocab_size=99, width=32, layers=3, heads=2, intermediate=64, activation="gelu", projection_dim=24, skip=2
    ),
}


def diffusers_unet(config: UNetConfig) -> torch.nn.Module:
    """diffusers' own UNet for one of our descriptions."""

    def kind(direction: str, depths: tuple[int, ...]) -> str:
        return f"CrossAttn{direction}Block2D" if any(depths) else f"{direction}Block2D"

    extra: dict[str, Any] = {}
    if config.time_ids is not None:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config.pooled_dim + 256 * config.time_ids,
        }
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=tuple(kind("Down", depths) for depths in config.down_depths),
        mid_block_type="UNetMidBlock2DCrossAttn" if config.mid_depth is not None else None,
        up_block_types=tuple(kind("Up", depths) for depths in config.up_depths),
        transformer_layers_per_block=tuple(max(depths[0], 1) for depths in config.down_depths),
        attention_head_dim=config.heads,  # the number of heads, in spite of its name
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        time_cond_proj_dim=config.timestep_cond_dim,
        **extra,
    )


def diffusers_vae(config: VAEConfig) -> torch.nn.Module:
    levels = len(config.channels)
    return AutoencoderKL(
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )


def transformers_clip(config: TextEncoderConfig) -> torch.nn.Module:
    described = CLIPTextConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.tokens,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate,
        hidden_act=config.activation,
        projection_dim=config.projection_dim or config.width,
        eos_token_id=config.vocab_size - 1,
        bos_token_id=config.vocab_size - 2,
        pad_token_id=0,
    )
    return (CLIPTextModel if config.projection_dim is None else CLIPTextModelWithProjection)(described)


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter values that keep activations near 1, make attention matter, and are exact in fp16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                value = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                gain = 1.5 if "to_q" in name or "to_k" in name else 1.0  # scores with a deviation of 2
                value = gain * noise / parameter[0].numel() ** 0.5
            parameter.copy_(value.half().float())
    return module.eval().requires_grad_(False)


def state(module: torch.nn.Module) -> Arrays32:
    """The module's weights by canonical name."""
    arrays = {name: tensor.float().numpy() for name, tensor in module.state_dict().items()}
    if isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
        # transformers 5.6 dropped the prefix of CLIPTextModel and kept that of CLIPTextModelWithProjection.
        arrays = {
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": array
            for name, array in arrays.items()
        }
    return {name: array for name, array in arrays.items() if not name.endswith("position_ids")}


def part_of(arrays: Arrays32, *prefixes: str) -> Arrays32:
    return {name: array for name, array in arrays.items() if name.startswith(prefixes)}


def write_network(path: Path, write: Callable[..., Any], config: Any, arrays: Arrays32, **sizes: Any) -> None:
    """Write a network with these weights as a package; every weight must be asked for, once."""
    requests = Requests({name: array.shape for name, array in arrays.items()})
    lowered = lower(write(config, requests, **sizes))
    assert set(requests.asked) == set(arrays)
    write_package(path, lowered, Arrays(arrays))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """opened(network, config, arrays, precision=..., **sizes): the network's package on the portable engine."""
    engines: list[Engine] = []

    def open_network(
        write: Callable[..., Any], config: Any, arrays: Arrays32, *, precision: str = "fp32", **sizes: Any
    ) -> Engine:
        path = tmp_path / f"{len(engines)}.mlpackage"
        write_network(path, write, config, arrays, **sizes)
        engines.append(open_engine(path, EngineOptions(engine="portable", precision=precision)))
        return engines[-1]

    yield open_network
    for engine in engines:
        engine.close()


def decibels(actual: np.ndarray, expected: np.ndarray) -> float:
    """PSNR of a whole array: peak of the expected values over the root mean square error."""
    assert actual.shape == expected.shape
    error = np.sqrt(np.mean((actual.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return float(20 * np.log10(float(np.abs(expected).max()) / max(error, 1e-300)))


class Networks:
    """Each reference network, built once, beside our description of it."""

    state = staticmethod(state)
    part_of = staticmethod(part_of)
    randomised = staticmethod(randomised)
    decibels = staticmethod(decibels)

    @staticmethod
    def diffusers_unet(config: UNetConfig) -> torch.nn.Module:
        return randomised(diffusers_unet(config))

    @staticmethod
    def diffusers_vae(config: VAEConfig) -> torch.nn.Module:
        return randomised(diffusers_vae(config))

    @staticmethod
    def transformers_clip(config: TextEncoderConfig) -> torch.nn.Module:
        return randomised(transformers_clip(config))

    def __init__(self) -> None:
        self._built: dict[str, tuple[Any, torch.nn.Module]] = {}

    def _network(self, name: str, config: Any, make: Callable[[Any], torch.nn.Module]) -> tuple[Any, torch.nn.Module]:
        if name not in self._built:
            self._built[name] = (config, randomised(make(config)))
        return self._built[name]

    def unet(self, family: str) -> tuple[UNetConfig, torch.nn.Module]:
        return self._network(f"unet {family}", UNETS[family], diffusers_unet)

    def vae(self) -> tuple[VAEConfig, torch.nn.Module]:
        return self._network("vae", VAE, diffusers_vae)

    def text(self, kind: str) -> tuple[TextEncoderConfig, torch.nn.Module]:
        return self._network(f"text {kind}", TEXTS[kind], transformers_clip)


@pytest.fixture(scope="session")
def networks() -> Networks:
    """The reference networks and what compares with them."""
    return Networks()
