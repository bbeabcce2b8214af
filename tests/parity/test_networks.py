"""The first leg of parity: our packages on the portable engine against diffusers and transformers, in fp32.

PSNR over the whole output. 60 dB is the promise; the measured value stands beside it. What separates our fp32 results
from the references' is the factor head_dim^-1/2 that is folded into fp16 weights (exact only for powers of four).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from glassine.models.attention import FORMS
from glassine.models.config import UNetConfig
from glassine.models.text_encoder import text_encoder
from glassine.models.unet import unet
from glassine.models.vae import vae_decoder, vae_encoder

Opened = Callable[..., Any]
FORM = pytest.mark.parametrize(("attention", "layout"), sorted(FORMS))
PROMISED = 60.0  # dB, fp32


def halves(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal numbers that fp16 holds exactly, as float32."""
    return (scale * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)


def unet_inputs(config: UNetConfig, height: int, width: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = {
        "sample": halves(rng, 2, config.in_channels, height, width),
        "encoder_hidden_states": halves(rng, 2, config.context_dim, 1, tokens),
    }
    if config.time_ids is not None:
        # Sizes above 2048 and odd are what fp16 cannot hold.
        inputs["time_ids"] = np.array([[4095, 3001, 17, 0, 1024, 1024], [512, 768, 0, 5, 2049, 769]], np.float32)
        inputs["text_embeds"] = halves(rng, 2, config.pooled_dim)
    if config.timestep_cond_dim is not None:
        inputs["timestep_cond"] = halves(rng, 2, config.timestep_cond_dim)
    return inputs


def reference_unet(module: torch.nn.Module, timestep: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    added = {name: given[name] for name in ("time_ids", "text_embeds") if name in given}
    context = given["encoder_hidden_states"][:, :, 0].transpose(1, 2)
    return module(
        given["sample"],
        torch.from_numpy(timestep),
        context,
        timestep_cond=given.get("timestep_cond"),
        added_cond_kwargs=added or None,
    ).sample.numpy()


# Two samples with times of their own, the last and the first training step, and times between two steps.
TIMES = [np.array(pair, np.float32) for pair in ((999.0, 0.0), (481.0, 481.0), (946.42, 7.31))]


@FORM
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "pruned", "lcm"])
def test_unet(networks: Any, opened: Opened, family: str, attention: str, layout: str) -> None:
    config, module = networks.unet(family)
    height, width, tokens = 12, 8, 9
    engine = opened(
        unet,
        config,
        networks.state(module),
        height=height,
        width=width,
        tokens=tokens,
        attention=attention,
        layout=layout,
    )
    inputs = unet_inputs(config, height, width, tokens)
    for timestep in TIMES:
        actual = engine.predict(timestep=timestep, **inputs)["noise_pred"]
        expected = reference_unet(module, timestep, inputs)
        assert networks.decibels(actual, expected) >= PROMISED


@FORM
@pytest.mark.parametrize(("height", "width"), [(24, 25), (33, 31)])
def test_unet_whose_tokens_do_not_fill_the_chunks(
    networks: Any, opened: Opened, height: int, width: int, attention: str, layout: str
) -> None:
    """600 tokens are a chunk of 512 and one of 88; odd sizes are halved upwards and must come back as they were."""
    config, module = networks.unet("sd1")
    engine = opened(
        unet, config, networks.state(module), height=height, width=width, tokens=77, attention=attention, layout=layout
    )
    inputs = unet_inputs(config, height, width, 77)
    actual = engine.predict(timestep=TIMES[1], **inputs)["noise_pred"]
    assert networks.decibels(actual, reference_unet(module, TIMES[1], inputs)) >= PROMISED


@FORM
def test_vae_decoder(networks: Any, opened: Opened, attention: str, layout: str) -> None:
    config, module = networks.vae()
    arrays = networks.part_of(networks.state(module), "decoder.", "post_quant_conv.")
    engine = opened(vae_decoder, config, arrays, height=24, width=25, attention=attention, layout=layout)
    z = halves(np.random.default_rng(1), 1, config.latent_channels, 24, 25)
    expected = module.decode(torch.from_numpy(z)).sample.numpy()
    assert networks.decibels(engine.predict(z=z)["image"], expected) >= PROMISED


@FORM
def test_vae_encoder(networks: Any, opened: Opened, attention: str, layout: str) -> None:
    config, module = networks.vae()
    arrays = networks.part_of(networks.state(module), "encoder.", "quant_conv.")
    engine = opened(vae_encoder, config, arrays, height=56, width=40, attention=attention, layout=layout)
    x = halves(np.random.default_rng(2), 1, 3, 56, 40, scale=0.5)
    expected = module.encode(torch.from_numpy(x)).latent_dist.parameters.numpy()
    assert networks.decibels(engine.predict(x=x)["latent"], expected) >= PROMISED


@pytest.mark.parametrize("kind", ["clip_l", "open_clip", "projected"])
def test_text_encoder(networks: Any, opened: Opened, kind: str) -> None:
    config, module = networks.text(kind)
    engine = opened(text_encoder, config, networks.state(module))
    rng = np.random.default_rng(3)
    # The first end-of-text token counts; what pads the rest may be the same token (SD1) or 0 (SD2, SDXL).
    for length, padding in itertools.product((1, 20, config.tokens - 2), (0, config.vocab_size - 1)):
        ids = np.full((1, config.tokens), padding)
        ids[0, : length + 1] = [config.vocab_size - 2, *rng.integers(1, config.vocab_size - 2, length)]
        ids[0, length + 1] = config.vocab_size - 1
        actual = engine.predict(input_ids=ids.astype(np.float32))
        expected = reference_text(module, config, torch.from_numpy(ids))
        assert set(actual) == set(expected)
        for name, array in expected.items():
            assert networks.decibels(actual[name], array) >= PROMISED, name


def reference_text(module: torch.nn.Module, config: Any, ids: torch.Tensor) -> dict[str, np.ndarray]:
    out = module(ids, output_hidden_states=True)
    norm = getattr(module, "text_model", module).final_layer_norm
    states = torch.cat(out.hidden_states[1:])
    if config.final_norm:
        states = norm(states)
    pooled = out.pooler_output if config.projection_dim is None else out.text_embeds
    return {
        "last_hidden_state": states[config.layers - 1 - config.skip][None].numpy(),
        "pooled_outputs": pooled.numpy(),
        "hidden_states": states.numpy(),
    }
