"""The probe that decides whether a VAE may be written in float16."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from glassine.convert import folder, reference, vae_range
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.vae_range import BOUND, probe_vae
from glassine.errors import ConversionError

WIDE = "first_stage_model.decoder.up.1.block.0.conv2.weight"
OPTIONS = ConvertOptions(sizes=((64, 64),), part="vae", family="sdxl", dry_run=True)


@pytest.fixture(scope="module")
def tensors(checkpoints):
    return checkpoints.values({f"first_stage_model.{k}": s for k, s in checkpoints.ldm_vae(checkpoints.TINY).items()})


def write(checkpoints, tmp_path, tensors):
    return checkpoints.write_safetensors(
        tmp_path / "vae.safetensors", tensors, metadata=checkpoints.TINY.header(), dtype="F32"
    )


def test_what_the_probe_computes_is_the_vae(checkpoints, tmp_path, tensors, monkeypatch):
    """Every activation it looks at is right if the last one is."""
    detected = detect(open_checkpoint(write(checkpoints, tmp_path, tensors)))
    config, weights = detected.family.vae, detected.parts["vae"]
    seen = {}
    monkeypatch.setattr(vae_range._Network, "seen", lambda self, x, where: seen.setdefault(where, x))
    network = vae_range._Network(weights, config.norm_groups)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4, 6, 8)).astype(np.float32)
    x = rng.uniform(-1, 1, (3, 64, 48)).astype(np.float32)
    network.decode(config, z)
    network.encode(config, x)
    with torch.inference_mode():
        image = reference.vae_decoder(config, weights, torch.from_numpy(z)[None])[0].numpy()
        latent = reference.vae_encoder(config, weights, torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(seen["decoder.conv_out"], image, atol=3e-5)  # measured 6e-6
    np.testing.assert_allclose(seen["quant_conv"], latent, atol=3e-5)  # measured 3e-6


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "float16"), (3e4, "float32")])
def test_a_wide_vae_is_written_in_float32(checkpoints, tmp_path, tensors, factor, expected):
    wide = tensors | {WIDE: factor * tensors[WIDE]}
    source = write(checkpoints, tmp_path, wide)
    manifest = convert_checkpoint(source, tmp_path / "out", OPTIONS)
    part = manifest.parts["vae_decoder"]
    assert part.precision == manifest.parts["vae_encoder"].precision == expected
    assert part.inputs["z"] == ((1, 4, 8, 8), expected)
    if expected == "float32":
        assert "decoder.up_blocks.2.resnets.0" in part.about["why"]
    assert manifest.decided["VAE precision"] == f"{expected}: {part.about['why']}"


def test_the_probe_is_asked_only_where_it_matters(checkpoints, tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(folder, "probe_vae", lambda *_: pytest.fail("asked"))
    source = write(checkpoints, tmp_path, tensors)
    for options, precision in (
        (dataclasses.replace(OPTIONS, family=None), "float16"),
        (dataclasses.replace(OPTIONS, vae_precision="float32"), "float32"),
    ):
        manifest = convert_checkpoint(source, tmp_path / "out", options)
        assert manifest.parts["vae_decoder"].precision == precision


def test_numbers_that_are_none_are_too_wide(checkpoints, tmp_path, tensors):
    broken = dict(tensors)
    broken[WIDE] = tensors[WIDE].copy()
    broken[WIDE][0, 0, 0, 0] = math.nan
    detected = detect(open_checkpoint(write(checkpoints, tmp_path, broken)))
    fits, why = probe_vae(detected.family.vae, detected.parts["vae"], 0.13)
    assert not fits
    assert "up_blocks.2.resnets.0.conv2" in why
    assert BOUND < 65504


def test_a_vae_that_lacks_a_weight_is_refused_before_the_probe(checkpoints, tmp_path, tensors):
    fewer = {key: value for key, value in tensors.items() if key != WIDE}
    with pytest.raises(ConversionError, match=r"1 weights are missing: decoder.up_blocks.2.resnets.0.conv2.weight"):
        convert_checkpoint(write(checkpoints, tmp_path, fewer), tmp_path / "out", OPTIONS)
