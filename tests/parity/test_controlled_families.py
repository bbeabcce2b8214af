"""Whole controlled runs of SDXL (a ControlNet, a Union net) and with a T2I-Adapter, against diffusers' pipelines."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    EulerDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from glassine.convert.control import Control as ControlFile
from glassine.convert.control import control_networks
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.runtime.control import Control
from glassine.runtime.noise import randn
from glassine.runtime.pipeline import Pipeline

# diffusers warns of its own ways: from_config without steps_offset, unsafe checkers, renamed arguments.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"), pytest.mark.slow]

SIZE, STEPS, SEED = 64, 6, 5
PROMPT, NEGATIVE = "a paper boat on a lake", "blurry"
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NOISE = randn(SEED, (1, 4, SIZE // 8, SIZE // 8))
HINT = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
WIDTHS = (8, 8, 12, 16)


def saved(module, folder, seed):
    """The module with random weights that are exact in fp16, and its folder."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_((offset + noise / fan**0.5).half().float())
    module.save_pretrained(folder)
    return module.eval()


def parts_of(source, vocabulary, texts):
    """diffusers' modules of a folder."""
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **texts}
    parts = {
        name: network.from_pretrained(source, subfolder=name, torch_dtype=torch.float32).eval()
        for name, network in networks.items()
    }
    files = (str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    parts["tokenizer"] = CLIPTokenizer(*files, model_max_length=77)
    if "text_encoder_2" in texts:
        parts["tokenizer_2"] = CLIPTokenizer(*files, model_max_length=77, pad_token="!")
    return parts


def converted(source, folder, nets):
    options = ConvertOptions(
        sizes=((SIZE, SIZE),), attention="sdpa", layout="channels_last", batch=2,
        further=(partial(control_networks, [ControlFile(path) for path in nets]),),
    )  # fmt: skip
    convert_checkpoint(source, folder, options)
    return folder


def relative(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def ours(pipe, controls):
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, controls=controls, output="latent", steps=STEPS, sampler="euler",
        spacing="linspace", seed=SEED, guidance_scale=7.5,
    )  # fmt: skip


def theirs(kind, parts, modules, **settings):
    scheduler = EulerDiscreteScheduler(**TRAINING, timestep_spacing="linspace")
    pipe = kind(**parts, **modules, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent",
        height=SIZE, width=SIZE, latents=torch.from_numpy(NOISE), **settings,
    ).images.numpy()  # fmt: skip


@pytest.fixture(scope="module")
def sdxl(checkpoints, tmp_path_factory):
    """(pipeline of ours, diffusers' modules, ControlNet, Union net)."""
    place = tmp_path_factory.mktemp("sdxl")
    source = checkpoints.write_diffusers(place / "source", checkpoints.TINY_FAMILIES["sdxl"])
    unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", torch_dtype=torch.float32)
    plain = saved(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=WIDTHS), place / "plain", 0)
    described = {name: plain.config[name] for name in (
        "in_channels", "block_out_channels", "layers_per_block", "down_block_types", "transformer_layers_per_block",
        "attention_head_dim", "num_attention_heads", "cross_attention_dim", "use_linear_projection", "norm_num_groups",
        "conditioning_embedding_out_channels", "addition_embed_type", "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )}  # fmt: skip
    width = unet.config.block_out_channels[0]
    union = ControlNetUnionModel(**described, num_control_type=6, num_trans_channel=width, num_proj_channel=width)
    union = saved(union, place / "union", 1)
    folder = converted(source, place / "model", [place / "plain", place / "union"])
    texts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with Pipeline.load(folder) as pipe:
        yield pipe, parts_of(source, folder, texts), plain, union


@pytest.mark.parametrize("guess", [False, True])
def test_sdxl(sdxl, guess):
    pipe, parts, plain, _ = sdxl
    expected = theirs(
        StableDiffusionXLControlNetPipeline, parts, {"controlnet": plain, "add_watermarker": False},
        image=Image.fromarray(HINT), controlnet_conditioning_scale=0.7, control_guidance_end=0.6, guess_mode=guess,
    )  # fmt: skip
    mode = "guess" if guess else "balanced"
    assert (
        relative(ours(pipe, [Control("plain", HINT, weight=0.7, stop=0.6, mode=mode)]), expected) < 5e-4
    )  # measured 8.1e-5
    assert relative(ours(pipe, []), expected) > 0.01


@pytest.mark.parametrize("kind", [0, 3])
def test_union(sdxl, kind):
    pipe, parts, _, union = sdxl
    expected = theirs(
        StableDiffusionXLControlNetUnionPipeline, parts, {"controlnet": union, "add_watermarker": False},
        control_image=[Image.fromarray(HINT)], control_mode=[kind], controlnet_conditioning_scale=0.7,
    )  # fmt: skip
    said = ("openpose", "depth", "soft_edge", "hard_edge")[kind]
    assert (
        relative(ours(pipe, [Control("union", HINT, weight=0.7, control_type=said)]), expected) < 5e-4
    )  # measured 7.4e-5
    other = ("openpose", "depth", "soft_edge", "hard_edge")[3 - kind]
    assert relative(ours(pipe, [Control("union", HINT, weight=0.7, control_type=other)]), expected) > 1e-2


def test_union_with_two_hints_at_once(sdxl):
    """One call of the net for both, their weights on the hints; not the sum of two calls."""
    pipe, parts, _, union = sdxl
    other = np.ascontiguousarray(HINT[::-1, :, ::-1])
    expected = theirs(
        StableDiffusionXLControlNetUnionPipeline, parts, {"controlnet": union, "add_watermarker": False},
        control_image=[Image.fromarray(HINT), Image.fromarray(other)], control_mode=[3, 1],
        controlnet_conditioning_scale=[0.7, 0.4],
    )  # fmt: skip
    edges = Control("union", HINT, weight=0.7, control_type="hard_edge")
    depth = Control("union", other, weight=0.4, control_type="depth")
    assert relative(ours(pipe, [edges, depth]), expected) < 5e-4
    apart = ours(pipe, [edges, Control("union", other, weight=0.4, control_type="depth", interval="a1111")])
    assert relative(apart, expected) > 1e-3  # counted otherwise: two calls, whose residuals are summed


def test_adapter(tiny_diffusers, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_diffusers, subfolder="unet", torch_dtype=torch.float32)
    channels = list(unet.config.block_out_channels)
    adapter = saved(T2IAdapter(3, channels, 2, 8, "full_adapter"), tmp_path / "sketch", 2)
    folder = converted(tiny_diffusers, tmp_path / "model", [tmp_path / "sketch"])
    parts = parts_of(tiny_diffusers, folder, {"text_encoder": CLIPTextModel})
    unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    expected = theirs(
        StableDiffusionAdapterPipeline, parts, {"adapter": adapter, **unsafe}, image=Image.fromarray(HINT),
        adapter_conditioning_scale=0.7,
    )  # fmt: skip
    with Pipeline.load(folder) as pipe:
        assert relative(ours(pipe, [Control("sketch", HINT, weight=0.7)]), expected) < 1e-4  # measured 1.5e-5
        assert relative(ours(pipe, []), expected) > 0.01
