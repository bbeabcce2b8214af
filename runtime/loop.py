"""The one denoising loop: text to image, image to image, inpainting and change maps are its inputs, never copies of it.

The change map enters as one integer a latent cell, n: how many of the S scheduled evaluations may touch the cell. With
r = S - n (the step at which a cell is released), before and after each evaluation i:

    state     where i <= r, x is the noised source z + sigma_i * e (one fixed e; a select, never a multiply-add)
    call      where i <  r, the predicted x0 is z, and so are the inner states of samplers that call the model twice
    history   a sampler uses the call of step j at a cell only if the cell was live then (j >= r)
    noise     of stochastic samplers depends on (seed, i) alone
    end       where n = 0, the result is z

So a cell behaves exactly as in an image-to-image run of n steps: nothing before its release leaves a trace. The loop
starts at the smallest r and makes no call at all if nothing may change. Source: Differential Diffusion (Levin and
Fried 2023, arXiv 2306.00950), with the release made exact for solvers that have a memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError
from glassine.runtime.history import Array, Call, Cells, Past
from glassine.runtime.samplers import Sampler
from glassine.runtime.schedule import Sigmas

StepNoise = Callable[[int, tuple[int, ...]], Array]


class Model(Protocol):
    """What is sampled: (x in sigma space, its sigma, the step's index) -> predicted x0, same shape and dtype."""

    def __call__(self, x: Array, sigma: float, i: int) -> Array:
        """Predict x0."""
        ...


class Step(NamedTuple):
    """What the loop yields after each step; the arrays are read-only.

    i: the step just made, of `steps`. sigma: the level its first evaluation was made at. x: the state after it, in
    sigma space at `sigmas[i + 1]`; after the last step, the result. denoised: the x0 predicted at `sigma`, with frozen
    cells showing the source: what a preview shows. evaluations: model calls so far.
    """

    i: int
    steps: int
    sigma: float
    x: Array
    denoised: Array
    evaluations: int


def denoising_steps(
    model: Model,
    sampler: Sampler,
    sigmas: Sigmas,
    noise: Array,
    *,
    source: Array | None = None,
    n: NDArray[np.integer[Any]] | None = None,
    step_noise: StepNoise | None = None,
) -> Generator[Step, None, Array]:
    """Draw: yield a `Step` after each step, return the final latents; closing the generator cancels.

    Args:
        model: the x0 prediction, conditioning and guidance included.
        sampler: from `samplers.SAMPLERS`.
        sigmas: (S + 1,) falling levels, ending at 0 (or just above it: then the result is brought to the scale of the
            latents, x / sqrt(sigma^2 + 1), as diffusers' DDIM leaves it).
        noise: e, (B, C, h, w), unit normal; its dtype is the state's.
        source: z, (B, C, h, w), the latents of the picture to change; None draws from noise alone.
        n: (B or 1, 1, h, w) integers in [0, S], evaluations that may touch each cell; None is S everywhere.
        step_noise: (index, shape) -> unit normal, a function of its arguments alone; needed by stochastic samplers. The
            index is `i * sampler.noises + k` for the k-th noise of step i.

    Raises:
        RequestError: an argument of the wrong shape or range, or `n` without a source.
    """
    canvas = _Canvas(noise, source, n, steps=len(sigmas) - 1)
    if canvas.first == canvas.steps:
        return canvas.source
    x = canvas.at(float(sigmas[canvas.first]))
    calls: tuple[Call, ...] = ()
    evaluations = 0
    for i in range(canvas.first, canvas.steps):
        turn = _Turn(i, x, model, canvas, step_noise, sampler.noises)
        x, call = sampler.step(turn.denoise, x, sigmas, i, canvas.past(i, calls), turn.noise)
        x = canvas.select(x, i + 1, float(sigmas[i + 1]))
        calls = (call, *calls)[: sampler.history]
        evaluations += turn.evaluations
        yield Step(i, canvas.steps, call.sigma, _read_only(x), _read_only(call.denoised), evaluations)
    return x


def _read_only(x: Array) -> Array:
    view: Array = x.view()
    view.flags.writeable = False  # a preview that writes would change the drawing
    return view


@dataclass(slots=True)
class _Turn:
    """One step's model and noise as the sampler sees them: frozen cells answer as the source."""

    i: int
    state: Array
    model: Model
    canvas: _Canvas
    step_noise: StepNoise | None
    noises: int
    evaluations: int = 0

    def denoise(self, x: Array, sigma: float) -> Array:
        self.evaluations += 1
        frozen = self.canvas.uncalled(self.i)
        if frozen is None:
            return self.model(x, sigma, self.i)
        if x is not self.state:  # an inner state; the state itself has its cells frozen already
            x = np.where(frozen, self.canvas.at(sigma), x)
        return np.where(frozen, self.canvas.source, self.model(x, sigma, self.i))

    def noise(self, k: int) -> Array:
        if self.step_noise is None:
            raise RequestError("this sampler adds noise at every step; pass step_noise")
        noise = self.step_noise(self.i * self.noises + k, self.state.shape)
        return noise.astype(self.state.dtype, copy=False)


class _Canvas:
    """Source, noise and release steps: which cells are frozen when, and to what."""

    def __init__(self, noise: Array, source: Array | None, n: NDArray[np.integer[Any]] | None, *, steps: int) -> None:
        if noise.ndim != 4:
            raise RequestError(f"noise has shape {noise.shape}; expected (B, C, h, w)")
        self.steps = steps
        self.noise = noise
        self.drawn_from_noise = source is None
        self.source = np.zeros_like(noise) if source is None else np.asarray(source, dtype=noise.dtype)
        if self.source.shape != noise.shape:
            raise RequestError(
                f"source latents have shape {self.source.shape}, the noise {noise.shape}; expected the same"
            )
        self.release = np.zeros((1, 1, 1, 1), dtype=np.int16) if n is None else self._release(n)
        # Steps at which some cell is released, in order: everything that changes with i is decided by them.
        self.releases: list[int] = np.unique(self.release).tolist()
        self.first, self.last = self.releases[0], self.releases[-1]

    def _release(self, n: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        batch, _, height, width = self.noise.shape
        if self.drawn_from_noise:
            raise RequestError("a change map needs a picture to change; pass source latents")
        if n.shape not in ((batch, 1, height, width), (1, 1, height, width)) or not np.issubdtype(n.dtype, np.integer):
            raise RequestError(
                f"the step table n is {n.dtype} {n.shape}; expected integers of shape ({batch}, 1, {height}, {width})"
            )
        if n.min() < 0 or n.max() > self.steps:
            raise RequestError(f"the step table n runs from {n.min()} to {n.max()}; expected 0 to {self.steps}")
        return self.steps - n.astype(np.int16)  # small, because it is compared at every step

    def at(self, sigma: float) -> Array:
        """The source noised to `sigma`."""
        noised: Array = self.source + sigma * self.noise
        return noised

    def uncalled(self, i: int) -> Cells | None:
        """Cells that the call of step i must not touch (i < r); None if there are none."""
        return None if i >= self.last else self.release > i

    def select(self, x: Array, i: int, sigma: float) -> Array:
        """Freeze the state of step i (i <= r); at the end, put the untouched source back."""
        if i == self.steps:
            x = x / float(np.sqrt(sigma**2 + 1)) if sigma > 0 else x
            return x if self.last < i else np.where(self.release == i, self.source, x)
        return x if i > self.last else np.where(self.release >= i, self.at(sigma), x)

    def past(self, i: int, calls: tuple[Call, ...]) -> Past:
        """The calls made so far and the cells at which they count: those of step j where j >= r."""
        oldest = i - len(calls)  # they were made step by step, without a gap
        late = self.releases[bisect_right(self.releases, oldest) : bisect_right(self.releases, i)]
        return Past(calls, tuple((i - r, self.release == r) for r in late))
