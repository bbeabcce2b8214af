"""A collage is drawn by the one loop: an ordinary picture with a map, and with words in their places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from glassine.errors import PackageError, RequestError
from glassine.runtime.collage import Collage, Layer, arrange
from glassine.runtime.collage_inputs import collage_inputs
from glassine.runtime.control import Control
from glassine.runtime.control_pictures import with_controls
from glassine.runtime.denoiser import NetworkCall, Row
from glassine.runtime.engine import EngineOptions
from glassine.runtime.inputs import Inputs
from glassine.runtime.layer_attention import LayerAttention, weight_at
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.plan import Need

PROMPT = "a red star and a blue circle"
SETTINGS = {"steps": 3, "seed": 4, "guidance_scale": 4.0, "output": "numpy"}
OFF = {"attract": 0.0, "repel": 0.0}


@pytest.fixture(scope="module")
def pipe(collage_folder):
    with Pipeline.load(collage_folder, EngineOptions(engine="portable")) as pipe:
        yield pipe


def block(colour: tuple[int, int, int], side: int = 24) -> np.ndarray:
    return np.tile(np.array([*colour, 255], np.uint8), (side, side, 1))


def scene(**said: object) -> Collage:
    star, circle = block((220, 30, 30)), block((40, 60, 220))
    layers = [Layer(star, "a red star", x=4, y=20, **said), Layer(circle, "a blue circle", x=36, y=20, **said)]
    return Collage(layers, background="#808080", background_change=0.7)


def test_without_words_it_is_a_picture_with_a_change_map(pipe):
    """Bit for bit; nor does it need the UNet for collages then."""
    arranged = arrange(scene(**OFF), 64, 64)
    expected = pipe(PROMPT, image=arranged.pixels, change_map=arranged.change, **SETTINGS)
    assert np.array_equal(pipe(PROMPT, image=scene(**OFF), **SETTINGS), expected)
    nameless = Collage([replace(layer, words="", attract=None) for layer in scene().layers], background="#808080")
    assert collage_inputs(pipe, nameless, pipe.request({"prompt": PROMPT})).words is None
    assert not np.array_equal(pipe(PROMPT, image=scene(), **SETTINGS), expected)


def test_what_is_kept_is_kept_to_the_byte(pipe):
    kept = Collage(
        [replace(layer, change=0.0) for layer in scene().layers], background_change=0.0, background="#808080"
    )
    run = pipe.run(pipe.request({"prompt": PROMPT}), collage_inputs(pipe, kept, pipe.request({"prompt": PROMPT})))
    result = run.finish()
    assert result.evaluations == 0
    assert np.array_equal(result.pixels, arrange(kept, 64, 64).pixels)
    half = Collage([replace(scene().layers[0], change=0.0), scene().layers[1]], background_change=0.0, blur=0.0)
    drawn, source = pipe(PROMPT, image=half, **SETTINGS), arrange(half, 64, 64).pixels
    assert np.array_equal(drawn[:, :16], source[:, :16])  # two latent cells from what changes
    assert not np.array_equal(drawn[24:40, 40:56], source[24:40, 40:56])


def test_the_table_is_that_of_the_true_sigma(pipe, monkeypatch):
    """Every call has the weight of its own noise, also where the run begins late; the negative prompt has none."""
    calls, engine = [], pipe.engine("collage_unet")
    predict = engine.predict

    def spy(**arrays):
        calls.append({name: array.copy() for name, array in arrays.items()})
        return predict(**arrays)

    monkeypatch.setattr(engine, "predict", spy)
    request = pipe.request({"prompt": PROMPT, "steps": 6, "strength": 0.5, "sampler": "heun", "guidance_scale": 4.0})
    inputs = collage_inputs(pipe, scene(attract=0.5, repel=0.25), request)
    steps = list(pipe.run(request, inputs))
    assert len(calls) == steps[-1].evaluations > len(steps)  # heun calls twice a step
    first, second = inputs.words.columns
    assert (first, second) == ((1, 2, 3), (5, 6, 7))
    for call in calls:
        sigma = float(pipe.schedule.sigma_of_t(call["timestep"][1]))
        expected = np.zeros((77, 4), np.float32)
        expected[list(first)] = [0.5, 0, 0.25, 0]
        expected[list(second)] = [0, 0.5, 0, 0.25]
        assert not call["collage_table"][0].any()
        np.testing.assert_allclose(call["collage_table"][1][:, 0], expected * weight_at(sigma), rtol=1e-4)
        np.testing.assert_array_equal(
            call["collage_masks_0"][0, 0], inputs.words.visible[0].reshape(8, 8, 8, 8).mean((1, 3))
        )
        np.testing.assert_array_equal(call["collage_masks_0"][1, 3], call["collage_masks_0"][1, 1] - 1)
    assert calls[0]["timestep"][1] < 600


def test_the_negative_prompt_is_not_biased(pipe):
    """At guidance 0 the picture is the negative prompt's alone: the words change nothing."""
    settings = {**SETTINGS, "guidance_scale": 0.0}
    plain = pipe(PROMPT, image=scene(**OFF), **settings)
    # Two UNets, whose fused operations sum in other orders, and the picture is rounded.
    assert np.abs(pipe(PROMPT, image=scene(), **settings).astype(int) - plain).max() <= 1


def test_control_counts_where_its_layers_say(pipe):
    """Nowhere: as without a net. Everywhere: as without a map. Both to the bit."""

    def drawn(control: float | None, *controls: Control) -> np.ndarray:
        whole = Layer(block((90, 160, 200), 64), change=0.7, control=control)
        inputs = collage_inputs(pipe, Collage([whole]), pipe.request({"prompt": PROMPT}))
        assert inputs.control_map is not None
        settings = {name: value for name, value in SETTINGS.items() if name != "output"}
        return (
            pipe.run(pipe.request({"prompt": PROMPT, **settings}), with_controls(inputs, controls, (64, 64)))
            .finish()
            .pixels
        )

    net = Control("canny", preprocess="canny")
    without = drawn(0.5)
    assert np.array_equal(drawn(0.0, net), without)
    everywhere = drawn(1.0, net)
    assert np.array_equal(everywhere, drawn(0.0, replace(net, map=np.ones((64, 64), np.float32))))
    assert not np.array_equal(everywhere, without)
    assert not np.array_equal(drawn(0.5, net), everywhere)


def test_control_and_words_together(pipe):
    """The UNet that takes both is called while the net acts, the one for collages alone after it."""
    inputs = collage_inputs(pipe, scene(), pipe.request({"prompt": PROMPT}))
    settings = {"prompt": PROMPT, "steps": 4, "guidance_scale": 4.0, "seed": 1}
    controlled = with_controls(inputs, [Control("canny", preprocess="canny", stop=0.5)], (64, 64))
    request = pipe.request(settings)
    needed = pipe.needs(request, controlled)
    assert {Need("controlled_collage_unet"), Need("collage_unet"), Need("control:canny")} <= set(needed)
    assert Need("unet") not in needed
    both, words = (pipe.run(request, given).finish().pixels for given in (controlled, inputs))
    net = pipe.run(request, replace(controlled, words=None)).finish().pixels
    assert not np.array_equal(both, words)
    assert not np.array_equal(both, net)


def test_a_call_of_one_row_has_what_its_row_has_among_two(pipe):
    """Guidance in two calls of one row each: the rows of a call decide what is biased, not their number."""
    words = collage_inputs(pipe, scene(), pipe.request({"prompt": PROMPT})).words
    specs = pipe.inputs("collage_unet")
    two = LayerAttention(words, specs, 2)(NetworkCall(0, 2.0, (Row(0, "uncond"), Row(0, "cond")), {}))
    for index, branch in enumerate(("uncond", "cond")):
        one = LayerAttention(words, specs, 1)(NetworkCall(0, 2.0, (Row(0, branch),), {}))
        for name, array in one.items():
            np.testing.assert_array_equal(array[0], two[name][index])


@pytest.mark.parametrize(
    ("collage", "prompt", "error", "message"),
    [
        (scene(), "a red star", RequestError, 'layer "a blue circle": the words "a blue circle" are not in the prompt'),
        (scene(), PROMPT + ", a red star", RequestError, 'layer "a red star": .* 2 times .* say which'),
        (Collage([*scene().layers, Layer(block((0, 9, 0)), "and")]), PROMPT, RequestError,
         r"3 layers have words, this model's collage_unet takes 2; convert it again: .*--collage 3 --overwrite"),
    ],
)  # fmt: skip
def test_refused(pipe, collage, prompt, error, message):
    with pytest.raises(error, match=message):
        pipe(prompt, image=collage, steps=1)


def test_refused_with_other_things(pipe, tiny_folder):
    with pytest.raises(RequestError, match="a collage is its own change map"):
        pipe(PROMPT, image=scene(), mask=np.ones((64, 64)))
    with pytest.raises(RequestError, match="a collage is one opaque picture"):
        pipe(PROMPT, image=scene(), transparent=True)
    with Pipeline.load(tiny_folder, EngineOptions(engine="portable")) as plain:
        message = (
            r"has no collage_unet for 64x64, .* glassine convert --base \S*tiny --collage \(or draw without: attract"
        )
        with pytest.raises(PackageError, match=message):
            plain(PROMPT, image=scene())
        assert isinstance(collage_inputs(plain, scene(**OFF), plain.request({"prompt": PROMPT})), Inputs)
