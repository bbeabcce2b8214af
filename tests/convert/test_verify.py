"""The judge itself is judged against diffusers and transformers; then packages by it, good and bad."""

import dataclasses
import os
import shutil
import sys

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from glassine.convert import reference, verify
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.verify import verify_folder
from glassine.errors import ConversionError, MissingDependency, PackageError
from glassine.runtime.engine import EngineOptions

PORTABLE = EngineOptions(engine="portable")


@pytest.fixture(scope="module")
def detected(tiny_checkpoint):
    return detect(open_checkpoint(tiny_checkpoint))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with torch.inference_mode():
        yield


def load(cls, folder, part):
    return cls.from_pretrained(str(folder / part), local_files_only=True, torch_dtype=torch.float32).eval()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, measured):
    """Within four times the relative error that was measured."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 4 * measured, error


def test_the_unet_is_diffusers(detected, tiny_diffusers):
    theirs = load(UNet2DConditionModel, tiny_diffusers, "unet")
    sample, context, timestep = normal(2, 4, 8, 16), normal(2, 77, 64, seed=1), torch.tensor([999.0, 17.5])
    given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": context.transpose(1, 2)[:, :, None]}
    ours = reference.unet(detected.family.unet, detected.parts["unet"], given)
    close(ours, theirs(sample, timestep, context).sample, 1e-6)


def test_odd_sizes_too(detected, tiny_diffusers):
    theirs = load(UNet2DConditionModel, tiny_diffusers, "unet")
    sample, context, timestep = normal(1, 4, 9, 13), normal(1, 77, 64, seed=1), torch.tensor([500.0])
    given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": context.transpose(1, 2)[:, :, None]}
    ours = reference.unet(detected.family.unet, detected.parts["unet"], given)
    close(ours, theirs(sample, timestep, context).sample, 1e-6)


def test_the_vae_is_diffusers_both_ways(detected, tiny_diffusers):
    theirs = load(AutoencoderKL, tiny_diffusers, "vae")
    config, weights = detected.family.vae, detected.parts["vae"]
    x, z = normal(1, 3, 64, 128), normal(1, 4, 8, 16)
    close(reference.vae_encoder(config, weights, x), theirs.encode(x).latent_dist.parameters, 1e-6)
    close(reference.vae_decoder(config, weights, z), theirs.decode(z).sample, 1e-6)


@pytest.mark.parametrize(("activation", "hidden_act"), [("quick_gelu", "quick_gelu"), ("gelu", "gelu")])
def test_the_text_encoder_is_transformers(detected, tiny_diffusers, activation, hidden_act):
    theirs = load(CLIPTextModel, tiny_diffusers, "text_encoder")
    theirs = CLIPTextModel._from_config(theirs.config.__class__(**theirs.config.to_dict() | {"hidden_act": hidden_act}))
    theirs.load_state_dict(load(CLIPTextModel, tiny_diffusers, "text_encoder").state_dict())
    config = dataclasses.replace(detected.family.text_encoders[0], activation=activation)
    ids = torch.tensor([[49406, *range(100, 120), *[49407] * 56]])
    last, pooled, states = reference.text_encoder(config, detected.parts["text_encoder"], ids)
    expected = theirs.eval()(ids, output_hidden_states=True)
    close(last, expected.last_hidden_state, 1e-6)
    close(pooled, expected.pooler_output, 1e-6)
    skipped, _, _ = reference.text_encoder(dataclasses.replace(config, skip=1), detected.parts["text_encoder"], ids)
    norm = theirs.text_model.final_layer_norm if hasattr(theirs, "text_model") else theirs.final_layer_norm
    close(skipped, norm(expected.hidden_states[-2]), 1e-6)
    close(states[0:1], norm(expected.hidden_states[1]), 1e-6)


def test_a_converted_folder_is_its_source(tiny_folder, tiny_checkpoint):
    seen = []
    reports = verify_folder(tiny_folder, tiny_checkpoint, options=PORTABLE, report=lambda *at: seen.append(at))
    assert [r.role for r in reports] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert min(r.psnr for r in reports) > 60, reports
    assert seen == [(i, 4, role) for i, role in enumerate([*(r.role for r in reports), ""])]


def test_parts_can_be_chosen(tiny_folder, tiny_checkpoint):
    (report,) = verify_folder(tiny_folder, tiny_checkpoint, parts=["vae_decoder"], options=PORTABLE)
    assert report.role == "vae_decoder"
    with pytest.raises(PackageError, match="has no part controlnet, only text_encoder"):
        verify_folder(tiny_folder, tiny_checkpoint, parts=["controlnet"])


def test_a_flipped_bit_is_found(tiny_folder, tiny_checkpoint, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    path = folder / "VAEDecoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    data = np.fromfile(path, np.uint16)
    half = data.size // 2
    data[half : half + 64] ^= 0x8000  # the signs of 64 weights
    data.tofile(path)
    (report,) = verify_folder(folder, tiny_checkpoint, parts=["vae_decoder"], options=PORTABLE)
    assert report.psnr < 60


def test_another_source_is_not_this_folders(tiny_folder, checkpoints, tmp_path):
    other = checkpoints.write_checkpoint(tmp_path / "other.safetensors", seed=1)
    (report,) = verify_folder(tiny_folder, other, parts=["vae_decoder"], options=PORTABLE)
    assert report.psnr < 30
    smaller = checkpoints.write_checkpoint(tmp_path / "s.safetensors", checkpoints.Sizes(text_layers=2))
    with pytest.raises(ConversionError, match="was the folder made of another file"):
        verify_folder(tiny_folder, smaller, parts=["text_encoder"], options=PORTABLE)


def test_without_torch_it_says_what_to_install(tiny_folder, tiny_checkpoint, monkeypatch):
    class Never:
        def predict(self, **_):
            return {}

        def close(self):
            pass

    monkeypatch.setattr(verify, "open_engine", lambda *_, **__: Never())
    monkeypatch.setattr(verify, "inputs_of", lambda *_: {})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match=r"pip install 'glassine\[portable\]'"):
        verify_folder(tiny_folder, tiny_checkpoint, parts=["vae_decoder"])
