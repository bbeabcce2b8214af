"""Whole controlled runs against diffusers' pipelines: two nets, weights, intervals, guess mode, image to image.

The packages run in the portable engine in fp32. Width and height differ, and the deepest level has an odd size.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from glassine.convert.control import Control as ControlFile
from glassine.convert.control import control_networks
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.runtime.control import Control
from glassine.runtime.noise import randn
from glassine.runtime.pipeline import Pipeline

# diffusers warns of its own ways: from_config without steps_offset, unsafe checkers, renamed arguments.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

WIDTH, HEIGHT, STEPS, SEED = 64, 96, 6, 5
PROMPT, NEGATIVE = "a paper boat on a lake", "blurry"
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NOISE = randn(SEED, (1, 4, HEIGHT // 8, WIDTH // 8))
RNG = np.random.default_rng(1)
HINTS = tuple(RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(2))
PHOTO = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def nets(tiny_diffusers, tmp_path_factory):
    """Two of diffusers' ControlNets for the tiny UNet, their random weights exact in fp16, and their folders."""
    unet = UNet2DConditionModel.from_pretrained(tiny_diffusers, subfolder="unet", torch_dtype=torch.float32)
    made = []
    for seed in range(2):
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 12, 16))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                fan = parameter[0].numel() if parameter.ndim > 1 else 25
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_((offset + noise / fan**0.5).half().float())
        folder = tmp_path_factory.mktemp("nets") / f"net{seed}"
        net.save_pretrained(folder)
        made.append((net.eval(), folder))
    return made


@pytest.fixture(scope="module")
def convert(tiny_diffusers, nets, tmp_path_factory):
    """convert(rows): the tiny model with both nets, all with so many rows a call."""

    def make(rows, net_rows=None):
        folder = tmp_path_factory.mktemp("controlled") / "model"
        files = [ControlFile(path, batch=net_rows) for _, path in nets]
        options = ConvertOptions(
            sizes=((WIDTH, HEIGHT),),
            batch=rows,
            attention="sdpa",
            layout="channels_last",
            further=(partial(control_networks, files),),
        )
        convert_checkpoint(tiny_diffusers, folder, options)
        return folder

    return make


@pytest.fixture(scope="module")
def model(convert):
    return convert(2)


@pytest.fixture(scope="module")
def pipe(model):
    with Pipeline.load(model) as pipe:
        yield pipe


@pytest.fixture
def calls(pipe, monkeypatch):
    """How often each part was asked."""
    counted = Counter()
    engine = pipe.engine

    def counting(role, size=None):
        counted[role] += 1
        return engine(role, size)

    monkeypatch.setattr(pipe, "engine", counting)
    return counted


@pytest.fixture(scope="module")
def reference(tiny_diffusers, model, nets):
    """reference(pipeline class, count of nets): diffusers' pipeline of the same weights."""
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    parts = {
        name: network.from_pretrained(tiny_diffusers, subfolder=name, torch_dtype=torch.float32).eval()
        for name, network in networks.items()
    }
    parts["tokenizer"] = CLIPTokenizer(str(model / "vocab.json"), str(model / "merges.txt"), model_max_length=77)

    def make(kind, count):
        controlnet = [net for net, _ in nets[:count]]
        pipe = kind(
            **parts, controlnet=controlnet if count > 1 else controlnet[0], safety_checker=None,
            scheduler=EulerDiscreteScheduler(**TRAINING, timestep_spacing="linspace"),
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def relative(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def ours(pipe, controls, **settings):
    defaults = {"steps": STEPS, "sampler": "euler", "spacing": "linspace", "seed": SEED, "negative_prompt": NEGATIVE}
    return pipe(PROMPT, controls=controls, output="latent", **{**defaults, **settings})


def theirs(pipe, **settings):
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent",
        height=HEIGHT, width=WIDTH, **settings,
    ).images.numpy()  # fmt: skip


@pytest.mark.parametrize(("scale", "start", "stop"), [(1.0, 0.0, 1.0), (0.7, 0.1, 0.6), (1.6, 0.25, 0.7)])
def test_text_to_image(pipe, reference, scale, start, stop):
    expected = theirs(
        reference(StableDiffusionControlNetPipeline, 1), image=Image.fromarray(HINTS[0]),
        latents=torch.from_numpy(NOISE), controlnet_conditioning_scale=scale,
        control_guidance_start=start, control_guidance_end=stop,
    )  # fmt: skip
    found = ours(pipe, [Control("net0", HINTS[0], weight=scale, start=start, stop=stop)])
    assert relative(found, expected) < 1e-4  # measured 1.8e-5
    assert relative(ours(pipe, []), expected) > 0.03  # control matters here: 0.07 at least


def test_two_nets(pipe, reference):
    expected = theirs(
        reference(StableDiffusionControlNetPipeline, 2), image=[Image.fromarray(hint) for hint in HINTS],
        latents=torch.from_numpy(NOISE), controlnet_conditioning_scale=[0.7, 0.4], control_guidance_start=[0.0, 0.3],
        control_guidance_end=[0.5, 1.0],
    )  # fmt: skip
    controls = [Control("net0", HINTS[0], weight=0.7, stop=0.5), Control("net1", HINTS[1], weight=0.4, start=0.3)]
    assert relative(ours(pipe, controls), expected) < 1e-4  # measured 1.6e-5
    assert relative(ours(pipe, controls[::-1]), expected) < 1e-4  # in any order


@pytest.mark.parametrize("mode", ["guess", "control"])
def test_guess_mode(pipe, reference, mode):
    expected = theirs(
        reference(StableDiffusionControlNetPipeline, 1), image=Image.fromarray(HINTS[0]), guess_mode=True,
        latents=torch.from_numpy(NOISE), controlnet_conditioning_scale=0.9,
    )  # fmt: skip
    found = ours(pipe, [Control("net0", HINTS[0], weight=0.9, mode=mode)])
    # measured 2.4e-5; sd-webui-controlnet's weights, up to 9e-4 from diffusers', end 2.6e-3 away
    assert relative(found, expected) < (1e-4 if mode == "guess" else 1e-2)


def test_image_to_image(pipe, reference, monkeypatch):
    # diffusers draws a sample of the VAE's posterior; ours is its mean. Its noise comes from a generator: ours too.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    expected = theirs(
        reference(StableDiffusionControlNetImg2ImgPipeline, 2), image=Image.fromarray(PHOTO), strength=0.6,
        control_image=[Image.fromarray(hint) for hint in HINTS], generator=torch.Generator().manual_seed(SEED),
        controlnet_conditioning_scale=[0.7, 0.4], control_guidance_start=[0.0, 0.2], control_guidance_end=[0.5, 1.0],
    )  # fmt: skip
    controls = [Control("net0", HINTS[0], weight=0.7, stop=0.5), Control("net1", HINTS[1], weight=0.4, start=0.2)]
    assert relative(ours(pipe, controls, image=PHOTO, strength=0.6), expected) < 1e-4  # measured 2.2e-5


def test_no_control_is_bit_for_bit_none_and_calls_no_net(pipe, calls):
    plain = ours(pipe, [])
    for settings in ({"weight": 0.0}, {"stop": 0.0}, {"map": np.zeros((HEIGHT, WIDTH))}):
        assert np.array_equal(ours(pipe, [Control("net0", HINTS[0], **settings)]), plain)
    assert calls["control:net0"] == calls["controlled_unet"] == 0
    assert calls["unet"] == 4 * STEPS


def test_invariant_21(pipe):
    plain = ours(pipe, [Control("net0", HINTS[0])])
    white = ours(pipe, [Control("net0", HINTS[0], map=np.ones((HEIGHT, WIDTH)))])
    assert np.array_equal(white, plain)
    grey = ours(pipe, [Control("net0", HINTS[0], map="flat:0.3")])
    assert relative(grey, ours(pipe, [Control("net0", HINTS[0], weight=0.3)])) <= 1e-6


@pytest.mark.slow  # tests/runtime/test_controlled_runs.py has it without networks
@pytest.mark.parametrize(("rows", "net_rows"), [(2, 1), (1, 1)])
def test_batches(convert, pipe, rows, net_rows):
    controls = [
        Control("net0", HINTS[0], weight=0.7, mode="control"),
        Control("net1", HINTS[1], map="gradient:left-right"),
    ]
    usual = ours(pipe, controls)
    with Pipeline.load(convert(rows, net_rows)) as other:
        assert relative(ours(other, controls), usual) < 1e-5  # measured 3.3e-6
