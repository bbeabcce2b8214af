"""Every sampler against diffusers over whole trajectories, against k-diffusion's formulas where diffusers has none or
is wrong, and against the equation itself: the order of its error."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from glassine.errors import RequestError
from glassine.runtime.history import Call, Past
from glassine.runtime.loop import denoising_steps
from glassine.runtime.noise import StepNoise, randn
from glassine.runtime.samplers import SAMPLERS, Sampler
from glassine.runtime.schedule import STABLE_DIFFUSION, make_sigmas

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers hands torch tensors to np.array, which warns in NumPy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
]

STEPS = 20
SHAPE = (1, 4, 8, 8)
RNG = np.random.default_rng(0)
START = RNG.standard_normal(SHAPE)
NOISES = RNG.standard_normal((2 * STEPS, *SHAPE))
TRAINING = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def mixture(x: np.ndarray, sigma: float) -> np.ndarray:
    """E[x0 | x] for x0 from two Gaussians, at 1.2 and -0.6, of width 0.4: nothing about it is linear in x."""
    variance = 0.16 + sigma**2
    nearer = ((x + 0.6) ** 2 - (x - 1.2) ** 2) / (2 * variance)
    weight = 0.5 * (1 + np.tanh(nearer / 2))
    mean = 1.2 * weight - 0.6 * (1 - weight)
    return mean + 0.16 / variance * (x - mean)


def ours(sampler: Sampler, sigmas: np.ndarray) -> np.ndarray:
    """The final state in sigma space (or, ending above sigma 0, at the latents' scale)."""
    steps = denoising_steps(
        lambda x, sigma, i: mixture(x, sigma), sampler, sigmas, START, step_noise=lambda index, shape: NOISES[index]
    )
    return list(steps)[-1].x


def theirs(
    monkeypatch: pytest.MonkeyPatch,
    scheduler: Any,
    start: np.ndarray,
    level: Callable[[Any, Any], float],
    **options: Any,
) -> np.ndarray:
    """The final state of diffusers' scheduler, fed with the same noises in double precision."""
    module = importlib.import_module(type(scheduler).__module__)
    noises: Iterator[np.ndarray] = iter(NOISES)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(noises)))
    x = torch.from_numpy(start)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t).double().numpy()
        sigma = float(level(scheduler, t))
        state = scaled * math.sqrt(sigma**2 + 1)
        # The ancestral DPM2 of diffusers asks for a slope at sigma 0 and throws it away.
        eps = (state - mixture(state, sigma)) / sigma if sigma > 0 else np.zeros(SHAPE)
        x = scheduler.step(torch.from_numpy(eps), t, x, **options).prev_sample
    return x.double().numpy()


def step_level(scheduler: Any, t: Any) -> float:
    return scheduler.sigmas[0 if scheduler.step_index is None else scheduler.step_index]


def two_stage_level(scheduler: Any, t: Any) -> float:
    if scheduler.state_in_first_order:
        return scheduler.sigmas[scheduler.step_index]
    ancestral = isinstance(scheduler, diffusers.KDPM2AncestralDiscreteScheduler)
    return scheduler.sigmas_interpol[scheduler.step_index - ancestral]


def timestep_level(scheduler: Any, t: Any) -> float:
    alpha = float(scheduler.alphas_cumprod[int(t)])
    return math.sqrt((1 - alpha) / alpha)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# diffusers keeps its sigmas and coefficients in float32; what is measured here is that.
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
SIGMA_SPACE = [
    ("euler", "EulerDiscreteScheduler", {}, 1),  # measured 1.0e-7
    ("euler", "EulerDiscreteScheduler", KARRAS, 1),  # 1.4e-7
    ("euler", "EulerDiscreteScheduler", EXPONENTIAL, 1),  # 1.6e-7
    ("euler_a", "EulerAncestralDiscreteScheduler", {}, 1),  # 3.9e-7
    ("heun", "HeunDiscreteScheduler", {}, 2),  # 2.4e-8
    ("heun", "HeunDiscreteScheduler", KARRAS, 2),  # 2.1e-8
    ("lms", "LMSDiscreteScheduler", {}, 1),  # 5.4e-8
    ("lms", "LMSDiscreteScheduler", KARRAS, 1),  # 5.8e-9
    ("dpm2", "KDPM2DiscreteScheduler", {}, 2),  # 9.8e-9
    ("dpm2", "KDPM2DiscreteScheduler", KARRAS, 2),  # 2.1e-8
    ("dpm2_a", "KDPM2AncestralDiscreteScheduler", {}, 2),  # 1.9e-7
    ("dpm2_a", "KDPM2AncestralDiscreteScheduler", KARRAS, 2),  # 1.6e-7
]


@pytest.mark.parametrize(("name", "scheduler", "options", "stages"), SIGMA_SPACE)
def test_equals_diffusers_in_sigma_space(
    monkeypatch: pytest.MonkeyPatch, name: str, scheduler: str, options: dict[str, Any], stages: int
) -> None:
    reference = getattr(diffusers, scheduler)(**TRAINING, timestep_spacing="linspace", **options)
    reference.set_timesteps(STEPS)
    every = reference.sigmas.double().numpy()
    # Two-stage schedulers list every level but the first twice.
    sigmas = every if stages == 1 else np.append(every[0:1], every[1:-1][::2])[: STEPS + 1]
    sigmas = np.append(sigmas[:STEPS], 0.0)
    level = two_stage_level if name.startswith("dpm2") else step_level
    expected = theirs(monkeypatch, reference, START * sigmas[0], level)
    assert relative(ours(SAMPLERS[name], sigmas), expected) < 1e-6


MULTISTEP = [
    ("dpmpp_2m", {}, {}),  # measured 2.4e-7
    ("dpmpp_2m", {}, KARRAS),  # 1.5e-7
    ("dpmpp_2m_sde", {}, {"algorithm_type": "sde-dpmsolver++"}),  # 4.5e-7
    ("dpmpp_2m_sde", {"correction": "heun"}, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),  # 4.0e-7
    ("dpmpp_2m_sde_heun", {}, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", **KARRAS}),  # 5.0e-7
    ("dpmpp_3m_sde", {"eta": 0}, {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}),  # 1.3e-7
]


@pytest.mark.parametrize(("name", "options", "reference_options"), MULTISTEP)
def test_equals_diffusers_dpmsolver(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], reference_options: dict[str, Any]
) -> None:
    reference = diffusers.DPMSolverMultistepScheduler(**TRAINING, **reference_options)
    reference.set_timesteps(STEPS)
    sigmas = reference.sigmas.double().numpy()
    expected = theirs(monkeypatch, reference, vp(START * sigmas[0], sigmas[0]), step_level)
    assert relative(ours(SAMPLERS[name].using(**options), sigmas), expected) < 2e-6


def vp(x: np.ndarray, sigma: float) -> np.ndarray:
    return x / math.sqrt(sigma**2 + 1)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("variant", "karras"), [("bh1", False), ("bh2", False), ("bh2", True)])
def test_unipc_equals_diffusers(
    monkeypatch: pytest.MonkeyPatch, steps: int, order: int, variant: str, karras: bool
) -> None:
    # diffusers' bh1 multiplies 0 by B(h) = -inf on the step to sigma 0 and returns NaN: ended above 0 here.
    final = "zero" if variant == "bh2" else "sigma_min"
    reference = diffusers.UniPCMultistepScheduler(
        **TRAINING, solver_order=order, solver_type=variant, use_karras_sigmas=karras, final_sigmas_type=final
    )
    reference.set_timesteps(steps)
    sigmas = reference.sigmas.double().numpy()
    expected = theirs(monkeypatch, reference, vp(START * sigmas[0], sigmas[0]), step_level)
    # measured up to 4.4e-7
    assert relative(ours(SAMPLERS["unipc"].using(order=order, variant=variant), sigmas), expected) < 1e-6


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    reference = diffusers.DDIMScheduler(**TRAINING, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    reference.set_timesteps(STEPS)
    sigmas = make_sigmas(STABLE_DIFFUSION, STEPS, "leading", "min")
    expected = theirs(monkeypatch, reference, vp(START * sigmas[0], sigmas[0]), timestep_level, eta=eta)
    # measured 1.1e-7, 7.7e-7, 1.7e-6: its variances are float32 differences of nearly equal numbers
    assert relative(ours(SAMPLERS["ddim"].using(eta=eta), sigmas), expected) < 4e-6


def test_pndm_equals_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = diffusers.PNDMScheduler(**TRAINING, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True)
    reference.set_timesteps(STEPS)
    sigmas = make_sigmas(STABLE_DIFFUSION, STEPS, "leading", "min")
    expected = theirs(monkeypatch, reference, vp(START * sigmas[0], sigmas[0]), timestep_level)
    assert relative(ours(SAMPLERS["pndm"], sigmas), expected) < 1e-6  # measured 2.4e-7


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_equals_diffusers(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    reference = diffusers.LCMScheduler(**TRAINING)
    reference.set_timesteps(steps)
    sigmas = make_sigmas(STABLE_DIFFUSION, steps, "lcm")
    expected = theirs(monkeypatch, reference, vp(START * sigmas[0], sigmas[0]), timestep_level)
    # measured 2.1e-6: our missing boundary scalings (1e-7 here) and their float32
    assert relative(ours(SAMPLERS["lcm"], sigmas), expected) < 5e-6


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_tcd_equals_diffusers(monkeypatch: pytest.MonkeyPatch, steps: int, gamma: float) -> None:
    reference = diffusers.TCDScheduler(**TRAINING)
    reference.set_timesteps(steps)
    sigmas = make_sigmas(STABLE_DIFFUSION, steps, "lcm", "min")
    expected = theirs(monkeypatch, reference, vp(START * sigmas[0], sigmas[0]), timestep_level, eta=gamma)
    assert relative(ours(SAMPLERS["tcd"].using(gamma=gamma), sigmas), expected) < 5e-6  # measured 2e-6


@pytest.mark.parametrize(
    ("name", "scheduler", "options", "step_options"),
    [
        ("euler_a", "EulerAncestralDiscreteScheduler", {}, {}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
        ("ddim", "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, {"eta": 1.0}),
    ],
)
def test_a_seed_draws_what_diffusers_draws(
    name: str, scheduler: str, options: dict[str, Any], step_options: dict[str, float]
) -> None:
    """From a seed alone: the starting noise, then one tensor a step, from one generator as their pipelines do it."""
    reference = getattr(diffusers, scheduler)(**TRAINING, **options)
    reference.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(21)
    x = torch.randn((1, 4, 16, 16), generator=generator) * reference.init_noise_sigma
    for t in reference.timesteps:
        scaled = reference.scale_model_input(x, t)
        sigma = float(timestep_level(reference, t) if name == "ddim" else step_level(reference, t))
        state = scaled.double().numpy() * math.sqrt(sigma**2 + 1)
        eps = torch.from_numpy((state - mixture(state, sigma)) / sigma).float()
        x = reference.step(eps, t, x, generator=generator, **step_options).prev_sample

    spacing = {"euler_a": "linspace", "dpmpp_2m_sde": "rounded", "ddim": "trailing"}[name]
    sigmas = make_sigmas(STABLE_DIFFUSION, STEPS, spacing)
    noise = randn(21, (1, 4, 16, 16))
    if name != "euler_a":  # theirs start at the latents' scale
        noise = noise * np.float32(math.sqrt(1 + sigmas[0] ** 2) / sigmas[0])
    steps = denoising_steps(
        lambda x, sigma, i: mixture(x, sigma),
        SAMPLERS[name].using(**step_options),
        sigmas,
        noise,
        step_noise=StepNoise(21),
    )
    # measured 1.4e-5, 2.5e-6, 2.6e-6: their float32 sigmas and the rounding of their normals
    assert relative(list(steps)[-1].x, x.numpy()) < 5e-5


# k-diffusion's formulas, in its own letters (t = -log sigma), in float64.


def k_levels(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def k_dpmpp_2s_a(x: np.ndarray, sigmas: np.ndarray, eta: float = 1.0) -> np.ndarray:
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        down, up = k_levels(sigma, sigma_next, eta)
        if down == 0:
            x = x + (x - mixture(x, sigma)) / sigma * (down - sigma)
        else:
            t, t_next = -math.log(sigma), -math.log(down)
            h = t_next - t
            s = t + h / 2
            x_2 = math.exp(-s) / math.exp(-t) * x - math.expm1(-h / 2) * mixture(x, sigma)
            x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(-h) * mixture(x_2, math.exp(-s))
        if sigma_next > 0:
            x = x + up * NOISES[i]
    return x


def k_dpmpp_sde(x: np.ndarray, sigmas: np.ndarray, eta: float = 1.0) -> np.ndarray:
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if sigma_next == 0:
            x = x + (x - mixture(x, sigma)) / sigma * (sigma_next - sigma)
            continue
        t, t_next = -math.log(sigma), -math.log(sigma_next)
        s = t + (t_next - t) / 2
        # A Brownian path over sigma: its increments over [sigma, sigma_s] and [sigma_s, sigma_next], then unit noises.
        first = NOISES[2 * i] * (sigma - math.exp(-s)) ** 0.5
        second = NOISES[2 * i + 1] * (math.exp(-s) - sigma_next) ** 0.5
        denoised = mixture(x, sigma)
        down, up = k_levels(sigma, math.exp(-s), eta)
        x_2 = down / math.exp(-t) * x - math.expm1(t + math.log(down)) * denoised
        x_2 = x_2 + up * first / (sigma - math.exp(-s)) ** 0.5
        denoised_2 = mixture(x_2, math.exp(-s))
        down, up = k_levels(sigma, sigma_next, eta)
        x = down / math.exp(-t) * x - math.expm1(t + math.log(down)) * denoised_2
        x = x + up * (first + second) / (sigma - sigma_next) ** 0.5
    return x


def k_dpmpp_3m_sde(x: np.ndarray, sigmas: np.ndarray, eta: float = 1.0) -> np.ndarray:
    older: list[tuple[np.ndarray, float]] = []  # (denoised, h of the step it began), newest first
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = mixture(x, sigma)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma) - math.log(sigma_next)
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if len(older) >= 2:
            (d_1, h_1), (d_2, h_2) = older[:2]
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - d_1) / r0, (d_1 - d_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif older:
            (d_1, h_1) = older[0]
            x = x + phi_2 * (denoised - d_1) / (h_1 / h)
        x = x + NOISES[i] * sigma_next * (-math.expm1(-2 * h * eta)) ** 0.5
        older.insert(0, (denoised, h))
    return x


@pytest.mark.parametrize("spacing", ["karras", "exponential", "linspace"])
@pytest.mark.parametrize(
    ("name", "reference"),
    [("dpmpp_2s_a", k_dpmpp_2s_a), ("dpmpp_sde", k_dpmpp_sde), ("dpmpp_3m_sde", k_dpmpp_3m_sde)],
)
def test_equals_k_diffusion(name: str, reference: Callable[..., np.ndarray], spacing: str) -> None:
    sigmas = make_sigmas(STABLE_DIFFUSION, STEPS, spacing)
    # measured 4e-15
    assert relative(ours(SAMPLERS[name], sigmas), reference(START * sigmas[0], sigmas)) < 1e-12


# The equation itself.


WIDTH = 0.7


def gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    return WIDTH**2 / (WIDTH**2 + sigma**2) * x


def exact(sigma: float) -> np.ndarray:
    """The probability flow of Gaussian data through one point."""
    return np.full((1, 1, 1, 1), math.sqrt(WIDTH**2 + sigma**2))


def flow_error(sampler: Sampler, steps: int, high: float = 5.0, low: float = 0.1, before: int = 4) -> float:
    """The error at `low` after `steps` from `high`, with a full history of exact calls to start from."""
    h = math.log(high / low) / steps
    sigmas = high * np.exp(-h * np.arange(-before, steps + 4))  # levels beyond both ends: no first or last step
    calls = tuple(Call(s, exact(s), gaussian(exact(s), s)) for s in sigmas[before - 1 :: -1])[: sampler.history]
    x = exact(sigmas[before])
    for i in range(before, before + steps):
        past = Past(calls)
        x, call = sampler.step(gaussian, x, sigmas, i, past, lambda k: np.zeros((1, 1, 1, 1)))
        calls = (call, *calls)[: sampler.history]
    return abs(float((x - exact(sigmas[before + steps])).squeeze()))


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("ddim", {}, 1),  # measured 1.00
        ("euler", {}, 1),  # 1.00
        ("euler_a", {"eta": 0}, 1),  # 1.00
        ("heun", {}, 2),  # 2.01
        ("dpm2", {}, 2),  # 2.01
        ("dpmpp_2s_a", {"eta": 0}, 2),  # 1.99
        ("dpmpp_sde", {"eta": 0}, 2),  # 1.99
        ("dpmpp_2m", {}, 2),  # 1.99
        ("dpmpp_2m_sde", {"eta": 0}, 2),  # 1.99
        ("dpmpp_2m_sde_heun", {"eta": 0}, 2),  # 2.00
        # Its quadratic term is half of what a third order needs, in k-diffusion as in the authors' code.
        ("dpmpp_3m_sde", {"eta": 0}, 2),  # 2.04
        ("pndm", {}, 2),  # 2.00: weights for even steps
        ("lms", {}, 4),  # 3.90
        ("unipc", {"order": 1}, 2),  # 2.00: the corrector adds one
        ("unipc", {"order": 2}, 3),  # 3.00
        ("unipc", {"order": 2, "variant": "bh1"}, 3),  # 3.02
        ("unipc", {"order": 3}, 4),  # 3.96
    ],
)
def test_order_of_convergence(name: str, options: dict[str, Any], order: int) -> None:
    sampler = SAMPLERS[name].using(**options)
    coarse, fine = flow_error(sampler, 80), flow_error(sampler, 160)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def final_variance(sampler: Sampler, steps: int) -> float:
    """The exact variance of the result for Gaussian data: every sampler is then linear in its noises.

    Row j of the batch sees 1 as its j-th noise (row 0: as its start) and 0 otherwise.
    """
    rows = 1 + steps * sampler.noises
    start = np.zeros((rows, 1, 1, 1))
    start[0] = math.sqrt(WIDTH**2 + 25.0) / 5.0
    sigmas = np.geomspace(5.0, 0.05, steps + 1)

    def unit(index: int, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.zeros(shape)
        noise[1 + index] = 1.0
        return noise

    last = list(denoising_steps(lambda x, s, i: gaussian(x, s), sampler, sigmas, start, step_noise=unit))[-1]
    return float((last.x**2).sum()) * (sigmas[-1] ** 2 + 1)  # the loop ends at the latents' scale


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler_a", 1),  # measured 0.97
        ("ddim", 1),  # 0.97
        ("dpm2_a", 2),  # 2.01
        ("dpmpp_2s_a", 2),  # 1.98
        ("dpmpp_sde", 2),  # 2.10, because its two noises share a path: 0.95 with independent ones
        ("dpmpp_2m_sde", 2),  # 2.00
        ("dpmpp_2m_sde_heun", 2),  # 2.01
        ("dpmpp_3m_sde", 2),  # 2.02
    ],
)
def test_stochastic_samplers_draw_the_right_variance(name: str, order: int) -> None:
    sampler = SAMPLERS[name].using(eta=1.0)
    truth = WIDTH**2 + 0.05**2
    coarse, fine = (abs(final_variance(sampler, steps) - truth) for steps in (80, 160))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_dpmpp_3m_sde_of_diffusers_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stochastic third-order step subtracts what it should add; ours, k-diffusion's, does not."""
    reference = diffusers.DPMSolverMultistepScheduler(
        **TRAINING, solver_order=3, solver_type="heun", algorithm_type="sde-dpmsolver++", lower_order_final=False
    )
    reference.set_timesteps(STEPS)
    sigmas = reference.sigmas.double().numpy()
    wrong = theirs(monkeypatch, reference, vp(START * sigmas[0], sigmas[0]), step_level)
    right = k_dpmpp_3m_sde(START * sigmas[0], sigmas)
    assert relative(wrong, right) > 0.1  # measured 0.56
    assert relative(ours(SAMPLERS["dpmpp_3m_sde"], sigmas), right) < 1e-12


def test_unknown_option_is_refused() -> None:
    with pytest.raises(RequestError, match=r'no option "gamma"; expected one of \[.eta.\]'):
        SAMPLERS["euler_a"].using(gamma=0.3)


@pytest.mark.parametrize(
    ("name", "options"), [("ddim", {"eta": -0.1}), ("euler_a", {"eta": math.nan}), ("tcd", {"gamma": 1.5})]
)
def test_noise_out_of_range_is_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=r"is (-0\.1|nan|1\.5); expected 0 \(no noise\) to 1"):
        SAMPLERS[name].using(**options)


def test_schedule_reaches_the_sampler_that_asks() -> None:
    assert SAMPLERS["tcd"].on(STABLE_DIFFUSION) != SAMPLERS["tcd"]
    assert SAMPLERS["euler"].on(STABLE_DIFFUSION) is SAMPLERS["euler"]
