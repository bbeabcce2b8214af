"""The tiny family with its LCM-LoRA: four steps draw what diffusers draws with `load_lora_weights`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from glassine.convert.extras import Extras
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.lora import LoraFile
from glassine.models.tiny.train import files, networks
from glassine.runtime.inputs import Inputs
from glassine.runtime.noise import StepNoise, randn
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import sigmas_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

TINY = Path(networks.__file__).parents[1]
LCM = TINY / "tiny_lcm_lora.safetensors"
SIZE, SEED, PROMPT = 256, 11, "a red star, blue background"


@pytest.fixture(scope="module")
def reference():
    """diffusers' pipeline of the tiny family, with the LoRA as diffusers loads it."""
    vae, unet, text = networks.vae(), networks.unet(), networks.text_encoder()
    weights = files.checkpoint(vae, unet, text)
    stored = load_file(TINY / "tiny.safetensors")
    with torch.no_grad():
        for key, parameter in weights.items():
            parameter.copy_(stored[key].reshape(parameter.shape))
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tokenizer = CLIPTokenizer(str(TINY / "vocab.json"), str(TINY / "merges.txt"), model_max_length=77)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(TINY), weight_name=LCM.name)
    return pipe


def test_four_steps_are_diffusers_four_steps(reference, tmp_path, monkeypatch):
    options = ConvertOptions(
        sizes=((SIZE, SIZE),), attention="sdpa", layout="channels_last", tokenizer=TINY,
        extras=Extras(loras=(LoraFile(LCM),)),
    )  # fmt: skip
    convert_checkpoint(TINY / "tiny.safetensors", tmp_path / "model", options)
    noise = randn(SEED, (1, 4, SIZE // 8, SIZE // 8))
    fresh = StepNoise(SEED)
    step_noise = iter([torch.from_numpy(fresh(i, noise.shape)) for i in range(4)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(step_noise))
    theirs = reference(
        PROMPT, num_inference_steps=4, guidance_scale=1.0, latents=torch.from_numpy(noise), output_type="latent",
        height=SIZE, width=SIZE,
    ).images.numpy()  # fmt: skip
    with Pipeline.load(tmp_path / "model") as pipe:
        request = Request(prompt=PROMPT, steps=4, sampler="lcm", guidance_scale=1.0, seed=SEED)
        sigma = float(sigmas_of(pipe.schedule, request)[0])
        start = noise * np.float32((sigma**2 + 1) ** 0.5 / sigma)  # of variance 1, as diffusers starts
        ours = pipe.run(request, Inputs(latents=start)).finish().latents
    # measured 6.7e-4: ours are the merged weights in fp16, theirs the base's with the LoRA beside them in fp32
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-3
