"""The pipeline's own part: which package is asked what and how often, the Python interface, steps, cancelling."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from glassine.errors import PackageError, RequestError
from glassine.manifest import Manifest
from glassine.runtime import pipeline
from glassine.runtime.engine import EngineOptions, Realised
from glassine.runtime.inputs import Inputs, MapSource, read_inputs
from glassine.runtime.noise import randn
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.residency import Residents

SIDE = 64


class Stub:
    """Answers as a package would: cheap functions of its inputs, counted by role."""

    def __init__(self, role, outputs, calls):
        self.role, self.outputs, self.calls = role, outputs, calls
        self.realised = Realised(
            engine="stub", device="", precision="", load_seconds=0.0, notices=(f"{role} was loaded",)
        )

    def predict(self, **arrays):
        self.calls[self.role] += 1
        if self.role == "text_encoder":
            shape = self.outputs["hidden_states"][0]
            states = np.cos(arrays["input_ids"][0][:, None] * np.arange(1, shape[2] + 1)) * np.ones(shape)
            pooled = np.zeros(self.outputs["pooled_outputs"][0])
            return {"last_hidden_state": states[-1:], "hidden_states": states, "pooled_outputs": pooled}
        if self.role == "unet":
            context = arrays["encoder_hidden_states"].mean(axis=(1, 2, 3), keepdims=True)
            return {"noise_pred": np.tanh(arrays["sample"] + context).astype(np.float32)}
        if self.role == "vae_encoder":
            cells = arrays["x"].reshape(1, 3, SIDE // 8, 8, SIDE // 8, 8).mean(axis=(3, 5))
            return {"latent": np.concatenate([cells, cells[:, :1], np.zeros((1, 4, 8, 8))], axis=1)}
        return {"image": np.clip(arrays["z"][:, :3], -1, 1).repeat(8, axis=2).repeat(8, axis=3)}

    def close(self):
        self.calls["closed"] += 1


@pytest.fixture
def calls():
    return Counter()


@pytest.fixture
def pipe(tiny_folder, monkeypatch, calls):
    parts = Manifest.read(tiny_folder).parts
    by_file = {part.file: part for part in parts.values()}

    def open_stub(package, _):
        part = by_file[package.name]
        return Stub(part.role, part.outputs, calls)

    monkeypatch.setattr(pipeline, "open_engine", open_stub)
    with Pipeline.load(tiny_folder) as pipe:
        yield pipe


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_outputs(pipe):
    settings = {"seed": 3, "steps": 4}
    array = pipe("a cat", output="numpy", **settings)
    assert array.dtype == np.uint8
    assert array.shape == (SIDE, SIDE, 3)
    assert np.array_equal(np.asarray(pipe("a cat", **settings)), array)
    latents = pipe("a cat", output="latent", **settings)
    assert latents.dtype == np.float32
    assert latents.shape == (1, 4, 8, 8)


def test_an_unknown_setting_is_refused_by_name(pipe):
    with pytest.raises(RequestError, match="cfg_scale"):
        pipe("a cat", cfg_scale=7)


def test_latents_are_the_initial_noise(pipe):
    noise = randn(3, (1, 4, 8, 8))
    given = pipe("a cat", steps=4, seed=99, output="latent", inputs={"latents": noise})
    assert np.array_equal(given, pipe("a cat", steps=4, seed=3, output="latent"))
    with pytest.raises(RequestError, match=r"latents have shape \(1, 4, 4, 4\), expected \(1, 4, 8, 8\)"):
        pipe("a cat", inputs={"latents": noise[:, :, :4, :4]})


def test_noise_is_that_of_the_stochastic_steps(pipe):
    zero = pipe(
        "a cat",
        steps=4,
        seed=3,
        sampler="euler_a",
        output="latent",
        inputs={"noise": lambda _: 0.0 * randn(0, (1, 4, 8, 8))},
    )
    drawn = pipe("a cat", steps=4, seed=3, sampler="euler_a", output="latent")
    assert not np.array_equal(zero, drawn)


def test_conditioning_made_elsewhere_needs_no_text_encoder(pipe, calls):
    request = Request(prompt="a cat", steps=4, seed=3)
    context = pipe.encode("a cat", request).context
    negative = pipe.encode("", request).context
    calls.clear()
    given = pipe.run(request, Inputs(context=context, negative_context=negative)).finish()
    assert calls["text_encoder"] == 0
    assert np.array_equal(given.latents, pipe.run(request).finish().latents)


def test_a_new_seed_or_map_encodes_nothing_again(pipe, calls, picture):
    pipe("a cat", image=picture, seed=1, steps=4)
    before = dict(calls)
    pipe("a cat", image=picture, seed=2, steps=4, change_map="gradient:left-right")
    assert calls["text_encoder"] == before["text_encoder"] == 2
    assert calls["vae_encoder"] == before["vae_encoder"] == 1


def test_guidance_of_one_never_asks_for_the_negative_prompt(pipe, calls):
    pipe("a cat", guidance_scale=1, steps=4)
    assert calls["text_encoder"] == 1
    assert calls["unet"] == 4


@pytest.mark.parametrize(("change", "evaluations"), [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_a_map_costs_its_largest_step_count(pipe, calls, picture, change, evaluations):
    result = pipe.run(
        Request(prompt="a cat", steps=8), read_inputs(picture, MapSource(map=f"flat:{change}"), SIDE, SIDE)
    ).finish()
    assert calls["unet"] == result.evaluations == evaluations
    if change == 0:
        assert np.array_equal(result.pixels, picture)
        assert calls["vae_decoder"] == 0


def test_strength_zero_is_the_source(pipe, calls, picture):
    assert np.array_equal(pipe("a cat", image=picture, strength=0.0, output="numpy"), picture)
    assert calls["unet"] == 0


def test_a_map_of_one_value_is_image_to_image_of_that_strength(pipe, picture):
    mapped = pipe("a cat", image=picture, change_map="flat:0.5", steps=8, seed=1, output="latent")
    assert np.array_equal(mapped, pipe("a cat", image=picture, strength=0.5, steps=8, seed=1, output="latent"))


def test_steps_one_by_one(pipe):
    run = pipe.run(Request(prompt="a cat", steps=4, seed=3))
    steps = []
    for step in run:
        steps.append(step.i)
        assert run.preview(step).shape == (SIDE, SIDE, 3)
    result = run.finish()
    assert steps == [0, 1, 2, 3]
    assert np.array_equal(result.latents, pipe("a cat", steps=4, seed=3, output="latent"))
    assert set(result.seconds) == {"prepare", "denoise", "decode"}


def test_previews_change_nothing(pipe):
    run = pipe.run(Request(prompt="a cat", steps=4, seed=3))
    run.preview(next(iter(run)))
    assert np.array_equal(run.finish().latents, pipe("a cat", steps=4, seed=3, output="latent"))


def test_a_cancelled_run_has_no_picture(pipe, calls):
    run = pipe.run(Request(prompt="a cat", steps=4))
    next(iter(run))
    run.cancel()
    with pytest.raises(RequestError, match="cancelled"):
        run.finish()
    assert calls["unet"] == 1


def test_closing_closes_what_was_opened(pipe, calls):
    pipe("a cat", steps=1)
    pipe.close()
    assert calls["closed"] == 3


def test_a_size_it_was_not_converted_for(tiny_folder):
    with pytest.raises(PackageError, match="converted for 64x64, not for 96x64; convert it again with --size 96x64"):
        Pipeline.load(tiny_folder, size=(96, 64))


def test_a_missing_part_is_named(pipe):
    with pytest.raises(PackageError, match="has no control, only"):
        pipe.engine("control")


def test_16_bit_greys_keep_their_depth_as_maps(pipe, picture):
    ramp = np.linspace(0, 65535, SIDE).astype(np.uint16)[None].repeat(SIDE, axis=0)
    inputs = read_inputs(picture, MapSource(map=Image.fromarray(ramp)), SIDE, SIDE)
    assert len(np.unique(inputs.change_map)) == SIDE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"rule": "mine"}, "rule is 'mine', expected one of scale"),
        ({"sampler": "mine"}, "sampler is 'mine', expected one of"),
        ({"spacing": "mine"}, 'spacing "mine" is not known'),
    ],
)
def test_settings_out_of_range(pipe, settings, message):
    with pytest.raises(RequestError, match=message):
        pipe("a cat", **settings)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"steps": "20"}, "setting 'steps' is '20', expected int"),
        ({"steps": True}, "setting 'steps' is True"),
        ({"prompt": None}, "setting 'prompt' is None"),
        ({"magic": 1}, r"unknown settings \['magic'\]"),
    ],
)
def test_settings_from_a_file_are_checked(raw, message):
    with pytest.raises(RequestError, match=message):
        Request.from_dict(raw)


def test_what_engines_say_when_they_are_loaded_reaches_the_result(pipe, picture):
    request = Request(prompt="a boat", steps=1, strength=1.0)
    run = pipe.run(request, read_inputs(picture, MapSource(map="gradient:left-right"), *pipe.size))
    assert run.notices == ("vae_encoder was loaded", "text_encoder was loaded")
    assert run.finish().notices == (*run.notices, "unet was loaded", "vae_decoder was loaded")


def order_of(pipe, request, inputs, monkeypatch):
    """What is planned, and what is used first, second ..."""
    planned, used = [], []
    with monkeypatch.context() as patch:
        patch.setattr(Residents, "ahead", lambda self, wanted: planned.extend(one.key for one in wanted))
        get = Residents.get
        patch.setattr(Residents, "get", lambda self, wanted: (used.append(wanted.key), get(self, wanted))[1])
        pipe.run(request, inputs).finish()
    return planned, list(dict.fromkeys(used))


@pytest.mark.parametrize(
    ("settings", "change_map", "drawn_from"),
    [
        ({}, None, "noise"),
        ({"guidance_scale": 1.0}, None, "noise"),
        ({"strength": 0.5}, None, "picture"),
        ({"strength": 0.9}, None, "picture"),
        ({}, "gradient:left-right", "picture"),
        ({"refine_at": 1.0}, "gradient:left-right", "picture"),
        ({}, np.zeros((SIDE, SIDE), np.float32), "picture"),
    ],
)
def test_the_plan_is_what_is_used_in_that_order(
    pipe, tiny_folder, monkeypatch, picture, settings, change_map, drawn_from
):
    with Pipeline.load(tiny_folder, EngineOptions(engine="coreml"), refiner=tiny_folder) as both:
        source = picture if drawn_from == "picture" else None
        inputs = read_inputs(source, MapSource(map=change_map), *both.size)
        planned, used = order_of(both, Request(prompt="a boat", steps=6, **settings), inputs, monkeypatch)
    assert planned == used
