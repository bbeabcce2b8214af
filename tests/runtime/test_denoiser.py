"""From a network to x0: parameterisations, guidance, rows and what happens when a network returns nonsense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glassine.errors import EngineError, RequestError
from glassine.runtime.denoiser import Conditioning, Denoiser, Guidance, NetworkCall, Row
from glassine.runtime.schedule import STABLE_DIFFUSION

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

RNG = np.random.default_rng(5)
SHAPE = (3, 4, 8, 8)
X = RNG.standard_normal(SHAPE).astype(np.float32) * 5
COND, UNCOND = (RNG.standard_normal((3, 6, 1, 7)).astype(np.float32) for _ in range(2))
SIGMA = 4.86
ALPHA = 1 / (1 + SIGMA**2)


class Network:
    """Answers row by row from sample, timestep, context and extras, in one buffer, and remembers what it was asked."""

    def __init__(self, rows: int) -> None:
        self.calls: list[dict[str, np.ndarray]] = []
        self._output = np.empty((rows, *SHAPE[1:]), dtype=np.float32)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append({name: array.copy() for name, array in inputs.items()})
        for row in range(len(self._output)):
            parts = {name: array[row] for name, array in inputs.items()}
            self._output[row] = answer(**parts)
        return {"noise_pred": self._output}


def answer(
    sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray, **extra: np.ndarray
) -> np.ndarray:
    assert encoder_hidden_states.shape == (6, 1, 7)
    shift = encoder_hidden_states.sum() / 40 + timestep / 1000 + sum(array.sum() for array in extra.values())
    return np.tanh(sample + np.roll(sample, 1, 2) + np.float32(shift))


def expected_output(x: np.ndarray, context: np.ndarray, picture: int) -> np.ndarray:
    t = np.float32(STABLE_DIFFUSION.t_of_sigma(SIGMA))
    sample = (x[picture].astype(np.float64) * ALPHA**0.5).astype(np.float32)
    return answer(sample, t, context[picture if len(context) > 1 else 0])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("pictures", [1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_rows_are_only_a_matter_of_packing(rows: int, pictures: int, scale: float) -> None:
    network = Network(rows)
    guidance = Guidance(
        cond=Conditioning(context=COND[:pictures]), uncond=Conditioning(context=UNCOND[:1]), scale=scale
    )
    denoise = Denoiser(network, STABLE_DIFFUSION, guidance, rows=rows)
    x = X[:pictures]
    denoised = denoise(x, SIGMA)
    for picture in range(pictures):
        eps = expected_output(x, COND, picture)
        if scale != 1:
            uncond = expected_output(x, UNCOND[:1], picture)
            eps = uncond + scale * (eps - uncond)
        # measured 5e-6 of x up to 20: float32 products
        assert np.allclose(denoised[picture], x[picture] - SIGMA * eps, rtol=0, atol=2e-5)
    jobs = pictures * (1 if scale == 1 else 2)
    assert len(network.calls) == -(-jobs // rows)
    for call in network.calls:
        assert call["sample"].shape == (rows, *SHAPE[1:])
        assert call["sample"].dtype == call["timestep"].dtype == np.float32
        assert np.all(call["timestep"] == np.float32(STABLE_DIFFUSION.t_of_sigma(SIGMA)))


def test_two_rows_are_apples() -> None:
    """Row 0 the negative prompt, row 1 the prompt; scale 1 never asks for the negative prompt."""
    network = Network(2)
    guidance = Guidance(cond=Conditioning(context=COND[:1]), uncond=Conditioning(context=UNCOND[:1]))
    Denoiser(network, STABLE_DIFFUSION, guidance, rows=2)(X[:1], SIGMA)
    assert np.array_equal(network.calls[0]["encoder_hidden_states"], np.concatenate([UNCOND[:1], COND[:1]]))
    network = Network(2)
    alone = Guidance(cond=Conditioning(context=COND[:2]), uncond=Conditioning(context=UNCOND[:1]), scale=1)
    Denoiser(network, STABLE_DIFFUSION, alone, rows=2)(X[:2], SIGMA)
    assert np.array_equal(network.calls[0]["encoder_hidden_states"], COND[:2])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_parameterisations_equal_diffusers(prediction: str, sigma: float) -> None:
    """x0 from the output, through DDIM's own conversion in double precision."""
    network = Network(1)
    context = Conditioning(context=COND[:1])
    guidance = Guidance(cond=context, scale=1)
    denoise = Denoiser(network, STABLE_DIFFUSION, guidance, rows=1, prediction=prediction)
    x = X[:1].astype(np.float64)
    denoised = denoise(x, sigma)
    assert denoised.dtype == np.float64
    output = network(**network.calls[0])["noise_pred"]

    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    alpha = 1 / (1 + sigma**2)
    scheduler.alphas_cumprod = torch.full((1000,), alpha, dtype=torch.float64)
    scheduler.set_timesteps(10)
    step = scheduler.step(torch.from_numpy(output).double(), 500, torch.from_numpy(x * alpha**0.5))
    # measured 2e-15 relative; epsilon at sigma 14.6 cancels to 3e-14
    assert np.allclose(denoised, step.pred_original_sample.numpy(), rtol=1e-12, atol=1e-12)


def test_a_float32_state_stays_float32() -> None:
    for prediction in ("epsilon", "v_prediction", "sample"):
        denoise = Denoiser(
            Network(1),
            STABLE_DIFFUSION,
            Guidance(cond=Conditioning(context=COND), scale=1),
            rows=1,
            prediction=prediction,
        )
        first = denoise(X, SIGMA)
        assert first.dtype == np.float32
        kept = first.copy()
        denoise(-X, 1.0)
        assert np.array_equal(first, kept)  # a new array, not the network's or our buffer


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_brings_back_the_spread(rescale: float) -> None:
    """Equations 15 and 16 of arXiv 2305.08891, written with torch as diffusers writes them."""
    guidance = Guidance(
        cond=Conditioning(context=COND), uncond=Conditioning(context=UNCOND), scale=9.0, rescale=rescale
    )
    outputs = RNG.standard_normal((3, 2, 4, 8, 8)).astype(np.float32)
    uncond, cond = torch.from_numpy(outputs).unbind(dim=1)
    guided = uncond + 9.0 * (cond - uncond)
    spread = cond.std(dim=[1, 2, 3], keepdim=True) / guided.std(dim=[1, 2, 3], keepdim=True)
    expected = rescale * (guided * spread) + (1 - rescale) * guided
    # measured 2e-6 of numbers up to 30
    assert np.allclose(guidance.combine(outputs), expected.numpy(), rtol=0, atol=1e-5)


def test_control_and_extra_inputs_reach_their_rows() -> None:
    network = Network(2)
    seen: list[NetworkCall] = []

    def control(call: NetworkCall) -> dict[str, np.ndarray]:
        seen.append(call)
        return {"additional_residual_0": np.stack([np.full(2, 10 * row.picture) for row in call.rows])}

    ids = np.arange(6, dtype=np.float32).reshape(1, 6)
    pooled = np.arange(3, dtype=np.float32).reshape(3, 1)
    guidance = Guidance(
        cond=Conditioning(context=COND, extra={"time_ids": ids, "text_embeds": pooled}),
        uncond=Conditioning(context=UNCOND, extra={"time_ids": -ids, "text_embeds": -pooled}),
    )
    Denoiser(network, STABLE_DIFFUSION, guidance, rows=2, control=control)(X, SIGMA, 13)
    assert [call.i for call in seen] == [13, 13, 13]
    assert seen[1].rows == (Row(1, "uncond"), Row(1, "cond"))
    assert seen[1].sigma == SIGMA
    assert np.array_equal(network.calls[1]["time_ids"], np.concatenate([-ids, ids]))
    assert network.calls[2]["text_embeds"].ravel().tolist() == [-2, 2]
    assert network.calls[2]["additional_residual_0"].tolist() == [[20, 20], [20, 20]]


def test_whole_timesteps() -> None:
    network = Network(1)
    guidance = Guidance(cond=Conditioning(context=COND[:1]), scale=1)
    Denoiser(network, STABLE_DIFFUSION, guidance, rows=1, whole_timesteps=True)(X[:1], 1.2345)
    Denoiser(network, STABLE_DIFFUSION, guidance, rows=1)(X[:1], 1.2345)
    rounded, fractional = (float(call["timestep"][0]) for call in network.calls)
    assert rounded == round(fractional) != fractional


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_is_named(poison: float) -> None:
    def network(sample: np.ndarray, **_: Any) -> dict[str, np.ndarray]:
        output = np.zeros_like(sample)
        output[1, 2, 3, :2] = poison
        return {"noise_pred": output}

    guidance = Guidance(cond=Conditioning(context=COND[:1]), uncond=Conditioning(context=UNCOND[:1]))
    with pytest.raises(
        EngineError, match=r"step 8 \(sigma 4.86, timestep 7\d\d.*2 of 512 numbers.*NaN or infinite.*fp32"
    ):
        Denoiser(network, STABLE_DIFFUSION, guidance, rows=2)(X[:1], SIGMA, 7)


def test_nonsense_in_padding_rows_is_nobodys() -> None:
    def network(sample: np.ndarray, **_: Any) -> dict[str, np.ndarray]:
        output = np.zeros_like(sample)
        output[1] = np.nan
        return {"noise_pred": output}

    guidance = Guidance(cond=Conditioning(context=COND[:1]), scale=1)
    denoised = Denoiser(network, STABLE_DIFFUSION, guidance, rows=2)(X[:1], SIGMA)
    assert np.array_equal(denoised, X[:1])


def test_an_output_of_another_shape_is_named() -> None:
    guidance = Guidance(cond=Conditioning(context=COND[:1]), scale=1)
    denoise = Denoiser(lambda **_: {"noise_pred": np.zeros((1, 3, 8, 8))}, STABLE_DIFFUSION, guidance, rows=1)
    with pytest.raises(EngineError, match=r"shape \(1, 3, 8, 8\), expected \(1, 4, 8, 8\)"):
        denoise(X[:1], SIGMA)


def test_settings_that_cannot_be() -> None:
    context = Conditioning(context=COND[:1])
    with pytest.raises(RequestError, match=r"guidance scale 7\.5 needs the conditioning of a negative prompt"):
        Guidance(cond=context)
    with pytest.raises(RequestError, match="guidance scale is nan; expected a finite number"):
        Guidance(cond=context, uncond=context, scale=float("nan"))
    with pytest.raises(RequestError, match=r"guidance rescale is 1\.5; expected"):
        Guidance(cond=context, uncond=context, rescale=1.5)
