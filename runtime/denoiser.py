"""From a network to an x0 prediction: scaling, timestep, guidance, and the package's fixed number of rows.

    denoise(x, sigma, i) -> D      x, D (B, C, h, w) in sigma space

The network is any `predict(sample=..., timestep=..., encoder_hidden_states=..., **extra) -> {"noise_pred": ...}`: the
UNet package of an engine, or a function in a test. It speaks the language it was trained in, x / sqrt(sigma^2 + 1) and
t; this is the only place where both languages meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, RequestError
from glassine.runtime.history import Array
from glassine.runtime.loop import Model
from glassine.runtime.schedule import NoiseSchedule

Prediction = Literal["epsilon", "v_prediction", "sample"]
Branch = Literal["uncond", "image", "cond"]
Inputs = Mapping[str, NDArray[np.generic]]


class Predict(Protocol):
    """A network: arrays by input name -> arrays by output name; it may reuse its outputs at the next call."""

    def __call__(self, **arrays: NDArray[np.generic]) -> Mapping[str, NDArray[np.generic]]:
        """Run the network once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What one branch of guidance is conditioned on; every array has one row a picture, or one row for all.

    context: (B or 1, D, 1, T) float32, the text encoder's output in Apple's layout.
    extra: further inputs of the network by name, such as SDXL's `time_ids` and `text_embeds`.
    channels: (B or 1, k, h, w) float32, given to the network behind the channels of x as they are, such as an
        inpainting model's mask and masked picture; None = there are none.
    """

    context: NDArray[np.float32]
    extra: Inputs = field(default_factory=dict)
    channels: NDArray[np.float32] | None = None

    def row(self, picture: int) -> dict[str, NDArray[np.generic]]:
        """The inputs of one picture, without the row axis."""
        arrays: dict[str, NDArray[np.generic]] = {"encoder_hidden_states": self.context, **self.extra}
        return {name: array[picture if len(array) > 1 else 0] for name, array in arrays.items()}


class Row(NamedTuple):
    """What one row of a network call belongs to."""

    picture: int
    branch: Branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): uncond + scale * (cond - uncond).

    With `image`, guidance has two scales (InstructPix2Pix, Brooks et al. 2022, arXiv 2211.09800, equation 3):
    uncond + image_scale * (image - uncond) + scale * (cond - image).

    cond, uncond: the prompt and the negative prompt; uncond may be None at scale 1.
    image: the picture with the negative prompt, where `uncond` has no picture either; None = one scale.
    scale: 1 draws with the prompt alone, and the network is then not called for the negative prompt at all.
    rescale: in [0, 1], how far the guided output is brought back to the spread of the unguided one, picture by picture
        (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    """

    cond: Conditioning
    uncond: Conditioning | None = None
    image: Conditioning | None = None
    scale: float = 7.5
    image_scale: float = 1.5
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.rescale <= 1.0:
            raise RequestError(f"guidance rescale is {self.rescale}; expected a number from 0 (off) to 1")
        for name, scale in (("guidance scale", self.scale), ("image guidance scale", self.image_scale)):
            if not np.isfinite(scale):
                raise RequestError(f"{name} is {scale}; expected a finite number, usually 1 to 15")
        if self.image is not None and self.uncond is None:
            raise RequestError("guidance by a picture needs the branch without it too (uncond)")
        if self.scale != 1 and self.uncond is None:
            raise RequestError(f"guidance scale {self.scale} needs the conditioning of a negative prompt (uncond)")

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What the network is called for, in Apple's order."""
        if self.image is not None:
            return ("uncond", "image", "cond")
        return ("cond",) if self.scale == 1 else ("uncond", "cond")

    def conditioning(self, branch: Branch) -> Conditioning:
        """What a branch is conditioned on."""
        given = {"uncond": self.uncond, "image": self.image}.get(branch)
        return self.cond if given is None else given

    def row(self, row: Row) -> dict[str, NDArray[np.generic]]:
        """The conditioning of one row of a network call."""
        return self.conditioning(row.branch).row(row.picture)

    def combine(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, branches, C, h, w) -> guided output (B, C, h, w)."""
        cond = outputs[:, -1]
        if outputs.shape[1] == 1:
            return cond
        uncond, image = outputs[:, 0], outputs[:, 1]
        if self.image is None:
            guided = uncond + self.scale * (cond - uncond)
        else:
            guided = uncond + self.image_scale * (image - uncond) + self.scale * (cond - image)
        if self.rescale > 0:
            axes = (1, 2, 3)
            factor = cond.std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
            guided *= self.rescale * factor + (1 - self.rescale)
        return guided


class NetworkCall(NamedTuple):
    """One call about to be made: what a control network sees. `inputs` are the arrays the UNet will get."""

    i: int
    sigma: float
    rows: tuple[Row, ...]
    inputs: Inputs


Control = Callable[[NetworkCall], Inputs]


class Denoiser:
    """A network as the loop's model.

    Args:
        predict: the network.
        schedule: the levels it was trained on.
        guidance: the conditioning of both branches and how they are combined.
        rows: rows of every network call (the package's batch). Pictures and branches fill as many calls as they need;
            the last call is filled up by repeating its last row.
        prediction: what the network's output means.
        control: called before every network call; returns further inputs, such as ControlNet residuals by name, which
            it may write again at the next call.
        whole_timesteps: round t to a whole number, as diffusers' DPMSolver and UniPC do on Karras levels.
        frames: pictures that the network draws together, such as the layers of one picture: they share every call, in
            rows of (branch, frame).

    Raises:
        EngineError: the frames do not fill whole calls of `rows` rows.
    """

    def __init__(
        self,
        predict: Predict,
        schedule: NoiseSchedule,
        guidance: Guidance,
        *,
        rows: int,
        prediction: Prediction = "epsilon",
        control: Control | None = None,
        whole_timesteps: bool = False,
        frames: int = 1,
    ) -> None:
        if rows % frames:
            raise EngineError(
                f"a network of {rows} rows a call cannot draw {frames} pictures together; convert it again"
            )
        self._predict = predict
        self._schedule = schedule
        self._guidance = guidance
        self._rows = rows
        self._prediction = prediction
        self._control = control
        self._whole_timesteps = whole_timesteps
        self._frames = frames
        self._plan: list[_Rows] = []

    def __call__(self, x: Array, sigma: float, i: int = 0) -> Array:
        """Return the predicted x0 (B, C, h, w), a new array of x's dtype.

        Raises:
            EngineError: the network's output has another shape, or is not finite.
        """
        if not self._plan or self._outputs.shape[0] != len(x) or self._outputs.shape[2:] != x.shape[1:]:
            self._allocate(x.shape)
        t = self._schedule.t_of_sigma(sigma)
        scale = (sigma**2 + 1) ** -0.5
        for rows in self._plan:
            rows.fill(x, scale, round(t) if self._whole_timesteps else t)
            call = NetworkCall(i, sigma, rows.rows, rows.inputs)
            further = {} if self._control is None else self._control(call)
            self._collect(self._predict(**rows.inputs, **further)["noise_pred"], call, t)
        return _denoised(self._prediction, x, self._guidance.combine(self._outputs), sigma)

    def _allocate(self, shape: tuple[int, ...]) -> None:
        """Lay pictures and branches out in calls of `rows` rows, with buffers that live as long as the shape does."""
        branches, frames = self._guidance.branches, self._frames
        if shape[0] % frames:
            raise RequestError(f"{shape[0]} pictures, of which {frames} are drawn together; expected a multiple")
        samples = (range(first, first + frames) for first in range(0, shape[0], frames))
        jobs = [Row(picture, branch) for sample in samples for branch in branches for picture in sample]
        self._outputs = np.empty((shape[0], len(branches), *shape[1:]), dtype=np.float32)
        self._plan = []
        for at in range(0, len(jobs), self._rows):
            self._plan.append(_Rows(tuple(jobs[at : at + self._rows]), self._rows, shape[1:], self._guidance))

    def _collect(self, output: NDArray[np.generic], call: NetworkCall, t: float) -> None:
        expected = (self._rows, *self._outputs.shape[2:])
        if output.shape != expected:
            raise EngineError(f'the network\'s output "noise_pred" has shape {output.shape}, expected {expected}')
        branches = self._guidance.branches
        for index, (picture, branch) in enumerate(call.rows):
            self._outputs[picture, branches.index(branch)] = output[index]
        used = output[: len(call.rows)]
        if not np.isfinite(used).all():
            bad = int((~np.isfinite(used)).sum())
            raise EngineError(
                f"step {call.i + 1} (sigma {call.sigma:.4g}, timestep {t:.4g}): {bad} of {used.size} numbers that "
                "the network returned are NaN or infinite, most likely a half-precision overflow; run the UNet on "
                "other compute units or in fp32, or check its weights with 'glassine verify'"
            )


class Relay:
    """Two models one after the other in one run: the steps from `start` on are the second's."""

    def __init__(self, first: Model, second: Model, start: int) -> None:
        self._first, self._second, self._start = first, second, start

    def __call__(self, x: Array, sigma: float, i: int) -> Array:
        """Return the predicted x0 of the model whose step this is; a step's inner calls are its own model's."""
        return (self._first if i < self._start else self._second)(x, sigma, i)


class _Rows:
    """One network call of a fixed number of rows: which pictures and branches it serves, and its input buffers."""

    def __init__(self, rows: tuple[Row, ...], count: int, shape: tuple[int, ...], guidance: Guidance) -> None:
        self.rows = rows
        padded = rows + rows[-1:] * (count - len(rows))
        self._pictures = [row.picture for row in padded]
        # x comes and goes at every step; what stands behind its channels is written once.
        further = [_channels(guidance.conditioning(row.branch), row.picture, shape) for row in padded]
        sample = np.empty((count, shape[0] + len(further[0]), *shape[1:]), dtype=np.float32)
        sample[:, shape[0] :] = further
        self._sample = sample[:, : shape[0]]
        self._timestep = np.empty(count, dtype=np.float32)
        parts = [guidance.row(row) for row in padded]
        self.inputs: dict[str, NDArray[np.generic]] = {
            "sample": sample,
            "timestep": self._timestep,
            **{name: np.stack([part[name] for part in parts]) for name in parts[0]},
        }

    def fill(self, x: Array, scale: float, t: float) -> None:
        """Write x / sqrt(sigma^2 + 1) into the rows, once a picture."""
        self._timestep[:] = t
        for index, picture in enumerate(self._pictures):
            if index and picture == self._pictures[index - 1]:
                self._sample[index] = self._sample[index - 1]
            else:
                np.multiply(x[picture], scale, out=self._sample[index], casting="same_kind")


def _channels(conditioning: Conditioning, picture: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The (k, h, w) channels behind x of one row; k is 0 where there are none."""
    given = conditioning.channels
    if given is None:
        return np.empty((0, *shape[1:]), np.float32)
    channels: NDArray[np.float32] = given[picture if len(given) > 1 else 0]
    return channels


def _denoised(prediction: Prediction, x: Array, output: NDArray[np.float32], sigma: float) -> Array:
    """x0 from what the network predicts: noise, velocity (Salimans and Ho 2022, arXiv 2202.00512) or x0 itself."""
    predicted: Array = output.astype(x.dtype, copy=False)
    denoised: Array
    if prediction == "epsilon":
        denoised = x - sigma * predicted
    elif prediction == "v_prediction":
        denoised = x * (1 / (sigma**2 + 1)) - (sigma * (sigma**2 + 1) ** -0.5) * predicted
    else:
        denoised = predicted.copy()  # the buffer of the next call
    return denoised
