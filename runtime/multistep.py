"""The samplers with a history: Adams-Bashforth in sigma, and exponential integrators in log sigma.

Each computes one formula for every number of earlier calls that may count; `Past.pick` puts the cells together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from glassine.runtime.history import Array, Call, Denoise, Noise, Past, Stepped, levels, line
from glassine.runtime.schedule import Sigmas

# Linear multistep in sigma.


def lms(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
    """Adams-Bashforth of order 4 over the uneven sigmas (Katherine Crowson, k-diffusion)."""
    sigma, sigma_next = levels(sigmas, i)
    call = Call(sigma, x, denoise(x, sigma))

    def carry(count: int) -> Array:
        used = (call, *past.calls[:count])
        x_next: Array = x.copy()
        for earlier, weight in zip(used, _adams_weights([c.sigma for c in used], sigma_next), strict=True):
            x_next += weight * earlier.d
        return x_next

    return past.pick(3, carry), call


def _adams_weights(at: list[float], sigma_next: float) -> list[float]:
    """Integrate the Lagrange polynomials through `at` from at[0] to sigma_next: two Gauss nodes are exact to cubics."""
    middle, half = (at[0] + sigma_next) / 2, (sigma_next - at[0]) / 2
    nodes = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [half * sum(math.prod((node - q) / (p - q) for q in at if q != p) for node in nodes) for p in at]


_ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
    """PLMS: Adams-Bashforth for even steps, after one step of Heun (Liu et al. 2022, arXiv 2202.09778, equation 12)."""
    sigma, sigma_next = levels(sigmas, i)
    call = Call(sigma, x, denoise(x, sigma))

    def carry(count: int) -> Array:
        if count == 0 and sigma_next > 0:
            x_next = line(x, call.denoised, sigma_next / sigma)
            there = Call(sigma_next, x_next, denoise(x_next, sigma_next))
            slope: Array = (call.d + there.d) / 2
        else:
            used = (call, *past.calls[:count])
            slope = np.asarray(sum(weight * c.d for weight, c in zip(_ADAMS[count], used, strict=True)))
        moved: Array = x + (sigma_next - sigma) * slope
        return moved

    return past.pick(3, carry), call


# Exponential integrators, which solve the linear part of the equation exactly.


def dpmpp_2m(denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise) -> Stepped:
    """DPM-Solver++(2M): Algorithm 2 (Lu et al. 2022, arXiv 2211.01095)."""
    sigma, sigma_next = levels(sigmas, i)
    denoised = denoise(x, sigma)

    def carry(count: int) -> Array:
        if count == 0:
            return line(x, denoised, sigma_next / sigma)
        before = past.calls[0]
        r = math.log(before.sigma / sigma) / math.log(sigma / sigma_next)
        return line(x, denoised + (0.5 / r) * (denoised - before.denoised), sigma_next / sigma)

    return past.pick(1 if sigma_next > 0 else 0, carry), Call(sigma, x, denoised)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    i: int,
    past: Past,
    noise: Noise,
    *,
    eta: float = 1.0,
    correction: Literal["midpoint", "heun"] = "midpoint",
) -> Stepped:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, appendix; k-diffusion's form)."""
    sigma, sigma_next = levels(sigmas, i)
    denoised = denoise(x, sigma)
    call = Call(sigma, x, denoised)
    if sigma_next == 0:
        return line(x, denoised, 0.0), call
    h = math.log(sigma / sigma_next)
    decay = math.exp(-(1 + eta) * h)

    def carry(count: int) -> Array:
        x_next = line(x, denoised, decay)
        if count:
            r = math.log(past.calls[0].sigma / sigma) / h
            weight = (1 - decay) / 2 if correction == "midpoint" else 1 - (1 - decay) / ((1 + eta) * h)
            x_next += (weight / r) * (denoised - past.calls[0].denoised)
        return x_next

    x_next = past.pick(1, carry)
    if eta > 0:
        x_next += sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise(0)
    return x_next, call


def dpmpp_3m_sde(
    denoise: Denoise, x: Array, sigmas: Sigmas, i: int, past: Past, noise: Noise, *, eta: float = 1.0
) -> Stepped:
    """`dpmpp_2m_sde` with one more call of history (Katherine Crowson, k-diffusion; arXiv 2211.01095, appendix B).

    The quadratic term stands as published, at half of what a third order needs: the error is of second order.
    """
    sigma, sigma_next = levels(sigmas, i)
    denoised = denoise(x, sigma)
    call = Call(sigma, x, denoised)
    if sigma_next == 0:
        return line(x, denoised, 0.0), call
    h = math.log(sigma / sigma_next)
    hh = (1 + eta) * h
    phi2 = math.expm1(-hh) / hh + 1
    phi3 = phi2 / hh - 0.5

    def carry(count: int) -> Array:
        x_next = line(x, denoised, math.exp(-hh))
        if count == 0:
            return x_next
        points = (call, *past.calls[:count])
        r = [math.log(old.sigma / new.sigma) / h for new, old in itertools.pairwise(points)]
        d = [
            (new.denoised - old.denoised) / ratio
            for (new, old), ratio in zip(itertools.pairwise(points), r, strict=True)
        ]
        if count == 1:
            x_next += phi2 * d[0]
        else:
            bend = (d[0] - d[1]) / (r[0] + r[1])
            x_next += phi2 * (d[0] + r[0] * bend) - phi3 * bend
        return x_next

    x_next = past.pick(2, carry)
    if eta > 0:
        x_next += sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise(0)
    return x_next, call


def unipc(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    i: int,
    past: Past,
    noise: Noise,
    *,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
) -> Stepped:
    """UniPC on x0: correct the state reached, then predict (Zhao et al. 2023, arXiv 2302.04867, Algorithms 5 and 6).

    The order falls to 1 over the last steps. The call it leaves to history holds the corrected state.
    """
    sigma, sigma_next = levels(sigmas, i)
    denoised = denoise(x, sigma)
    left = len(sigmas) - 1 - i

    def correct(count: int) -> Array:
        if count == 0:
            return x
        before, *older = past.calls[: min(order, left + 1, count)]
        return _unified(before, [*older, Call(sigma, x, denoised)], sigma, variant)

    call = Call(sigma, past.pick(order, correct), denoised)

    def predict(count: int) -> Array:
        return _unified(call, past.calls[:count], sigma_next, variant)

    return past.pick(min(order, left) - 1, predict), call


def _unified(start: Call, points: Sequence[Call], sigma_to: float, variant: str) -> Array:
    """Carry `start` to `sigma_to` with the x0 of `points`: past ones predict, one at `sigma_to` corrects."""
    x_next = line(start.x, start.denoised, sigma_to / start.sigma)
    if not points:
        return x_next
    hh = math.log(sigma_to / start.sigma)
    b_h = hh if variant == "bh1" else math.expm1(hh)
    r = [math.log(point.sigma / start.sigma) / hh for point in points]
    for point, weight in zip(points, _unified_weights(hh, b_h, r), strict=True):
        x_next -= b_h * weight * (point.denoised - start.denoised)
    return x_next


def _unified_weights(hh: float, b_h: float, r: list[float]) -> list[float]:
    """Return rho / r, where sum_j rho_j r_j^(k-1) = k! phi_(k+1)(hh) / B(h) for every k; a single rho is 1/2."""
    if len(r) == 1:
        return [0.5 / r[0]]
    targets, phi, factorial = [], math.expm1(hh) / hh - 1, 1
    for k in range(1, len(r) + 1):
        targets.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    # The Vandermonde system by Newton's differences (Bjorck and Pereyra 1970): exact for three points and no matrices.
    rho, last = targets, len(r) - 1
    for k in range(last):
        for i in range(last, k, -1):
            rho[i] -= r[k] * rho[i - 1]
    for k in reversed(range(last)):
        for i in range(k + 1, last + 1):
            rho[i] /= r[i] - r[i - k - 1]
        for i in range(k, last):
            rho[i] -= rho[i + 1]
    return [p / q for p, q in zip(rho, r, strict=True)]
