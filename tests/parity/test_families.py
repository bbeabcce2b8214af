"""Whole runs of every family against diffusers' pipelines: the same weights, prompts and noise, the same final latents.

Tiny networks with each family's own inputs; the packages run in the portable engine in fp32, with the attention form
that leaves the query's weights as they are.
"""

import dataclasses
import json
import shutil

import coremltools as ct
import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from transformers import CLIPTokenizer

from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.vocabulary import clip_vocabulary
from glassine.models.config import TextEncoderConfig, UNetConfig, VAEConfig
from glassine.runtime.inputs import Inputs, MapSource, read_inputs
from glassine.runtime.noise import randn
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import sigmas_of

# diffusers warns of its own ways: from_config without steps_offset, unsafe checkers, renamed arguments.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIZE, STEPS, SEED = 64, 5, 5
PROMPT, NEGATIVE = "a paper boat on a lake", "blurry"
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (1, 4, SIZE // 8, SIZE // 8)
CLOSE = 1e-4  # measured 4e-5 and less

VAE = VAEConfig(channels=(16, 16, 16, 16), layers=1, norm_groups=8)
CLIP_L = TextEncoderConfig(width=48, layers=2, heads=3, intermediate=96)
UNET = UNetConfig(
    channels=(32, 64),
    layers=1,
    down_depths=((1,), (0,)),
    up_depths=((0, 0), (1, 1)),
    heads=(2, 4),
    context_dim=48,
    norm_groups=8,
)
LINEAR = dataclasses.replace(UNET, linear_projection=True)
OPEN_CLIP = {"width": 64, "layers": 3, "heads": 1, "intermediate": 80, "activation": "gelu"}
BIG_G = TextEncoderConfig(**OPEN_CLIP, skip=1, final_norm=False, projection_dim=32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One family at a small size: its networks, and what diffusers' configurations say of it."""

    unet: UNetConfig
    texts: dict[str, TextEncoderConfig]
    prediction: str = "epsilon"
    latent_scale: float = 0.18215
    zero_snr: bool = False


SDXL_TEXTS = {"text_encoder": dataclasses.replace(CLIP_L, skip=1, final_norm=False), "text_encoder_2": BIG_G}
H = {"text_encoder": TextEncoderConfig(**OPEN_CLIP)}
MODELS = {
    "sd2": Model(unet=dataclasses.replace(LINEAR, context_dim=64), texts=H, prediction="v_prediction"),
    "sd2_zero_snr": Model(
        unet=dataclasses.replace(LINEAR, context_dim=64), texts=H, prediction="v_prediction", zero_snr=True
    ),
    "sdxl": Model(
        unet=dataclasses.replace(LINEAR, context_dim=112, time_ids=6, pooled_dim=32),
        texts=SDXL_TEXTS,
        latent_scale=0.13025,
    ),
    "refiner": Model(
        unet=dataclasses.replace(LINEAR, context_dim=64, time_ids=5, pooled_dim=32),
        texts={"text_encoder_2": BIG_G},
        latent_scale=0.13025,
    ),
    "inpainting": Model(unet=dataclasses.replace(UNET, in_channels=9), texts={"text_encoder": CLIP_L}),
    "pix2pix": Model(unet=dataclasses.replace(UNET, in_channels=8), texts={"text_encoder": CLIP_L}),
    "lcm": Model(unet=dataclasses.replace(UNET, timestep_cond_dim=256), texts={"text_encoder": CLIP_L}),
}


class Bench:
    """Makes every model once: diffusers' modules and a pipeline of our packages with the same weights."""

    def __init__(self, networks, folder):
        self._networks, self._folder = networks, folder
        self._made = {}

    def modules(self, name):
        return self._make(name)[0]

    def pipe(self, name):
        return self._make(name)[1]

    def _make(self, name):
        if name not in self._made:
            model = MODELS[name]
            modules = {
                "unet": self._networks.diffusers_unet(model.unet),
                "vae": self._networks.diffusers_vae(VAE),
                **{role: self._networks.transformers_clip(config) for role, config in model.texts.items()},
            }
            modules["vae"].register_to_config(scaling_factor=model.latent_scale)
            source, folder = self._folder / f"{name}-source", self._folder / name
            for role, module in modules.items():
                module.save_pretrained(source / role)
            schedule = {"prediction_type": model.prediction, "rescale_betas_zero_snr": model.zero_snr, **TRAINING}
            write_json(source / "scheduler" / "scheduler_config.json", schedule)
            write_json(source / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
            options = ConvertOptions(sizes=((SIZE, SIZE),), attention="sdpa", layout="channels_last", batch=2)
            convert_checkpoint(source, folder, options)
            self._made[name] = (modules, Pipeline.load(folder))
        return self._made[name]


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_vocabulary(folder):
    tokens, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def bench(networks, tmp_path_factory):
    return Bench(networks, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder)
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return {
        "tokenizer": CLIPTokenizer(*files, model_max_length=77),
        "padded_with_0": CLIPTokenizer(*files, model_max_length=77, pad_token="!"),
    }


def stable_diffusion(kind, modules, tokenizer, scheduler):
    pipe = kind(
        **modules, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(kind, modules, tokenizers, scheduler, **settings):
    texts = {"text_encoder": None, "text_encoder_2": None, **modules}
    pipe = kind(
        **texts, tokenizer=tokenizers["tokenizer"] if texts["text_encoder"] else None,
        tokenizer_2=tokenizers["padded_with_0"], scheduler=scheduler, add_watermarker=False, **settings,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def euler(**settings):
    return EulerDiscreteScheduler(**TRAINING, **{"timestep_spacing": "linspace", **settings})


def relative(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def requested(**settings):
    return Request(
        **{
            "prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "sampler": "euler", "spacing": "linspace",
            "seed": SEED, **settings,
        }
    )  # fmt: skip


def drawn(pipe, request, **arrays):
    return pipe.run(request, Inputs(latents=randn(SEED, SHAPE), **arrays)).finish().latents


def common(**settings):
    return {
        "num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent", "negative_prompt": NEGATIVE,
        **settings,
    }  # fmt: skip


def from_noise(**settings):
    return common(latents=torch.from_numpy(randn(SEED, SHAPE)), height=SIZE, width=SIZE, **settings)


@pytest.mark.parametrize(
    ("model", "spacing", "settings"),
    [
        pytest.param("sd2", "linspace", {}, marks=pytest.mark.slow),
        ("sd2_zero_snr", "trailing", {"rescale_betas_zero_snr": True}),
    ],
)
def test_stable_diffusion_2_predicting_velocity(bench, tokenizers, model, spacing, settings):
    scheduler = euler(prediction_type="v_prediction", timestep_spacing=spacing, **settings)
    modules = bench.modules(model)
    theirs = stable_diffusion(StableDiffusionPipeline, modules, tokenizers["padded_with_0"], scheduler)(
        PROMPT, **from_noise(guidance_rescale=0.7)
    ).images.numpy()
    ours = drawn(bench.pipe(model), requested(spacing=spacing, guidance_rescale=0.7))
    assert relative(ours, theirs) < CLOSE


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_sdxl_with_micro_conditioning(bench, tokenizers, negative):
    pipe = sdxl(StableDiffusionXLPipeline, bench.modules("sdxl"), tokenizers, euler())
    theirs = pipe(
        PROMPT, **from_noise() | {"negative_prompt": negative}, original_size=(96, 160), crops_coords_top_left=(8, 24),
        target_size=(SIZE, 80), negative_original_size=(32, 48), negative_crops_coords_top_left=(0, 0),
        negative_target_size=(SIZE, SIZE),
    ).images.numpy()  # fmt: skip
    request = requested(
        negative_prompt=negative if negative is not None else "", original_size=(160, 96), crop=(24, 8),
        target_size=(80, SIZE), negative_original_size=(48, 32), negative_crop=(0, 0),
        negative_target_size=(SIZE, SIZE),
    )  # fmt: skip
    assert relative(drawn(bench.pipe("sdxl"), request), theirs) < CLOSE
    plain = drawn(bench.pipe("sdxl"), requested())
    assert relative(plain, theirs) > 1e-2  # the sizes matter


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def posterior_mean(monkeypatch):
    """diffusers draws a sample of the VAE's posterior; ours is its mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


def test_sdxl_image_to_image(bench, tokenizers, picture, posterior_mean):
    pipe = sdxl(StableDiffusionXLImg2ImgPipeline, bench.modules("sdxl"), tokenizers, euler())
    theirs = pipe(
        PROMPT, **common(), image=Image.fromarray(picture), strength=0.6, original_size=(96, 160),
        generator=torch.Generator().manual_seed(SEED),
    ).images.numpy()  # fmt: skip
    inputs = read_inputs(picture, MapSource(), SIZE, SIZE)
    request = requested(strength=0.6, original_size=(160, 96))
    assert relative(bench.pipe("sdxl").run(request, inputs).finish().latents, theirs) < CLOSE


@pytest.mark.parametrize("share", [0.4, pytest.param(0.6, marks=pytest.mark.slow)])
def test_the_refiner_takes_over_in_the_same_run(bench, tokenizers, share, monkeypatch):
    base = sdxl(StableDiffusionXLPipeline, bench.modules("sdxl"), tokenizers, euler())
    refiner = sdxl(
        StableDiffusionXLImg2ImgPipeline, bench.modules("refiner"), tokenizers, euler(),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    half = base(PROMPT, **from_noise(), denoising_end=share).images
    theirs = refiner(
        PROMPT, **common(), image=half, denoising_start=share, aesthetic_score=7.0, negative_aesthetic_score=1.5
    ).images.numpy()
    pipe = bench.pipe("sdxl")
    monkeypatch.setattr(pipe, "refiner", bench.pipe("refiner"))
    request = requested(refine_at=share, aesthetic_score=7.0, negative_aesthetic_score=1.5)
    assert relative(drawn(pipe, request), theirs) < CLOSE
    assert relative(drawn(pipe, requested(refine_at=1.0)), theirs) > 1e-2


@pytest.mark.parametrize("sampler", ["dpmpp_2m", pytest.param("dpmpp_sde", marks=pytest.mark.slow)])
def test_a_refiner_that_is_the_base_model_changes_nothing(bench, monkeypatch, sampler):
    """Noise and the sampler's history go on where the refiner takes over."""
    pipe = bench.pipe("sdxl")
    request = requested(sampler=sampler, refine_at=0.5)
    alone = drawn(pipe, request)
    cond, uncond = (pipe.encode(text, request) for text in (PROMPT, NEGATIVE))
    monkeypatch.setattr(pipe, "refiner", Pipeline.load(pipe.folder))
    assert np.array_equal(drawn(pipe, request), alone)
    # Conditioning made elsewhere is the base model's; a refiner reads the prompts.
    given = {"context": cond.context, "pooled": cond.pooled}
    given |= {"negative_context": uncond.context, "negative_pooled": uncond.pooled}
    assert np.array_equal(drawn(pipe, request, **given), alone)


def test_turbo_in_one_and_in_four_steps(bench, tokenizers):
    pipe = sdxl(
        StableDiffusionXLPipeline, bench.modules("sdxl"), tokenizers,
        EulerAncestralDiscreteScheduler(**TRAINING, timestep_spacing="trailing"),
    )  # fmt: skip
    for steps in (1, 4):
        settings = from_noise(guidance_scale=0.0, num_inference_steps=steps)
        theirs = pipe(PROMPT, **settings, generator=torch.Generator().manual_seed(1)).images.numpy()
        request = requested(steps=steps, sampler="euler_a", spacing="trailing", guidance_scale=1.0)
        assert relative(drawn(bench.pipe("sdxl"), request, noise=noises(1, steps)), theirs) < CLOSE


def noises(seed, count):
    """What a generator of diffusers gives its scheduler, step by step."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(SHAPE, generator=generator).numpy() for _ in range(count)]
    return lambda index: drawn[index]


def test_latent_consistency_with_its_guidance_embedding(bench, tokenizers):
    scheduler = LCMScheduler(**{key: value for key, value in TRAINING.items() if key != "steps_offset"})
    pipe = stable_diffusion(StableDiffusionPipeline, bench.modules("lcm"), tokenizers["tokenizer"], scheduler)
    settings = from_noise(guidance_scale=8.0, num_inference_steps=4)
    theirs = pipe(PROMPT, **settings, generator=torch.Generator().manual_seed(1)).images.numpy()
    ours = bench.pipe("lcm")
    request = requested(steps=4, sampler="lcm", spacing="lcm", guidance_scale=8.0)
    sigma = float(sigmas_of(ours.schedule, request)[0])
    start = randn(SEED, SHAPE) * np.float32((sigma**2 + 1) ** 0.5 / sigma)  # diffusers starts from variance 1
    run = ours.run(request, Inputs(latents=start, noise=noises(1, 4)))
    result = run.finish()
    assert relative(result.latents, theirs) < CLOSE
    other = ours.run(dataclasses.replace(request, guidance_scale=1.5), Inputs(latents=start, noise=noises(1, 4)))
    assert relative(other.finish().latents, theirs) > 1e-2


def inpainting_reference(bench, tokenizers, picture, mask):
    pipe = stable_diffusion(
        StableDiffusionInpaintPipeline, bench.modules("inpainting"), tokenizers["tokenizer"], euler()
    )
    return pipe(
        PROMPT, **from_noise(), image=Image.fromarray(picture), mask_image=Image.fromarray(mask), strength=1.0
    ).images.numpy()


def test_inpainting_with_the_masked_picture(bench, tokenizers, picture, posterior_mean):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[8:40, 16:56] = 255
    theirs = inpainting_reference(bench, tokenizers, picture, mask)
    inputs = read_inputs(picture, MapSource(mask=mask), SIZE, SIZE, latents=randn(SEED, SHAPE))
    run = bench.pipe("inpainting").run(requested(), inputs)
    # diffusers lets such a model draw everywhere; ours keeps the source where the map says so.
    run.n = run._source = None
    assert relative(run.finish().latents, theirs) < CLOSE
    kept = bench.pipe("inpainting").run(requested(), inputs).finish().latents
    source = bench.pipe("inpainting").source_latents(inputs.image)
    assert np.array_equal(kept[:, :, 5:], source[:, :, 5:])
    assert relative(kept[:, :, 1:5, 2:7], source[:, :, 1:5, 2:7]) > 1e-2


def test_inpainting_models_draw_without_a_picture(bench, tokenizers, picture, posterior_mean):
    theirs = inpainting_reference(bench, tokenizers, picture, np.full((SIZE, SIZE), 255, np.uint8))
    assert relative(drawn(bench.pipe("inpainting"), requested()), theirs) < CLOSE


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (1.0, 2.0)])
def test_instruct_pix2pix(bench, tokenizers, picture, text, image):
    pipe = stable_diffusion(
        StableDiffusionInstructPix2PixPipeline, bench.modules("pix2pix"), tokenizers["tokenizer"], euler()
    )
    settings = {key: value for key, value in from_noise(guidance_scale=text).items() if key not in ("height", "width")}
    if text == 1.0:
        settings["guidance_scale"] = 1.0 + 1e-9  # diffusers has no guidance at all at 1
    theirs = pipe(PROMPT, **settings, image=Image.fromarray(picture), image_guidance_scale=image).images.numpy()
    inputs = read_inputs(picture, MapSource(), SIZE, SIZE, latents=randn(SEED, SHAPE))
    request = requested(guidance_scale=text, image_guidance=image)
    assert relative(bench.pipe("pix2pix").run(request, inputs).finish().latents, theirs) < CLOSE


APPLE = {
    "TextEncoder": "text_encoder", "TextEncoder2": "text_encoder_2", "Unet": "unet", "UnetRefiner": "refiner",
    "VAEDecoder": "vae_decoder", "VAEEncoder": "vae_encoder",
}  # fmt: skip


@pytest.fixture
def apple_folder(bench, tmp_path):
    """SDXL and its refiner as Apple's Python code names them, and nothing that says what they are."""
    packages = [*bench.pipe("sdxl").folder.glob("*.mlpackage"), *bench.pipe("refiner").folder.glob("UnetR*.mlpackage")]
    for package in packages:
        name = f"Stable_Diffusion_version_stabilityai_stable-diffusion-xl-base-1.0_{APPLE[package.stem]}.mlpackage"
        shutil.copytree(package, tmp_path / name)
    return tmp_path


def test_sdxl_and_its_refiner_as_apple_names_them(bench, apple_folder, monkeypatch):
    pipe = bench.pipe("sdxl")
    monkeypatch.setattr(pipe, "refiner", bench.pipe("refiner"))
    request = requested(refine_at=0.5, original_size=(96, 96))
    with Pipeline.load(apple_folder) as theirs:
        assert (theirs.manifest.family, theirs.manifest.latent_scale, theirs.manifest.clip_skip) == ("sdxl", 0.13025, 2)
        assert np.array_equal(drawn(theirs, request), drawn(pipe, request))


class AppleUNet(torch.nn.Module):
    """diffusers' UNet behind the inputs of Apple's Python code, where the six numbers of all rows are one vector."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, sample, timestep, encoder_hidden_states, time_ids, text_embeds):
        context = encoder_hidden_states.squeeze(2).transpose(1, 2)
        added = {"time_ids": time_ids.reshape(2, 6), "text_embeds": text_embeds}
        return self.module(sample, timestep, context, added_cond_kwargs=added, return_dict=False)[0]


@pytest.mark.slow  # coremltools converts for 20 s
@pytest.mark.filterwarnings("ignore")  # of tracing and of coremltools' frontend, about code that is not ours
def test_a_unet_that_coremltools_converted(bench, tokenizers, apple_folder):
    pipe = sdxl(StableDiffusionXLPipeline, bench.modules("sdxl"), tokenizers, euler())
    theirs = pipe(PROMPT, **from_noise()).images.numpy()
    (package,) = apple_folder.glob("*_unet.mlpackage")
    shutil.rmtree(package)
    shutil.rmtree(next(apple_folder.glob("*_refiner.mlpackage")))
    shapes = {
        "sample": (2, 4, SIZE // 8, SIZE // 8), "timestep": (2,), "encoder_hidden_states": (2, 112, 1, 77),
        "time_ids": (12,), "text_embeds": (2, 32),
    }  # fmt: skip
    module = AppleUNet(bench.modules("sdxl")["unet"]).eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, tuple(torch.ones(shape) for shape in shapes.values()), check_trace=False)
    ct.convert(
        traced,
        inputs=[ct.TensorType(name, shape, dtype=np.float16) for name, shape in shapes.items()],
        outputs=[ct.TensorType("noise_pred", dtype=np.float32)],
        minimum_deployment_target=ct.target.macOS13,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(package))
    with Pipeline.load(apple_folder) as ours:
        assert ours.unet_inputs["time_ids"] == (2, 6)
        assert relative(drawn(ours, requested()), theirs) < CLOSE
