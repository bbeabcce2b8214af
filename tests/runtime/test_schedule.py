"""Noise levels against diffusers' tables and published numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glassine.errors import RequestError
from glassine.manifest import Scheduler
from glassine.runtime.samplers import SAMPLERS
from glassine.runtime.schedule import SPACINGS, STABLE_DIFFUSION, NoiseSchedule, last_steps, make_sigmas

diffusers = pytest.importorskip("diffusers")

# diffusers hands torch tensors to np.array, which warns in NumPy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
]
TRAINING = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_stable_diffusion() -> None:
    schedule = STABLE_DIFFUSION
    assert schedule.alphas_cumprod[[0, 999]] == pytest.approx([0.99915, 0.0046601], rel=1e-5)
    assert (schedule.sigma_min, schedule.sigma_max) == pytest.approx((0.029167, 14.614641), rel=1e-5)


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_equal_diffusers(kind: str, zero_snr: bool) -> None:
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": kind}
    reference = diffusers.EulerDiscreteScheduler(**betas, rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule(Scheduler(**betas, zero_terminal_snr=zero_snr))
    expected = reference.alphas_cumprod.double().numpy()
    # diffusers multiplies a thousand float32 numbers: measured 7.5e-7, and 8.0e-6 where the rescaled end nears 0
    assert np.abs(schedule.alphas_cumprod / expected - 1).max() < (2e-5 if zero_snr else 2e-6)
    if zero_snr:
        assert schedule.sigma_max == pytest.approx(4096, rel=1e-6)
        assert schedule.alphas_cumprod[0] == pytest.approx(expected[0], rel=1e-6)


def test_sigma_and_t_are_inverse() -> None:
    schedule = STABLE_DIFFUSION
    for t in (0, 1, 499, 999):
        assert schedule.t_of_sigma(float(schedule.sigmas[t])) == t
    fractional = np.linspace(0, 999, 517)
    there_and_back = [schedule.t_of_sigma(float(sigma)) for sigma in schedule.sigma_of_t(fractional)]
    assert np.allclose(there_and_back, fractional, rtol=0, atol=1e-9)  # measured 1e-10
    assert schedule.t_of_sigma(100.0) == 999
    assert schedule.t_of_sigma(0.001) == 0


# spacing -> the diffusers scheduler that makes the same levels
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("linspace", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("leading", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("trailing", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("exponential", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("beta", "EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    ("rounded", "DPMSolverMultistepScheduler", {}),
    ("rounded", "UniPCMultistepScheduler", {}),
    ("karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("spacing", "scheduler", "options"), CASES)
@pytest.mark.parametrize("steps", [4, 20, 37, 50])
def test_spacings_equal_diffusers(spacing: str, scheduler: str, options: dict[str, Any], steps: int) -> None:
    reference = getattr(diffusers, scheduler)(**TRAINING, **options)
    reference.set_timesteps(steps)
    sigmas = make_sigmas(STABLE_DIFFUSION, steps, spacing)
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    # measured 1.3e-5 at sigma_min, where float32 alphas leave 1 - ac few digits; linspace 7.5e-5, because diffusers
    # interpolates sigma between timesteps, not its log
    worst = np.abs(sigmas[:-1] / reference.sigmas.double().numpy()[:-1] - 1).max()
    assert worst < (1.5e-4 if spacing == "linspace" else 2e-5)
    if scheduler == "EulerDiscreteScheduler":
        times = [STABLE_DIFFUSION.t_of_sigma(float(sigma)) for sigma in sigmas[:-1]]
        assert np.abs(np.array(times) - reference.timesteps.numpy()).max() < 1e-2  # measured 1e-3


@pytest.mark.parametrize(
    ("scheduler", "spacing", "options"),
    [
        ("DDIMScheduler", "leading", {"steps_offset": 1}),
        ("DDIMScheduler", "trailing", {"timestep_spacing": "trailing"}),
        ("LCMScheduler", "lcm", {}),
        ("TCDScheduler", "lcm", {}),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 25, 50])
def test_timesteps_equal_diffusers(scheduler: str, spacing: str, options: dict[str, Any], steps: int) -> None:
    reference = getattr(diffusers, scheduler)(**TRAINING, **options)
    reference.set_timesteps(steps)
    sigmas = make_sigmas(STABLE_DIFFUSION, steps, spacing)
    times = [round(STABLE_DIFFUSION.t_of_sigma(float(sigma)), 9) for sigma in sigmas[:-1]]
    assert times == reference.timesteps.tolist()


def test_published_timesteps() -> None:
    def times(steps: int, spacing: str) -> list[float]:
        sigmas = make_sigmas(STABLE_DIFFUSION, steps, spacing)
        return [round(STABLE_DIFFUSION.t_of_sigma(float(sigma)), 1) for sigma in sigmas[:-1]]

    assert times(20, "linspace")[:2] + times(20, "linspace")[-2:] == [999, 946.4, 52.6, 0]
    assert times(20, "leading")[:2] + times(20, "leading")[-1:] == [951, 901, 1]
    assert times(20, "rounded")[:2] + times(20, "rounded")[-1:] == [999, 949, 50]
    assert times(20, "trailing")[:2] + times(20, "trailing")[-1:] == [999, 949, 49]
    assert times(20, "sgm_uniform")[:3] == [999, 949.0, 899.1]
    assert times(4, "lcm") == [999, 759, 499, 259]


def test_align_your_steps_are_the_published_levels() -> None:
    """And stretched ones lie on the log-linear curve through them."""
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    assert np.allclose(make_sigmas(STABLE_DIFFUSION, 11, "ays")[:-1], published, rtol=1e-12)
    assert np.allclose(make_sigmas(STABLE_DIFFUSION, 21, "ays")[:-1][::2], published, rtol=1e-12)
    between = make_sigmas(STABLE_DIFFUSION, 21, "ays")[1]
    assert between == pytest.approx(np.sqrt(published[0] * published[1]), rel=1e-12)
    assert make_sigmas(STABLE_DIFFUSION, 11, "ays_xl")[3] == pytest.approx(2.181)


def test_kl_optimal_is_even_in_the_angle() -> None:
    angles = np.arctan(make_sigmas(STABLE_DIFFUSION, 12, "kl_optimal")[:-1])
    assert np.allclose(np.diff(angles), np.diff(angles)[0], rtol=1e-9)
    assert np.tan(angles[[0, -1]]) == pytest.approx([STABLE_DIFFUSION.sigma_max, STABLE_DIFFUSION.sigma_min])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 3, 8, 20, 50])
def test_levels_fall_to_their_end(spacing: str, steps: int) -> None:
    sigmas = make_sigmas(STABLE_DIFFUSION, steps, spacing)
    assert sigmas.dtype == np.float64
    assert len(sigmas) == steps + 1
    assert np.all(np.diff(sigmas) < 0)
    assert sigmas[-1] == 0
    if spacing != "leading":
        assert sigmas[0] == pytest.approx(STABLE_DIFFUSION.sigma_max, rel=1e-4)


def test_ending_above_zero_as_ddim_does() -> None:
    sigmas = make_sigmas(STABLE_DIFFUSION, 20, "leading", "min")
    assert sigmas[-1] == STABLE_DIFFUSION.sigma_min
    assert np.array_equal(sigmas[:-1], make_sigmas(STABLE_DIFFUSION, 20, "leading")[:-1])


def test_every_sampler_has_a_spacing() -> None:
    for sampler in SAMPLERS.values():
        assert make_sigmas(STABLE_DIFFUSION, 20, sampler.spacing)[-1] == 0


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (20, "karas", 'spacing "karas" is not known; expected one of linspace'),
        (0, "karras", "0 steps cannot be drawn; expected at least 1"),
        (51, "lcm", 'spacing "lcm" cannot make 51 falling noise levels'),
        (2000, "trailing", 'spacing "trailing" cannot make 2000 falling noise levels'),
    ],
)
def test_what_cannot_be_made(steps: int, spacing: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_sigmas(STABLE_DIFFUSION, steps, spacing)


def test_unknown_betas() -> None:
    with pytest.raises(RequestError, match='beta_schedule "sigmoid" is not known'):
        NoiseSchedule(Scheduler(beta_schedule="sigmoid"))


@pytest.mark.parametrize(
    ("strength", "kept"), [(1.0, 10), (0.75, 7), (0.7, 7), (0.3, 3), (0.29, 2), (0.05, 0), (0.0, 0)]
)
def test_strength_keeps_the_last_steps(strength: float, kept: int) -> None:
    """As diffusers counts them, int(N * strength), but 0.7 of 10 is 7 even where 10 * 0.7 is 6.999."""
    sigmas = make_sigmas(STABLE_DIFFUSION, 10, "karras")
    assert np.array_equal(last_steps(sigmas, strength), sigmas[10 - kept :])


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(RequestError, match="expected a number from 0"):
        last_steps(make_sigmas(STABLE_DIFFUSION, 10, "karras"), strength)
