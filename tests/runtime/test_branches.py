"""What each branch of guidance reads, by what the UNet has inputs for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from glassine.errors import EngineError, PackageError, RequestError
from glassine.manifest import Scheduler
from glassine.runtime.branches import guidance_embedding, guidance_of, time_ids
from glassine.runtime.conditioning import EncodedPrompt
from glassine.runtime.denoiser import Conditioning, Denoiser, Guidance, Relay
from glassine.runtime.inputs import Inputs
from glassine.runtime.request import Request
from glassine.runtime.schedule import STABLE_DIFFUSION, NoiseSchedule, handover, make_sigmas

SIZE = (48, 32)  # width, height: 6 by 4 latent cells
CELLS = (1, 4, 4, 6)


def pipe(channels=4, width=5, **further):
    """A pipeline whose text encoder counts letters and whose VAE takes the mean of 8x8 pixels."""
    shapes = {"sample": (2, channels, 4, 6), "encoder_hidden_states": (2, 5, 1, 77), **further}

    def encode(text, request):
        context = np.full((1, 77, width), len(text), np.float32)
        return EncodedPrompt(context=context, pooled=np.full((1, 3), len(text), np.float32), notices=(f"read {text}",))

    def mean(image):
        cells = image.reshape(1, 3, 4, 8, 6, 8).mean(axis=(3, 5))
        return np.concatenate([cells, cells[:, :1]], axis=1)

    return SimpleNamespace(
        folder="model", size=SIZE, unet_inputs=shapes, encode=encode, posterior_mean=mean,
        source_latents=lambda image: 2 * mean(image),
    )  # fmt: skip


REQUEST = Request(prompt="a cat", negative_prompt="dog")
IMAGE = np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
XL = {"time_ids": (2, 6), "text_embeds": (2, 3)}


def test_two_branches_with_their_prompts():
    guidance, notices = guidance_of(pipe(), REQUEST, Inputs(), None)
    assert guidance.branches == ("uncond", "cond")
    assert guidance.cond.context.shape == (1, 5, 1, 77)
    assert guidance.cond.context.max() == 5
    assert guidance.uncond.context.max() == 3
    assert not guidance.cond.extra
    assert guidance.cond.channels is None
    assert notices == ("read a cat", "read dog")


def test_without_guidance_the_negative_prompt_is_not_read():
    guidance, notices = guidance_of(pipe(), Request(prompt="a cat", guidance_scale=1.0), Inputs(), None)
    assert guidance.branches == ("cond",)
    assert notices == ("read a cat",)


def test_guidance_0_is_said_to_be_the_negative_prompt():
    _, notices = guidance_of(pipe(), Request(prompt="a cat", guidance_scale=0.0), Inputs(), None)
    assert any("1 is without guidance" in notice for notice in notices)


def test_micro_conditioning_is_width_and_height_turned_round():
    request = Request(original_size=(640, 480), crop=(7, 9), negative_target_size=(11, 13))
    assert time_ids(request, SIZE, 6, negative=False).tolist() == [[480, 640, 9, 7, 32, 48]]
    assert time_ids(request, SIZE, 6, negative=True).tolist() == [[480, 640, 9, 7, 13, 11]]
    assert time_ids(Request(), SIZE, 6, negative=True).tolist() == [[32, 48, 0, 0, 32, 48]]
    assert time_ids(Request(), SIZE, 5, negative=False).tolist() == [[32, 48, 0, 0, 6.0]]
    assert time_ids(Request(), SIZE, 5, negative=True).tolist() == [[32, 48, 0, 0, 2.5]]
    with pytest.raises(PackageError, match="reads 4 time_ids; expected 6"):
        time_ids(Request(), SIZE, 4, negative=False)


@pytest.mark.parametrize(("numbers", "zeroed"), [(6, True), (5, False)])
def test_an_empty_negative_prompt_is_zeros_for_sdxl_but_not_for_its_refiner(numbers, zeroed):
    model = pipe(time_ids=(2, numbers), text_embeds=(2, 3))
    model.encode = lambda *_: EncodedPrompt(context=np.ones((1, 77, 5), np.float32), pooled=np.ones((1, 3), np.float32))
    guidance, _ = guidance_of(model, Request(prompt="a cat"), Inputs(), None)
    assert guidance.cond.context.min() == 1
    assert guidance.uncond.context.max() == (0 if zeroed else 1)
    assert guidance.uncond.extra["text_embeds"].max() == (0 if zeroed else 1)


def test_conditioning_made_elsewhere():
    given = Inputs(
        context=np.full((1, 77, 5), 7, np.float32), pooled=np.full((1, 3), 8, np.float32),
        negative_context=np.full((1, 77, 5), 9, np.float32), negative_pooled=np.full((1, 3), 10, np.float32),
    )  # fmt: skip
    guidance, notices = guidance_of(pipe(**XL), REQUEST, given, None)
    assert guidance.cond.context.max() == 7
    assert guidance.cond.extra["text_embeds"].max() == 8
    assert guidance.uncond.context.max() == 9
    assert guidance.uncond.extra["text_embeds"].max() == 10
    assert notices == ()


def test_encoders_that_do_not_fit_are_refused():
    with pytest.raises(EngineError, match="make vectors of 4 numbers, the UNet reads 5"):
        guidance_of(pipe(width=4), REQUEST, Inputs(), None)
    with pytest.raises(EngineError, match="no pooled output"):
        guidance_of(pipe(**XL), REQUEST, Inputs(context=np.zeros((1, 77, 5), np.float32)), None)
    with pytest.raises(PackageError, match="reads 5 channels; expected 4, 9"):
        guidance_of(pipe(5), REQUEST, Inputs(), None)


@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_the_guidance_embedding_is_that_of_diffusers(scale):
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1.0], dtype=torch.float64), embedding_dim=256, dtype=torch.float64
    )
    # measured 2.2e-5: the frequencies of diffusers are float32, and the largest angle is 7500
    assert np.abs(guidance_embedding(scale, 256) - theirs.numpy()).max() < 5e-5
    guidance, _ = guidance_of(pipe(timestep_cond=(2, 256)), Request(guidance_scale=scale), Inputs(), None)
    assert guidance.branches == ("cond",)
    assert np.array_equal(guidance.cond.extra["timestep_cond"], guidance_embedding(scale, 256))


def test_the_inpainting_models_mask_is_where_any_step_may_draw():
    table = np.zeros((1, 1, 4, 6), np.int64)
    table[0, 0, 1:3, 2:5] = [[1, 5, 20], [20, 0, 3]]
    guidance, _ = guidance_of(pipe(9), REQUEST, Inputs(image=IMAGE), table)
    channels = guidance.cond.channels
    assert np.array_equal(channels[:, :1], (table > 0).astype(np.float32))
    expected = 2 * pipe().posterior_mean(IMAGE) * (table == 0)  # this VAE sees no neighbours
    assert np.allclose(channels[:, 1:], expected, atol=1e-6)
    assert guidance.uncond.channels is channels


def test_an_inpainting_model_without_a_map_or_picture():
    guidance, _ = guidance_of(pipe(9), REQUEST, Inputs(), None)
    assert np.array_equal(guidance.cond.channels[:, :1], np.ones((1, 1, 4, 6)))
    assert not guidance.cond.channels[:, 1:].any()


def test_pix2pix_has_a_branch_without_words_and_one_without_the_picture():
    guidance, _ = guidance_of(pipe(8), REQUEST, Inputs(image=IMAGE), None)
    assert guidance.branches == ("uncond", "image", "cond")
    picture = pipe().posterior_mean(IMAGE)  # unscaled
    assert np.array_equal(guidance.cond.channels, picture)
    assert np.array_equal(guidance.image.channels, picture)
    assert not guidance.uncond.channels.any()
    assert guidance.image.context is guidance.uncond.context
    with pytest.raises(RequestError, match="give the picture"):
        guidance_of(pipe(8), REQUEST, Inputs(), None)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_three_branches_and_further_channels_in_any_number_of_rows(rows):
    """The network's answer is linear in what it gets, so the guided answer is known."""

    def network(sample, timestep, encoder_hidden_states):
        further = sample[:, 4:].sum(axis=1, keepdims=True)
        return {"noise_pred": sample[:, :4] + further + encoder_hidden_states[:, :1]}

    rng = np.random.default_rng(1)
    words, none = (rng.standard_normal((1, 1, 1, 6)).astype(np.float32) for _ in range(2))
    picture = rng.standard_normal(CELLS).astype(np.float32)
    guidance = Guidance(
        cond=Conditioning(context=words, channels=picture),
        uncond=Conditioning(context=none, channels=np.zeros_like(picture)),
        image=Conditioning(context=none, channels=picture),
        scale=7.5, image_scale=1.5,
    )  # fmt: skip
    x = rng.standard_normal((2, *CELLS[1:])).astype(np.float32)
    sigma = 2.0
    denoised = Denoiser(network, STABLE_DIFFUSION, guidance, rows=rows)(x, sigma)
    scaled = x / 5**0.5
    nothing = scaled + none
    image = nothing + picture.sum(axis=1, keepdims=True)
    both = scaled + picture.sum(axis=1, keepdims=True) + words
    guided = nothing + 1.5 * (image - nothing) + 7.5 * (both - image)
    assert np.allclose(denoised, x - sigma * guided, atol=1e-4)


def test_the_refiners_first_step_is_chosen_by_noise():
    sigmas = make_sigmas(STABLE_DIFFUSION, 20, "trailing")  # t = 999, 949 ... 49
    assert handover(STABLE_DIFFUSION, sigmas, 0.8) == 16  # 199 is the first below 200
    assert handover(STABLE_DIFFUSION, sigmas, 0.0) == 0
    assert handover(STABLE_DIFFUSION, sigmas, 1.0) == 20
    karras = make_sigmas(STABLE_DIFFUSION, 20, "karras")
    assert handover(STABLE_DIFFUSION, karras, 0.8) == 12
    assert handover(STABLE_DIFFUSION, sigmas[-6:], 0.8) == 1  # of image to image, the same levels
    zero = NoiseSchedule(Scheduler(zero_terminal_snr=True))
    assert handover(zero, make_sigmas(zero, 20, "trailing"), 0.8) == 16


def test_a_relay_calls_one_model_a_step():
    def model(name):
        return lambda x, sigma, i: calls.append((name, i)) or x

    calls = []
    relay = Relay(model("base"), model("refiner"), 2)
    for i in (0, 1, 1, 2, 3):
        relay(np.zeros(1), 1.0, i)
    assert calls == [("base", 0), ("base", 1), ("base", 1), ("refiner", 2), ("refiner", 3)]
