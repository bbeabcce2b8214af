"""The loop as its caller sees it: steps one at a time, cancelling, batches, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassine.errors import EngineError, RequestError
from glassine.runtime.loop import denoising_steps
from glassine.runtime.noise import StepNoise, randn
from glassine.runtime.samplers import SAMPLERS
from glassine.runtime.schedule import STABLE_DIFFUSION, make_sigmas

SIGMAS = make_sigmas(STABLE_DIFFUSION, 10, "karras")
NOISE = randn(0, (2, 4, 8, 8))
SOURCE = randn(1, (2, 4, 8, 8))


GOLDEN = Path(__file__).parents[1] / "golden"


def shrink(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
    return np.tanh(x / (1 + sigma))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_float32_state_stays_float32(name: str) -> None:
    n = np.arange(64).reshape(1, 1, 8, 8) % 11
    for step in denoising_steps(
        shrink, SAMPLERS[name], SIGMAS, NOISE, source=SOURCE, n=n, step_noise=StepNoise([3, 4])
    ):
        assert step.x.dtype == np.float32
        assert step.denoised.dtype == np.float32
        assert np.isfinite(step.x).all()


def test_text_to_image_starts_from_noise() -> None:
    seen: list[np.ndarray] = []

    def model(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        seen.append(x)
        return shrink(x, sigma, i)

    steps = list(denoising_steps(model, SAMPLERS["euler"], SIGMAS, NOISE))
    assert np.array_equal(seen[0], NOISE * np.float32(SIGMAS[0]))
    assert [step.i for step in steps] == list(range(10))
    assert [step.sigma for step in steps] == SIGMAS[:-1].tolist()
    assert [step.evaluations for step in steps] == list(range(1, 11))
    assert all(step.steps == 10 for step in steps)
    assert np.array_equal(steps[-1].x, steps[-1].denoised)  # at sigma 0, Euler ends on the prediction


def test_what_is_yielded_is_what_goes_on() -> None:
    """Each state is the next evaluation's input, each prediction the model's own; the last state is the result."""
    inputs, outputs = [], []

    def model(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        inputs.append(x)
        outputs.append(shrink(x, sigma, i))
        return outputs[-1]

    generator = denoising_steps(model, SAMPLERS["dpmpp_2m"], SIGMAS, NOISE)
    states, predictions = [], []
    while True:
        try:
            step = next(generator)
        except StopIteration as end:
            result = end.value
            break
        states.append(step.x)
        predictions.append(step.denoised)
    assert all(np.array_equal(state, x) for state, x in zip(states, inputs[1:], strict=False))
    assert all(np.array_equal(a, b) for a, b in zip(predictions, outputs, strict=True))
    assert np.array_equal(states[-1], result)


def test_previews_show_the_source_where_it_is_frozen() -> None:
    n = np.full((1, 1, 8, 8), 10)
    n[..., :4] = 3
    for step in denoising_steps(shrink, SAMPLERS["euler"], SIGMAS, NOISE, source=SOURCE, n=n):
        frozen = step.denoised[..., :4]
        assert np.array_equal(frozen, SOURCE[..., :4]) == (step.i < 7)


def test_closing_the_generator_cancels() -> None:
    calls = []

    def model(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        calls.append(i)
        return shrink(x, sigma, i)

    steps = denoising_steps(model, SAMPLERS["euler"], SIGMAS, NOISE)
    for step in steps:
        if step.i == 3:
            steps.close()
    assert calls == [0, 1, 2, 3]
    with pytest.raises(StopIteration):
        next(steps)


def test_an_error_of_the_model_reaches_the_caller() -> None:
    def model(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        if i == 2:
            raise EngineError("out of memory")
        return shrink(x, sigma, i)

    with pytest.raises(EngineError, match="out of memory"):
        list(denoising_steps(model, SAMPLERS["euler"], SIGMAS, NOISE))


def test_inputs_are_not_written_to() -> None:
    noise, source = NOISE.copy(), SOURCE.copy()
    n = np.arange(64).reshape(1, 1, 8, 8) % 11
    for array in (noise, source, n):
        array.flags.writeable = False
    for name, sampler in SAMPLERS.items():
        steps = denoising_steps(
            lambda x, sigma, i: x, sampler, SIGMAS, noise, source=source, n=n, step_noise=StepNoise([3, 4])
        )
        assert len(list(steps)) == 10, name


def test_ending_above_zero_is_brought_to_the_scale_of_latents() -> None:
    sigmas = make_sigmas(STABLE_DIFFUSION, 10, "leading", "min")
    last = list(denoising_steps(lambda x, sigma, i: SOURCE, SAMPLERS["ddim"], sigmas, NOISE, source=SOURCE))[-1]
    ratio, end = sigmas[-1] / sigmas[0], sigmas[-1]
    start = SOURCE + sigmas[0] * NOISE
    expected = (SOURCE + ratio * (start - SOURCE)) / np.sqrt(end**2 + 1)
    assert np.allclose(last.x, expected, atol=1e-5)  # measured 2e-6: ten float32 steps
    untouched = np.zeros((1, 1, 8, 8), dtype=int)
    untouched[..., 0] = 10
    last = list(denoising_steps(shrink, SAMPLERS["ddim"], sigmas, NOISE, source=SOURCE, n=untouched))[-1]
    assert np.array_equal(last.x[..., 1:], SOURCE[..., 1:])


def test_a_run_of_no_steps_is_the_source() -> None:
    steps = denoising_steps(shrink, SAMPLERS["euler"], SIGMAS[-1:], NOISE, source=SOURCE)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert np.array_equal(end.value.value, SOURCE)


TABLE = np.full((1, 1, 8, 8), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": NOISE[0]}, r"noise has shape \(4, 8, 8\); expected \(B, C, h, w\)"),
        (
            {"source": SOURCE[:1]},
            r"source latents have shape \(1, 4, 8, 8\), the noise \(2, 4, 8, 8\); expected the same",
        ),
        ({"source": None}, "a change map needs a picture to change"),
        ({"n": TABLE[0, 0]}, r"the step table n is int64 \(8, 8\); expected integers of shape \(2, 1, 8, 8\)"),
        ({"n": TABLE / 2}, "the step table n is float64"),
        ({"n": TABLE + 7}, "runs from 11 to 11; expected 0 to 10"),
        ({"n": TABLE - 5}, "runs from -1 to -1; expected 0 to 10"),
    ],
)
def test_what_cannot_be_drawn(changes: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {"noise": NOISE, "source": SOURCE, "n": TABLE, **changes}
    with pytest.raises(RequestError, match=message):
        list(denoising_steps(shrink, SAMPLERS["euler"], SIGMAS, inputs.pop("noise"), **inputs))


def test_stochastic_samplers_ask_for_noise() -> None:
    with pytest.raises(RequestError, match="adds noise at every step; pass step_noise"):
        list(denoising_steps(shrink, SAMPLERS["euler_a"], SIGMAS, NOISE))


@pytest.mark.parametrize("name", SAMPLERS)
def test_golden_results(name: str) -> None:
    """The whole path from seed to latents, unchanged since the values were written, on every machine."""
    spec = importlib.util.spec_from_file_location("make_samplers", GOLDEN / "make_samplers.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    golden = json.loads((GOLDEN / "samplers.json").read_text(encoding="utf-8"))
    # Written on x86 with glibc; another libm differs in the last digit of exp and log.
    assert np.allclose(make.drawn(name).ravel(), golden[name], rtol=1e-9, atol=1e-12)
