"""Pictures into latents, against diffusers' VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from glassine.errors import EngineError
from glassine.runtime.latents import encode_image

Array = np.ndarray[Any, Any]
IMAGE = np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((1, 4, 16, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        **blocks,
    ).eval()


def test_the_mean_and_a_sample_are_diffusers(vae: AutoencoderKL) -> None:
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(IMAGE)).latent_dist

    def predict(*, x: Array) -> dict[str, Array]:
        assert np.array_equal(x, IMAGE)
        return {"latent": posterior.parameters.numpy()}

    mean = encode_image(predict, IMAGE, latent_scale=vae.config.scaling_factor)
    assert np.array_equal(mean, posterior.mean.numpy() * np.float32(0.5))
    sample = encode_image(predict, IMAGE, latent_scale=0.5, noise=NOISE)
    expected = (posterior.mean.numpy() + posterior.std.numpy() * NOISE) * 0.5
    np.testing.assert_allclose(sample, expected, rtol=1e-6, atol=1e-7)  # measured 1e-7
    assert mean.dtype == sample.dtype == np.float32


def test_log_variances_are_clipped_as_in_ldm() -> None:
    moments = np.zeros((1, 8, 2, 2), np.float32)
    moments[:, 4:] = [[-1000, -30], [20, 1000]]
    sample = encode_image(
        lambda x: {"latent": moments}, IMAGE, latent_scale=1.0, noise=np.ones((1, 4, 2, 2), np.float32)
    )
    np.testing.assert_allclose(sample[0, 0], np.exp([[-15, -15], [10, 10]]), rtol=1e-6)  # measured 6e-8


def test_the_encoders_buffer_is_not_kept() -> None:
    buffer = np.ones((1, 8, 2, 2), np.float32)
    z = encode_image(lambda x: {"latent": buffer}, IMAGE, latent_scale=1.0)
    buffer[:] = 7
    assert (z == 1).all()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"moments": np.zeros((1, 8, 2, 2))}, 'output "latent" is nothing'),
        ({"latent": np.zeros((8, 2, 2))}, r'output "latent" is \(8, 2, 2\), expected \(1, 8, h, w\)'),
        ({"latent": np.zeros((1, 7, 2, 2))}, r"is \(1, 7, 2, 2\)"),
        ({"latent": np.full((1, 8, 2, 2), np.nan)}, "NaN or infinity; run it in fp32"),
    ],
)
def test_encoders_that_answer_something_else(outputs: dict[str, Array], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        encode_image(lambda x: outputs, IMAGE, latent_scale=1.0)
