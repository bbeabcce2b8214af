"""The samplers: how one model evaluation (or two) carries the state from one noise level to the next.

    x_next, call = step(denoise, x, sigmas, i, past, noise)

A step is a pure function. `x` is in sigma space (x = x0 + sigma * eps), `denoise(x, sigma)` is the model's x0
prediction D, `past` holds the earlier calls and says at which cells they count, `noise(k)` is the k-th unit normal of
this step. It returns the next state and the call it made at `sigmas[i]`, which is the next step's history.

Letters are those of Karras et al. (arXiv 2206.00364) and of k-diffusion: d = (x - D) / sigma, and for the exponential
integrators h = log(sigma / sigma_next). Euler steps are written D + sigma_next / sigma * (x - D): at sigma_next = 0
this is D itself, to the last bit. Coefficients are Python floats, so the state keeps its dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError
from glassine.runtime.schedule import Sigmas

Array = NDArray[np.floating[Any]]
Cells = NDArray[np.bool_]
Denoise = Callable[[Array, float], Array]
Noise = Callable[[int], Array]


class Call(NamedTuple):
    """One model evaluation: the state (B, C, h, w) at `sigma` and the x0 predicted from it."""

    sigma: float
    x: Array
    denoised: Array

    @property
    def d(self) -> Array:
        """The slope dx/dsigma of the probability flow, which is also the predicted noise."""
        return (self.x - self.denoised) / self.sigma


class Past(NamedTuple):
    """The calls of earlier steps, newest first, and how many of them count at each cell.

    A call counts at a cell only if the cell was being drawn then: a frozen cell's x0 prediction is not the model's.
    live: (number of calls that count, cells (B, 1, h, w)), falling; the first entry's None means every cell not named
    by a later entry.
    """

    calls: tuple[Call, ...] = ()
    live: tuple[tuple[int, Cells | None], ...] = ((0, None),)

    def pick(self, most: int, formula: Callable[[int], Array]) -> Array:
        """Return `formula(k)` for k = the calls that count, at most `most`, cell by cell. It must make a new array."""
        x = formula(min(self.live[0][0], most))
        for count, cells in self.live[1:]:
            if count < most:
                np.copyto(x, formula(count), where=cells)
        return x


class StepFunction(Protocol):
    """The signature of every sampler."""

    def __call__(
        self, denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise
    ) -> tuple[Array, Call]:
        """Carry x from sigmas[i] to sigmas[i + 1]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A step and what the loop and the user need to know about it.

    Attributes:
        step: the pure function.
        spacing: the noise levels it is usually run on, a name in `schedule.SPACINGS`.
        evaluations: model calls a step (the last step, to sigma 0, takes one).
        history: earlier calls it can use.
        noises: unit normals a step may ask for; 0 is a deterministic sampler.
    """

    step: StepFunction
    spacing: str = "linspace"
    evaluations: int = 1
    history: int = 0
    noises: int = 0

    def using(self, **options: Any) -> Sampler:
        """Return this sampler with keyword options of its step bound, such as `using(eta=0.5)`.

        Raises:
            RequestError: the step has no such option.
        """
        known = self.options
        for name in options:
            if name not in known:
                raise RequestError(f'this sampler has no option "{name}"; expected one of {sorted(known)}')
        return dataclasses.replace(self, step=functools.partial(self.step, **options))

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword options of the step."""
        step = self.step.func if isinstance(self.step, functools.partial) else self.step
        return tuple(getattr(step, "__kwdefaults__", None) or ())


def _levels(sigmas: Sigmas, i: int) -> tuple[float, float]:
    return float(sigmas[i]), float(sigmas[i + 1])


def _ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step into a deterministic part down to sigma_down and fresh noise of size sigma_up (k-diffusion)."""
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


# One evaluation, no history.


def euler(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> tuple[Array, Call]:
    """Euler, Algorithm 2 without the correction (Karras et al. 2022, arXiv 2206.00364)."""
    sigma, sigma_next = _levels(sigmas, i)
    denoised = denoise(x, sigma)
    return denoised + (sigma_next / sigma) * (x - denoised), Call(sigma, x, denoised)


def euler_a(
    denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 1.0
) -> tuple[Array, Call]:
    """Ancestral Euler: DDPM's posterior at eta 1 (Ho et al. 2020, arXiv 2006.11239, equation 7), in sigma space."""
    sigma, sigma_next = _levels(sigmas, i)
    down, up = _ancestral(sigma, sigma_next, eta)
    denoised = denoise(x, sigma)
    x_next = denoised + (down / sigma) * (x - denoised)
    if up > 0:
        x_next += up * noise(0)
    return x_next, Call(sigma, x, denoised)


def ddim(
    denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 0.0
) -> tuple[Array, Call]:
    """DDIM, equation 12 (Song et al. 2020, arXiv 2010.02502): in sigma space, ancestral Euler with eta 0."""
    return euler_a(denoise, x, sigmas, i, past, noise, eta=eta)


# Exponential integrators with history.


def dpmpp_2m(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> tuple[Array, Call]:
    """DPM-Solver++(2M), Algorithm 2 (Lu et al. 2022, arXiv 2211.01095)."""
    sigma, sigma_next = _levels(sigmas, i)
    denoised = denoise(x, sigma)
    ratio = sigma_next / sigma  # e^-h

    def carry(count: int) -> Array:
        target = denoised
        if count:
            before = past.calls[0]
            r = math.log(before.sigma / sigma) / -math.log(ratio)
            target = denoised + (0.5 / r) * (denoised - before.denoised)
        return target + ratio * (x - target)

    return past.pick(1 if sigma_next > 0 else 0, carry), Call(sigma, x, denoised)


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(step=ddim, spacing="leading", noises=1),
    "euler": Sampler(step=euler),
    "euler_a": Sampler(step=euler_a, noises=1),
    "dpmpp_2m": Sampler(step=dpmpp_2m, spacing="karras", history=1),
}
