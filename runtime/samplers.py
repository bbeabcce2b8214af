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
import inspect
import math
from dataclasses import dataclass
from typing import Any, Protocol

from glassine.errors import RequestError
from glassine.runtime.history import Array, Call, Denoise, Noise, Past, Stepped, ancestral, levels, line
from glassine.runtime.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms, pndm, unipc
from glassine.runtime.schedule import STABLE_DIFFUSION, NoiseSchedule, Sigmas


class StepFunction(Protocol):
    """The signature of every sampler."""

    def __call__(self, denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
        """Carry x from sigmas[i] to sigmas[i + 1]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A step and what the loop and the user need to know about it.

    Attributes:
        step: the pure function.
        spacing: the noise levels it is usually run on, a name in `schedule.SPACINGS`.
        evaluations: model calls a step; a step to sigma 0 takes one. PNDM takes a second one where cells are released.
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
            RequestError: the step has no such option, or it is out of range.
        """
        known = self.options
        for name, value in options.items():
            if name not in known:
                raise RequestError(f'this sampler has no option "{name}"; expected one of {sorted(known)}')
            if name in ("eta", "gamma") and not 0 <= value <= 1:
                raise RequestError(f"{name} is {value}; expected 0 (no noise) to 1")
        return dataclasses.replace(self, step=functools.partial(self.step, **options))

    def on(self, schedule: NoiseSchedule) -> Sampler:
        """Return this sampler for a model trained on `schedule` (of ours, only TCD asks)."""
        return self.using(schedule=schedule) if "schedule" in self.options else self

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword options of the step."""
        parameters = inspect.signature(self.step).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


# One evaluation, no history.


def euler(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
    """Euler: Algorithm 2 without its correction (Karras et al. 2022, arXiv 2206.00364)."""
    sigma, sigma_next = levels(sigmas, i)
    denoised = denoise(x, sigma)
    return line(x, denoised, sigma_next / sigma), Call(sigma, x, denoised)


def euler_a(
    denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 1.0
) -> Stepped:
    """Ancestral Euler: at eta 1, DDPM's posterior in sigma space, equation 7 (Ho et al. 2020, arXiv 2006.11239)."""
    sigma, sigma_next = levels(sigmas, i)
    down, up = ancestral(sigma, sigma_next, eta)
    denoised = denoise(x, sigma)
    x_next = line(x, denoised, down / sigma)
    if up > 0:
        x_next += up * noise(0)
    return x_next, Call(sigma, x, denoised)


def ddim(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 0.0) -> Stepped:
    """DDIM, equation 12 (Song et al. 2020, arXiv 2010.02502): in sigma space, ancestral Euler with eta 0."""
    return euler_a(denoise, x, sigmas, i, past, noise, eta=eta)


def lcm(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
    """Latent consistency: predict x0, noise it again, Algorithm 3 (Luo et al. 2023, arXiv 2310.04378).

    The paper's boundary scalings (c_skip < 3e-5 from timestep 10 on) are left out, as k-diffusion's users do.
    """
    sigma, sigma_next = levels(sigmas, i)
    denoised = denoise(x, sigma)
    x_next = denoised + sigma_next * noise(0) if sigma_next > 0 else denoised.copy()
    return x_next, Call(sigma, x, denoised)


def tcd(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    i: int,
    past: Past,
    noise: Noise,
    *,
    schedule: NoiseSchedule = STABLE_DIFFUSION,
    gamma: float = 0.3,
) -> Stepped:
    """Trajectory consistency: Algorithm 4, strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159).

    From timestep t to s = floor((1 - gamma) t_next) without noise, then up to t_next with it.
    """
    sigma, sigma_next = levels(sigmas, i)
    denoised = denoise(x, sigma)
    call = Call(sigma, x, denoised)
    if sigma_next == 0:
        return denoised.copy(), call
    t_next = round(schedule.t_of_sigma(sigma_next), 6)  # a whole timestep must not fall to the one below
    down = float(schedule.sigmas[math.floor((1 - gamma) * t_next)])
    x_next = line(x, denoised, down / sigma)
    if down < sigma_next:
        x_next += math.sqrt(sigma_next**2 - down**2) * noise(0)
    return x_next, call


# Two evaluations a step, no history.


def heun(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
    """Heun's second order: Algorithm 2 without churn (Karras et al. 2022, arXiv 2206.00364)."""
    sigma, sigma_next = levels(sigmas, i)
    call = Call(sigma, x, denoise(x, sigma))
    x_next = line(x, call.denoised, sigma_next / sigma)
    if sigma_next > 0:
        there = Call(sigma_next, x_next, denoise(x_next, sigma_next))
        x_next = x + (sigma_next - sigma) / 2 * (call.d + there.d)
    return x_next, call


def dpm2(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
    """Midpoint in log sigma: DPM-Solver-2, Algorithm 4 (Lu et al. 2022, arXiv 2206.00927), in k-diffusion's form."""
    return dpm2_a(denoise, x, sigmas, i, past, noise, eta=0.0)


def dpm2_a(
    denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 1.0
) -> Stepped:
    """`dpm2` down to sigma_down, then noise up to the next level (k-diffusion)."""
    sigma, sigma_next = levels(sigmas, i)
    down, up = ancestral(sigma, sigma_next, eta)
    call = Call(sigma, x, denoise(x, sigma))
    if down == 0:
        return line(x, call.denoised, 0.0), call
    middle = math.sqrt(sigma * down)
    x_middle = line(x, call.denoised, middle / sigma)
    x_next = x + (down - sigma) * Call(middle, x_middle, denoise(x_middle, middle)).d
    if up > 0:
        x_next += up * noise(0)
    return x_next, call


def dpmpp_2s_a(
    denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 1.0
) -> Stepped:
    """DPM-Solver++(2S), Algorithm 1 (Lu et al. 2022, arXiv 2211.01095), with ancestral noise (k-diffusion)."""
    sigma, sigma_next = levels(sigmas, i)
    down, up = ancestral(sigma, sigma_next, eta)
    call = Call(sigma, x, denoise(x, sigma))
    if down == 0:
        return line(x, call.denoised, 0.0), call
    middle = math.sqrt(sigma * down)
    x_middle = line(x, call.denoised, middle / sigma)
    x_next = line(x, denoise(x_middle, middle), down / sigma)
    if up > 0:
        x_next += up * noise(0)
    return x_next, call


def dpmpp_sde(
    denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 1.0
) -> Stepped:
    """SDE-DPM-Solver++ in two stages (Lu et al. 2022, arXiv 2211.01095; k-diffusion's form, midpoint r = 1/2).

    Both noises are increments of one Brownian path over sigma, as in k-diffusion: the second contains the first.
    """
    sigma, sigma_next = levels(sigmas, i)
    call = Call(sigma, x, denoise(x, sigma))
    if sigma_next == 0:
        return line(x, call.denoised, 0.0), call
    middle = math.sqrt(sigma * sigma_next)
    down, up = ancestral(sigma, middle, eta)
    x_middle = line(x, call.denoised, down / sigma)
    first = noise(0) if eta > 0 else None
    if first is not None:
        x_middle += up * first
    down, up = ancestral(sigma, sigma_next, eta)
    x_next = line(x, denoise(x_middle, middle), down / sigma)
    if first is not None:
        shared = (sigma - middle) / (sigma - sigma_next)  # of the path over the step, the part before its middle
        x_next += up * (math.sqrt(shared) * first + math.sqrt(1 - shared) * noise(1))
    return x_next, call


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(step=ddim, spacing="leading", noises=1),
    "dpm2": Sampler(step=dpm2, spacing="karras", evaluations=2),
    "dpm2_a": Sampler(step=dpm2_a, spacing="karras", evaluations=2, noises=1),
    "dpmpp_2m": Sampler(step=dpmpp_2m, spacing="karras", history=1),
    "dpmpp_2m_sde": Sampler(step=dpmpp_2m_sde, spacing="exponential", history=1, noises=1),
    "dpmpp_2m_sde_heun": Sampler(
        step=functools.partial(dpmpp_2m_sde, correction="heun"), spacing="exponential", history=1, noises=1
    ),
    "dpmpp_2s_a": Sampler(step=dpmpp_2s_a, spacing="karras", evaluations=2, noises=1),
    "dpmpp_3m_sde": Sampler(step=dpmpp_3m_sde, spacing="exponential", history=2, noises=1),
    "dpmpp_sde": Sampler(step=dpmpp_sde, spacing="karras", evaluations=2, noises=2),
    "euler": Sampler(step=euler),
    "euler_a": Sampler(step=euler_a, noises=1),
    "heun": Sampler(step=heun, evaluations=2),
    "lcm": Sampler(step=lcm, spacing="lcm", noises=1),
    "lms": Sampler(step=lms, history=3),
    "pndm": Sampler(step=pndm, spacing="leading", history=3),
    "tcd": Sampler(step=tcd, spacing="lcm", noises=1),
    "unipc": Sampler(step=unipc, spacing="rounded", history=3),
}
