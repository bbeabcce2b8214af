"""Whole runs against diffusers' pipelines: the same weights, prompts and noise give the same final latents.

The package runs in the portable engine in fp32, with the attention form that leaves the query's weights as they are.
"""

import functools

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.runtime import run
from glassine.runtime.denoiser import Denoiser
from glassine.runtime.inputs import Inputs, MapSource, read_inputs
from glassine.runtime.noise import randn
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import sigmas_of
from glassine.runtime.schedule import last_steps

# diffusers warns of its own ways: from_config without steps_offset, unsafe checkers, renamed arguments.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIZE, STEPS, SEED = 128, 10, 5
PROMPT, NEGATIVE = "a paper boat on a lake", "blurry"
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="module")
def model(tiny_diffusers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    options = ConvertOptions(sizes=((SIZE, SIZE),), attention="sdpa", layout="channels_last")
    convert_checkpoint(tiny_diffusers, folder, options)
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    with Pipeline.load(model) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def parts(tiny_diffusers, model):
    """The networks of the same folder in diffusers and transformers, fp32."""
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    loaded = {
        name: network.from_pretrained(tiny_diffusers, subfolder=name, torch_dtype=torch.float32).eval()
        for name, network in networks.items()
    }
    tokenizer = CLIPTokenizer(str(model / "vocab.json"), str(model / "merges.txt"), model_max_length=77)
    return {**loaded, "tokenizer": tokenizer}


def reference(kind, parts, scheduler):
    pipe = kind(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# sampler, spacing, diffusers' scheduler. Those that work in variance-preserving space start from unit noise, where
# sigma space starts from sigma_max: `vp` brings ours to theirs.
CASES = {
    "ddim": ("ddim", "leading", DDIMScheduler(**TRAINING, set_alpha_to_one=True, clip_sample=False)),
    "euler": ("euler", "linspace", EulerDiscreteScheduler(**TRAINING, timestep_spacing="linspace")),
    "dpmpp_2m_karras": ("dpmpp_2m", "karras", DPMSolverMultistepScheduler(**TRAINING, use_karras_sigmas=True)),
    "unipc": ("unipc", "rounded", UniPCMultistepScheduler(**TRAINING)),
}


def ours(pipe, request, inputs):
    return pipe.run(request, inputs).finish().latents


@pytest.fixture
def rounds(monkeypatch):
    """Round the timestep where diffusers' multistep solver does (Karras levels lie between two of them).

    Without it, dpmpp_2m on Karras levels is 4.8e-3 away: the price of diffusers' rounding.
    """

    def rounding(case):
        if case == "dpmpp_2m_karras":
            monkeypatch.setattr(run, "Denoiser", functools.partial(Denoiser, whole_timesteps=True))

    return rounding


def starting_noise(pipe, case, request, strength=1.0):
    """The noise for diffusers and the one that gives ours the same start."""
    noise = randn(SEED, (1, 4, SIZE // 8, SIZE // 8))
    sigma = float(last_steps(sigmas_of(pipe.schedule, request), strength)[0])
    same = case == "euler" or strength < 1
    return noise, noise if same else noise * np.float32((sigma**2 + 1) ** 0.5 / sigma)


def requested(case, **settings):
    sampler, spacing, _ = CASES[case]
    return Request(
        prompt=PROMPT, negative_prompt=NEGATIVE, steps=STEPS, sampler=sampler, spacing=spacing, seed=SEED, **settings
    )


@pytest.mark.parametrize("case", CASES)
def test_text_to_image(pipe, parts, case, rounds):
    rounds(case)
    request = requested(case)
    noise, start = starting_noise(pipe, case, request)
    theirs = reference(StableDiffusionPipeline, parts, CASES[case][2])(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent",
        latents=torch.from_numpy(noise), height=SIZE, width=SIZE,
    ).images.numpy()  # fmt: skip
    assert relative(ours(pipe, request, Inputs(latents=start)), theirs) < 1e-4  # measured 1.2e-5


@pytest.mark.parametrize("case", CASES)
def test_image_to_image(pipe, parts, case, rounds, monkeypatch):
    rounds(case)
    request = requested(case, strength=0.6)
    _, start = starting_noise(pipe, case, request, 0.6)
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    # diffusers draws a sample of the VAE's posterior; ours is its mean. Its noise comes from a generator: ours too.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    theirs = reference(StableDiffusionImg2ImgPipeline, parts, CASES[case][2])(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent",
        image=Image.fromarray(pixels), strength=0.6, generator=torch.Generator().manual_seed(SEED),
    ).images.numpy()  # fmt: skip
    inputs = read_inputs(pixels, MapSource(), SIZE, SIZE, latents=start)
    assert relative(ours(pipe, request, inputs), theirs) < 1e-4  # measured 1.6e-5
