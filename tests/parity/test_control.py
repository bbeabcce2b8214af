"""The first leg of parity for control: our packages on the portable engine against diffusers.

60 dB is the promise; the lowest value measured stands beside it. Hints and inputs are exact in fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter

from glassine.models.adapter import adapter
from glassine.models.config import SD15, AdapterConfig, ControlNetConfig, UNetConfig
from glassine.models.controlnet import controlnet, union_hint
from glassine.models.unet import feature_shapes, skip_shapes, unet

Opened = Callable[..., Any]
PROMISED = 60.0  # dB
HEIGHT, WIDTH, TOKENS = 12, 8, 9
TIMES = np.array((946.42, 7.0), np.float32)

SD1 = UNetConfig(
    channels=(32, 64),
    layers=1,
    down_depths=((1,), (0,)),
    up_depths=((0, 0), (1, 1)),
    heads=(2, 2),
    context_dim=24,
    norm_groups=8,
)
SD2 = replace(SD1, heads=(2, 4), context_dim=40, linear_projection=True)
SDXL = UNetConfig(
    channels=(32, 64, 64),
    layers=1,
    down_depths=((0,), (1,), (2,)),
    mid_depth=2,
    up_depths=((2, 2), (1, 1), (0, 0)),
    heads=(2, 4, 4),
    context_dim=48,
    norm_groups=8,
    linear_projection=True,
    time_ids=6,
    pooled_dim=20,
)
WIDTHS = (8, 8, 12, 16)
NETS = {
    "sd1": ControlNetConfig(unet=SD1, hint_widths=WIDTHS),
    "shuffle": ControlNetConfig(unet=SD1, hint_widths=WIDTHS, pooled=True),
    "sd2": ControlNetConfig(unet=SD2, hint_widths=WIDTHS),
    "sdxl": ControlNetConfig(unet=SDXL, hint_widths=WIDTHS),
    "mid": ControlNetConfig(
        unet=replace(SDXL, down_depths=((0,), (0,), (1,)), mid_depth=1, projected_levels=(1,)), hint_widths=WIDTHS
    ),
    "small": ControlNetConfig(
        unet=replace(SDXL, down_depths=((0,),) * 3, mid_depth=0, mid_resnets=1), hint_widths=WIDTHS
    ),
    "union": ControlNetConfig(unet=SDXL, hint_widths=WIDTHS, control_types=6),
}


def diffusers_control(config: ControlNetConfig) -> torch.nn.Module:
    half = config.unet
    attends = [any(depths) or i in half.projected_levels for i, depths in enumerate(half.down_depths)]
    described: dict[str, Any] = {
        "in_channels": half.in_channels,
        "block_out_channels": half.channels,
        "layers_per_block": half.layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        "transformer_layers_per_block": tuple(
            depths[0] if yes else 1 for yes, depths in zip(attends, half.down_depths, strict=True)
        ),
        "attention_head_dim": half.heads,
        "cross_attention_dim": half.context_dim,
        "use_linear_projection": half.linear_projection,
        "norm_num_groups": half.norm_groups,
        "conditioning_embedding_out_channels": config.hint_widths,
        "global_pool_conditions": config.pooled,
    }
    if half.time_ids is not None:
        described |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": half.pooled_dim + 256 * half.time_ids,
        }
    if config.control_types is not None:
        width = half.channels[0]
        described |= {"num_control_type": config.control_types, "num_trans_channel": width, "num_proj_channel": width}
        return ControlNetUnionModel(**described)
    middle = "UNetMidBlock2DCrossAttn" if half.mid_depth else "UNetMidBlock2D"
    return ControlNetModel(mid_block_type=middle, **described)


def halves(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)


def inputs_of(config: UNetConfig, height: int = HEIGHT, width: int = WIDTH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = {
        "sample": halves(rng, 2, config.in_channels, height, width),
        "encoder_hidden_states": halves(rng, 2, config.context_dim, 1, TOKENS),
        "timestep": TIMES,
    }
    if config.time_ids is not None:
        inputs["time_ids"] = np.array([[4095, 3001, 17, 0, 1024, 1024], [512, 768, 0, 5, 2049, 769]], np.float32)
        inputs["text_embeds"] = halves(rng, 2, config.pooled_dim)
    return inputs


def hint_of(channels: int, height: int = HEIGHT, width: int = WIDTH, rows: int = 2) -> np.ndarray:
    """One picture in all rows, as rows that are drawn together have it."""
    picture = np.random.default_rng(1).random((1, channels, 8 * height, 8 * width)).astype(np.float16)
    return np.repeat(picture, rows, axis=0).astype(np.float32)


def arguments(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same inputs as diffusers takes them."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    added = {name: given[name] for name in ("time_ids", "text_embeds") if name in given}
    return {
        "sample": given["sample"],
        "timestep": given["timestep"],
        "encoder_hidden_states": given["encoder_hidden_states"][:, :, 0].transpose(1, 2),
        "added_cond_kwargs": added or None,
    }


def expected_residuals(module: torch.nn.Module, config: ControlNetConfig, given: dict[str, Any]) -> list[np.ndarray]:
    down, middle = module(**given, return_dict=False)
    shapes = skip_shapes(config.unet, *given["sample"].shape[2:])
    residuals = [tensor.numpy() for tensor in (*down, middle)]
    assert len(residuals) == len(shapes) + 1
    return [np.broadcast_to(r, (len(r), *shape)) for r, shape in zip(residuals, [*shapes, shapes[-1]], strict=True)]


def weights_of(networks: Any, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """A ControlNet++ has its attention in one matrix, and reads a third of it."""
    arrays = {}
    for name, array in networks.state(module).items():
        if "attn.in_proj" in name:
            arrays[name.replace("in_proj_", "to_v.")] = array[2 * len(array) // 3 :]
        else:
            arrays[name.replace("attn.out_proj.", "attn.to_out.0.")] = array
    return arrays


FULL = [("split", "channels_first"), ("einsum", "channels_last"), ("sdpa", "channels_last")]


@pytest.mark.parametrize(
    ("name", "attention", "layout"),
    [
        *(("sd1", *form) for form in FULL),
        *((name, "split", "channels_first") for name in ("shuffle", "sd2", "sdxl", "mid", "small")),
    ],
)
def test_controlnet(networks: Any, opened: Opened, name: str, attention: str, layout: str) -> None:
    config = NETS[name]
    module = networks.randomised(diffusers_control(config))
    sizes = {"height": HEIGHT, "width": WIDTH, "tokens": TOKENS, "attention": attention, "layout": layout}
    engine = opened(controlnet, config, weights_of(networks, module), **sizes)
    inputs = {**inputs_of(config.unet), "controlnet_cond": hint_of(3)}
    given = {**arguments(inputs), "controlnet_cond": torch.from_numpy(inputs["controlnet_cond"])}
    actual = engine.predict(**{name: inputs[name] for name in engine.inputs})
    expected = expected_residuals(module, config, given)
    assert len(actual) == len(expected)
    for i, residual in enumerate(expected):
        assert networks.decibels(actual[f"additional_residual_{i}"], residual) >= PROMISED, i  # measured 95.8


@pytest.mark.parametrize("form", FULL[:2])
@pytest.mark.parametrize("hints", [{3: 1.0}, {3: 1.3, 0: 0.4, 1: 0.8}], ids=["one", "three"])
def test_union(networks: Any, opened: Opened, hints: dict[int, float], form: tuple[str, str]) -> None:
    """Several hints of several kinds in one pass, each with its weight, as diffusers takes them."""
    config = NETS["union"]
    module = networks.randomised(diffusers_control(config))
    sizes = {"height": HEIGHT, "width": WIDTH, "attention": form[0], "layout": form[1]}
    weights = weights_of(networks, module)
    own = ("controlnet_cond_embedding.", "task_embedding", "transformer_layes.", "spatial_ch_projs.")
    hinter = opened(union_hint, config, {k: v for k, v in weights.items() if k.startswith(own)}, **sizes)
    rest = {name: array for name, array in weights.items() if not name.startswith(own)}
    engine = opened(controlnet, config, rest, **sizes, tokens=TOKENS)
    kinds = np.eye(config.control_types, dtype=np.float32)
    pictures = {kind: halves(np.random.default_rng(kind), *hint_of(3)[:1].shape) for kind in hints}
    fused = sum(
        hinter.predict(
            controlnet_cond=pictures[kind], control_type=kinds[[kind]], control_weight=np.array([weight], np.float32)
        )["fused_hint"].astype(np.float32)
        for kind, weight in hints.items()
    )
    many = np.tile(kinds[list(hints)].max(axis=0), (2, 1))
    inputs = {**inputs_of(config.unet), "control_type": many, "fused_hint": np.repeat(fused, 2, axis=0)}
    given = {
        **arguments(inputs_of(config.unet)),
        "controlnet_cond": [torch.from_numpy(picture).repeat(2, 1, 1, 1) for picture in pictures.values()],
        "control_type": torch.from_numpy(many),
        "control_type_idx": list(hints),
        "conditioning_scale": list(hints.values()),
    }
    actual = engine.predict(**{name: inputs[name] for name in engine.inputs})
    for i, residual in enumerate(expected_residuals(module, config, given)):
        assert networks.decibels(actual[f"additional_residual_{i}"], residual) >= PROMISED, i


# The controlled and the adapted UNet, and what makes their inputs.

ADAPTERS = {
    # The base's depths decide where a feature goes: a level with attention takes it before it halves the size.
    "full": (SD1, AdapterConfig(channels=(32, 64), halved=(False, True)), "full_adapter"),
    "light": (SD1, AdapterConfig(channels=(32, 64), layers=3, halved=(False, True), light=True), "light_adapter"),
    "xl": (
        SDXL,
        AdapterConfig(hint_channels=1, channels=(32, 64, 64, 64), shrink=16, halved=(False, False, True, False)),
        "full_adapter_xl",
    ),
}


def diffusers_adapter(config: AdapterConfig, kind: str) -> torch.nn.Module:
    module = T2IAdapter(config.hint_channels, list(config.channels), config.layers, config.shrink, kind)
    del module.adapter.body[len(config.channels) :]  # a light one has a level more than its list says
    return module


def steering(config: UNetConfig, height: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = skip_shapes(config, height, width) if config.residuals else []
    arrays = {f"additional_residual_{i}": halves(rng, 2, *shape) for i, shape in enumerate([*shapes, *shapes[-1:]])}
    features = feature_shapes(config, height, width)
    return arrays | {f"adapter_residual_{i}": halves(rng, 2, *shape) for i, shape in enumerate(features)}


@pytest.mark.parametrize(
    ("family", "residuals", "features", "attention", "layout"),
    [
        *(("sd1", True, 0, *form) for form in FULL),
        ("sd1", True, 2, "split", "channels_first"),
        ("sd1", False, 1, "split", "channels_first"),
        ("sdxl", True, 0, "split", "channels_first"),
        ("sdxl", True, 4, "split", "channels_first"),
    ],
)
def test_steered_unet(
    networks: Any, opened: Opened, family: str, residuals: bool, features: int, attention: str, layout: str
) -> None:
    base = {"sd1": SD1, "sdxl": SDXL}[family]
    module = networks.diffusers_unet(base)
    config = replace(base, residuals=residuals, features=features)
    # An odd size: features and residuals are halved upwards, as the UNet does.
    height, width = (12, 9) if family == "sd1" else (12, 8)
    sizes = {"height": height, "width": width, "tokens": TOKENS, "attention": attention, "layout": layout}
    engine = opened(unet, config, networks.state(module), **sizes)
    inputs = inputs_of(config, height, width)
    extra = steering(config, height, width)
    tensors = [torch.from_numpy(array) for name, array in extra.items() if name.startswith("additional")]
    added = [torch.from_numpy(array) for name, array in extra.items() if name.startswith("adapter")]
    given: dict[str, Any] = {}
    if tensors:
        given = {"down_block_additional_residuals": tensors[:-1], "mid_block_additional_residual": tensors[-1]}
    if added:
        given["down_intrablock_additional_residuals"] = added
    actual = engine.predict(**inputs, **extra)["noise_pred"]
    expected = module(**arguments(inputs), **given).sample.numpy()
    plain = module(**arguments(inputs)).sample.numpy()
    assert networks.decibels(actual, expected) >= PROMISED  # measured 96.8
    assert networks.decibels(plain, expected) < 30  # the residuals are seen


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_adapter(networks: Any, opened: Opened, name: str) -> None:
    base, config, kind = ADAPTERS[name]
    module = networks.randomised(diffusers_adapter(config, kind))
    height, width = (12, 8) if config.shrink == 16 else (12, 9)
    engine = opened(adapter, config, networks.state(module), height=height, width=width)
    hint = hint_of(config.hint_channels, height, width, rows=1)
    actual = engine.predict(controlnet_cond=hint)
    expected = [feature.numpy() for feature in module(torch.from_numpy(hint))]
    assert [f.shape[1:] for f in expected] == feature_shapes(replace(base, features=len(expected)), height, width)
    for i, feature in enumerate(expected):
        assert networks.decibels(actual[f"adapter_residual_{i}"], feature) >= PROMISED, i  # measured 111.8


def test_no_control_is_exact(networks: Any, opened: Opened) -> None:
    """Zeros for every residual give what the plain UNet gives, bit for bit."""
    module = networks.diffusers_unet(SD1)
    sizes = {"height": HEIGHT, "width": WIDTH, "tokens": TOKENS}
    config = replace(SD1, residuals=True, features=2)
    plain, steered = (opened(unet, each, networks.state(module), **sizes) for each in (SD1, config))
    inputs = inputs_of(SD1)
    zeros = {name: np.zeros_like(array) for name, array in steering(config, HEIGHT, WIDTH).items()}
    np.testing.assert_array_equal(
        steered.predict(**inputs, **zeros)["noise_pred"], plain.predict(**inputs)["noise_pred"]
    )


@pytest.mark.full
def test_stable_diffusion_1_5(networks: Any, opened: Opened) -> None:
    """The real sizes, net and UNet, at 256 x 256; 9 GB of memory."""
    config = ControlNetConfig(unet=SD15.unet)
    inputs = {name: array[:1] for name, array in inputs_of(SD15.unet, 32, 32).items()}
    module = networks.randomised(diffusers_control(config))
    hint = hint_of(3, 32, 32, rows=1)
    given = arguments(inputs)
    expected = expected_residuals(module, config, {**given, "controlnet_cond": torch.from_numpy(hint)})
    engine = opened(controlnet, config, networks.state(module), batch=1, height=32, width=32, tokens=TOKENS)
    del module
    actual = engine.predict(**inputs, controlnet_cond=hint)
    engine.close()
    for i, residual in enumerate(expected):
        assert networks.decibels(actual[f"additional_residual_{i}"], residual) >= PROMISED, i
    steered = replace(SD15.unet, residuals=True)
    module = networks.diffusers_unet(SD15.unet)
    tensors = [torch.from_numpy(np.array(residual)) for residual in expected]
    extra = {"down_block_additional_residuals": tensors[:-1], "mid_block_additional_residual": tensors[-1]}
    noise = module(**given, **extra).sample.numpy()
    engine = opened(unet, steered, networks.state(module), batch=1, height=32, width=32, tokens=TOKENS)
    del module
    residuals = {f"additional_residual_{i}": np.array(residual) for i, residual in enumerate(expected)}
    assert networks.decibels(engine.predict(**inputs, **residuals)["noise_pred"], noise) >= PROMISED
