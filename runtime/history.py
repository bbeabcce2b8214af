"""What the samplers speak in, and what they remember: calls made at earlier steps, and at which cells they count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    """The calls of earlier steps, newest first, and where fewer of them count.

    A call counts at a cell only if the cell was being drawn then: a frozen cell's x0 prediction is not the model's.
    late: (how many of the newest calls count, cells (B, 1, h, w)) for cells released after the oldest of the calls;
    everywhere else all of them do.
    """

    calls: tuple[Call, ...] = ()
    late: tuple[tuple[int, Cells], ...] = ()

    def pick(self, most: int, formula: Callable[[int], Array]) -> Array:
        """Return `formula(k)`, k = the calls that count, at most `most`, cell by cell."""
        x = formula(min(len(self.calls), most))
        for count, cells in self.late:
            if count < most:
                x = np.where(cells, formula(count), x)
        return x


Stepped = tuple[Array, Call]


def levels(sigmas: Sigmas, i: int) -> tuple[float, float]:
    """The level of step i and the next one."""
    return float(sigmas[i]), float(sigmas[i + 1])


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step into a deterministic part down to sigma_down and fresh noise of size sigma_up (k-diffusion)."""
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def line(x: Array, denoised: Array, ratio: float) -> Array:
    """The straight line from x through D: exact for a constant D, and D itself at ratio 0."""
    x_next: Array = denoised + ratio * (x - denoised)
    return x_next
