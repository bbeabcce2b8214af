"""The noise levels of a run: the training schedule, its sigmas and timesteps, and the spacings that pick S of them.

Everything here is in sigma space, x = x0 + sigma * eps, so sigma = sqrt((1 - ac) / ac) with ac = alphas_cumprod; the
network's timestep t is spoken only through `NoiseSchedule.t_of_sigma`. Sigmas are float64: a schedule is a few dozen
numbers, and every coefficient of every sampler is made of their ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError
from glassine.manifest import Scheduler

Sigmas = NDArray[np.float64]
Final = Literal["zero", "min"]

# diffusers keeps sigma finite (4096) where a zero-terminal-SNR schedule has no signal left.
ZERO_SNR_ALPHA = 2.0**-24


class NoiseSchedule:
    """The levels a network was trained on, and the map between sigma and the network's timestep.

    Attributes:
        alphas_cumprod: (T,) float64, falling from nearly 1.
        sigmas: (T,) float64, rising; `sigmas[t]` is the noise level of training timestep t.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.alphas_cumprod = _alphas_cumprod(scheduler)
        self.sigmas: Sigmas = np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
        self._log_sigmas = np.log(self.sigmas)
        self._timesteps = np.arange(len(self.sigmas), dtype=np.float64)

    @property
    def sigma_min(self) -> float:
        """The level of timestep 0."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The level of the last timestep."""
        return float(self.sigmas[-1])

    def sigma_of_t(self, t: NDArray[np.float64]) -> Sigmas:
        """Return the levels of timesteps in [0, T - 1]; between two of them, interpolate log sigma (k-diffusion)."""
        return np.asarray(np.exp(np.interp(t, self._timesteps, self._log_sigmas)), dtype=np.float64)

    def t_of_sigma(self, sigma: float) -> float:
        """Return the timestep of a level, fractional between two levels, the nearest end outside the table."""
        return float(np.interp(math.log(sigma), self._log_sigmas, self._timesteps))


def _alphas_cumprod(scheduler: Scheduler) -> NDArray[np.float64]:
    """Training betas (linear, or linear in sqrt(beta): LDM's "linear" is diffusers' "scaled_linear") -> cumprod."""
    start, end, count = scheduler.beta_start, scheduler.beta_end, scheduler.train_timesteps
    if scheduler.beta_schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    elif scheduler.beta_schedule == "linear":
        betas = np.linspace(start, end, count)
    else:
        raise RequestError(
            f'beta_schedule "{scheduler.beta_schedule}" is not known; expected "scaled_linear" or "linear"'
        )
    alphas_cumprod = np.cumprod(1.0 - betas)
    if scheduler.zero_terminal_snr:
        # Shift and scale sqrt(ac) so that the last is 0 and the first stays: arXiv 2305.08891, algorithm 1.
        root = np.sqrt(alphas_cumprod)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas_cumprod = root**2
        alphas_cumprod[-1] = ZERO_SNR_ALPHA
    return np.asarray(alphas_cumprod, dtype=np.float64)


STABLE_DIFFUSION = NoiseSchedule(Scheduler())  # 1.x, 2.x and SDXL, zero-SNR models apart


def make_sigmas(schedule: NoiseSchedule, steps: int, spacing: str = "linspace", final: Final = "zero") -> Sigmas:
    """Return the levels of a run: (steps + 1,) float64, falling; `steps` model evaluations and the level they end at.

    Args:
        schedule: the training levels.
        steps: N >= 1.
        spacing: a name in SPACINGS.
        final: "zero" ends on a clean picture; "min" ends at the level of timestep 0, as diffusers' DDIM and PNDM do
            with `set_alpha_to_one=False` (the stock configuration of Stable Diffusion 1.x).

    Raises:
        RequestError: unknown spacing, or a number of steps it cannot make.
    """
    if spacing not in SPACINGS:
        raise RequestError(f'spacing "{spacing}" is not known; expected one of {", ".join(SPACINGS)}')
    if steps < 1:
        raise RequestError(f"{steps} steps cannot be drawn; expected at least 1")
    levels = SPACINGS[spacing](schedule, steps)
    end = 0.0 if final == "zero" else schedule.sigma_min
    sigmas = np.append(levels, end)
    if len(sigmas) != steps + 1 or not np.all(np.diff(sigmas) < 0):
        raise RequestError(
            f'spacing "{spacing}" cannot make {steps} falling noise levels (final="{final}"); '
            "take fewer steps or another spacing"
        )
    return sigmas


def last_steps(sigmas: Sigmas, strength: float) -> Sigmas:
    """Keep the last int(strength * N) of N steps: what img2img draws (at least none: then only the final level).

    Args:
        sigmas: (N + 1,).
        strength: in [0, 1]; 1 keeps every step.

    Raises:
        RequestError: strength outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise RequestError(f"strength is {strength}; expected a number from 0 (keep) to 1 (redraw)")
    steps = len(sigmas) - 1
    kept = math.floor(strength * steps + 1e-9)  # 0.7 * 10 is 6.999...; nobody means 6 steps
    return sigmas[steps - kept :]


def handover(schedule: NoiseSchedule, sigmas: Sigmas, share: float) -> int:
    """Return the first step of a refiner: the first whose timestep lies in the lowest `1 - share` of the schedule.

    By noise level and not by the count of steps, because a refiner was trained on the low levels alone (SDXL's: on
    the lowest 200 of 1000). As diffusers' `denoising_end` and `denoising_start`.

    Args:
        sigmas: (N + 1,) of the run. share: in [0, 1].
    """
    count = len(schedule.sigmas)
    cutoff = count - round(share * count)
    # A level made of a whole timestep is that timestep but for rounding.
    return sum(schedule.t_of_sigma(float(sigma)) >= cutoff - 1e-6 for sigma in sigmas[:-1])


def _linspace(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """t from T - 1 to 0, both ends taken: A1111's "uniform", diffusers' linspace for the k-diffusion samplers."""
    return schedule.sigma_of_t(np.linspace(len(schedule.sigmas) - 1, 0, steps))


def _sgm_uniform(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Return steps + 1 timesteps from T - 1 to 0 without the last, fractional (Stability's generative-models)."""
    return schedule.sigma_of_t(np.linspace(len(schedule.sigmas) - 1, 0, steps + 1)[:-1])


def _rounded(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """`sgm_uniform` on whole timesteps: the "linspace" of diffusers' DPMSolver and UniPC, and of Apple's pipeline."""
    return schedule.sigma_of_t(np.linspace(len(schedule.sigmas) - 1, 0, steps + 1)[:-1].round())


def _leading(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Multiples of T // steps, plus 1: the stock configuration of Stable Diffusion 1.x and SDXL (steps_offset 1)."""
    count = len(schedule.sigmas)
    return schedule.sigma_of_t(np.arange(steps, dtype=np.float64)[::-1] * (count // steps) + 1)


def _trailing(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """T, T - T/steps ... minus 1: starts at the last timestep (Turbo, Lightning, zero SNR; arXiv 2305.08891)."""
    count = len(schedule.sigmas)
    return schedule.sigma_of_t(np.round(count - np.arange(steps) * (count / steps)) - 1)


def _lcm(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Evenly picked from the 50 timesteps that latent consistency models are distilled on (arXiv 2310.04378)."""
    stride = len(schedule.sigmas) // 50
    distilled = np.arange(50, 0, -1, dtype=np.float64) * stride - 1
    return schedule.sigma_of_t(distilled[np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)])


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> Sigmas:
    """Karras et al. 2022, equation 5 (arXiv 2206.00364)."""
    ramp = np.linspace(0, 1, steps)
    low, high = schedule.sigma_min ** (1 / rho), schedule.sigma_max ** (1 / rho)
    return np.asarray((high + ramp * (low - high)) ** rho, dtype=np.float64)


def _exponential(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Evenly in log sigma (k-diffusion; its polyexponential with rho 1)."""
    return np.exp(np.linspace(math.log(schedule.sigma_max), math.log(schedule.sigma_min), steps))


def _kl_optimal(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Evenly in atan sigma: least KL for Gaussian data (Sabour et al. 2024, arXiv 2404.14507)."""
    return np.tan(np.linspace(math.atan(schedule.sigma_max), math.atan(schedule.sigma_min), steps))


def _beta(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Quantiles of Beta(0.6, 0.6): more levels at both ends (Lee et al. 2024, arXiv 2407.12173)."""
    quantiles = _beta_quantiles(1 - np.linspace(0, 1, steps))
    return schedule.sigma_min + quantiles * (schedule.sigma_max - schedule.sigma_min)


def _beta_quantiles(p: NDArray[np.float64], a: float = 0.6) -> NDArray[np.float64]:
    """Invert the distribution function of Beta(a, a) by bisection of the lower half; the upper half mirrors it."""
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    tail = np.minimum(p, 1 - p)
    scale = math.gamma(2 * a) / (a * math.gamma(a) ** 2)
    for _ in range(60):
        x = (low + high) / 2
        # Hypergeometric series of the incomplete beta function; its terms fall faster than 2^-k for x <= 1/2.
        term, total = np.ones_like(x), np.ones_like(x)
        for k in range(60):
            term = term * x * (2 * a + k) / (a + 1 + k)
            total = total + term
        below = scale * (x * (1 - x)) ** a * total < tail
        low, high = np.where(below, x, low), np.where(below, high, x)
    return np.where(p < 0.5, low, 1 - low)


def _align_your_steps(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Levels optimised for Stable Diffusion 1.5, log-linearly stretched to N (Sabour et al. 2024, arXiv 2404.14507)."""
    return _stretch((14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029), steps)


def _align_your_steps_xl(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """`ays` for SDXL."""
    return _stretch((14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029), steps)


def _stretch(levels: tuple[float, ...], steps: int) -> Sigmas:
    at = np.linspace(0, 1, steps)
    return np.asarray(np.exp(np.interp(at, np.linspace(0, 1, len(levels)), np.log(levels))), dtype=np.float64)


SPACINGS: dict[str, Callable[[NoiseSchedule, int], Sigmas]] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "rounded": _rounded,
    "sgm_uniform": _sgm_uniform,
    "karras": _karras,
    "exponential": _exponential,
    "kl_optimal": _kl_optimal,
    "beta": _beta,
    "ays": _align_your_steps,
    "ays_xl": _align_your_steps_xl,
    "lcm": _lcm,
}
