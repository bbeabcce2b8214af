"""Control: what the user says about one network that steers, and the rules that turn it into numbers.

    Control (net, picture, weight, interval, mode, map) -> ReadyControl (arrays) -> control_nets.py

A control network reads a picture, the hint, beside the noisy latents; what it returns, the residuals, are added inside
the UNet. Everything here is a rule about how much of which residual is added where and when; the nets themselves are
called in `control_nets.py`. Sources: ControlNet (Zhang et al. 2023, arXiv 2302.05543); the modes are those of
sd-webui-controlnet, their soft weights those of ControlNet's own "guess mode".
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.image import Source

Float = NDArray[np.float32]
Mode = Literal["balanced", "prompt", "control", "guess"]
Interval = Literal["diffusers", "a1111"]
Fit = Literal["crop", "fit", "stretch"]
MODES: tuple[Mode, ...] = get_args(Mode)
INTERVALS: tuple[Interval, ...] = get_args(Interval)
FITS: tuple[Fit, ...] = get_args(Fit)

SOFT_BASE, SOFT_TOP = 0.825, 12  # residual j counts 0.825 ** (12 - j): 0.0994 at the top, 1 for SD 1.x's middle block
ADAPTER_SOFT = (0.25, 0.62, 0.825, 1.0)  # of a T2I-Adapter's four features
HEAVIEST = 2.0


@dataclass(frozen=True, slots=True)
class Control:
    """One network that steers a picture, and how. All but the pictures themselves is stored in the PNG.

    net: its name in the model's folder, or the path of a converted .mlpackage.
    image: the hint; None is the source picture of the run. preprocess: what makes the hint out of it, such as "canny";
        None if `image` is a hint already.
    weight: 0 (not called at all) to 2; a tuple has one weight for each picture of a batch (each layer).
    start, stop: the share of the run's steps in which the net is called, 0 to 1; `interval` says how they are counted.
    mode: "balanced"; "prompt": soft weights, so that the prompt counts more; "control": soft weights, and the negative
        prompt is left without control, so that the control counts more; "guess": the same with diffusers' soft weights.
    map: how much of the control there is where: a grey picture, an array in [0, 1] or words (docs/change-maps.md).
    mask: what an inpainting net shall draw anew (white); these pixels of the hint become -1.
    control_type: of a Union net, what kind of hint this is.
    fit: what to do with a hint of another shape than the model's; None is the request's.
    """

    net: str
    image: Source | None = None
    _: KW_ONLY
    weight: float | tuple[float, ...] = 1.0
    start: float = 0.0
    stop: float = 1.0
    mode: Mode = "balanced"
    map: Source | None = None
    mask: Source | None = None
    preprocess: str | None = None
    control_type: str | None = None
    interval: Interval = "diffusers"
    fit: Fit | None = None

    def __post_init__(self) -> None:
        _expect(bool(self.net), "a control without a net; name one of the model's, such as canny")
        for weight in self.weights:
            good = 0 <= weight <= HEAVIEST
            _expect(good, f"control {self.net}: weight is {weight}, expected 0 (off) to {HEAVIEST:g}")
        for name, share in (("start", self.start), ("stop", self.stop)):
            _expect(0 <= share <= 1, f"control {self.net}: {name} is {share}, expected 0 to 1, a share of the steps")
        _expect(self.start <= self.stop, f"control {self.net}: starts at {self.start} and stops before, at {self.stop}")
        _among(self.net, "mode", self.mode, MODES)
        _among(self.net, "interval", self.interval, INTERVALS)
        if self.fit is not None:
            _among(self.net, "fit", self.fit, FITS)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of every picture of a batch, or the one weight of all."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    def weight_of(self, picture: int) -> float:
        """Return the weight in one picture of the batch.

        Raises:
            RequestError: there are several weights, and none for this picture.
        """
        if len(self.weights) == 1:
            return self.weights[0]
        _expect(
            picture < len(self.weights), f"control {self.net}: {len(self.weights)} weights, but a picture {picture + 1}"
        )
        return self.weights[picture]

    def acts(self, step: int, steps: int) -> bool:
        """Say whether the net is called at `step` (from 0) of the `steps` that the run makes.

        diffusers: the whole step lies in the interval, start <= step / steps and (step + 1) / steps <= stop; so
        `stop=0` never calls the net. a1111: the step begins in it, start <= step / steps <= stop; one step more.
        """
        begin, end = step / steps, (step + 1) / steps
        return self.start <= begin and (end if self.interval == "diffusers" else begin) <= self.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyControl:
    """A control whose pictures have been read and have the model's size.

    hint: (1, 3, H, W) float32 in [0, 1]; what an inpainting net shall draw anew is -1. map: (H, W) float32 in [0, 1].
    files: what the pictures were, for the metadata. notices: what was done to them, for the user.
    """

    control: Control
    hint: Float
    map: Float | None = None
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def idle(self) -> bool:
        """Say whether its net is never called: no weight anywhere, or no step."""
        nowhere = self.map is not None and not self.map.any()
        return nowhere or not any(self.control.weights)


def recorded(ready: ReadyControl) -> dict[str, Any]:
    """Return what a picture says about a control, as plain JSON values: its settings, and what its pictures were.

    Files are named without their folders: a picture that is passed on does not say where things lay.
    """
    control = ready.control
    name, equals, rest = (control.preprocess or "").partition("=")
    return {
        "net": Path(control.net).name,
        "weight": list(control.weight) if isinstance(control.weight, tuple) else control.weight,
        **{name: getattr(control, name) for name in ("start", "stop", "mode", "control_type", "interval", "fit")},
        "preprocess": name + equals + Path(rest).name if equals else control.preprocess,
        "files": ready.files,
    }


def mode_weights(mode: Mode, kind: str, count: int) -> tuple[float, ...]:
    """Return what each of a net's residuals counts in a mode, the middle block's last.

    Soft weights fall by 0.825 from one residual to the one before. SDXL's ten get the first ten numbers of thirteen, as
    in sd-webui-controlnet: its middle counts 0.56. diffusers' guess mode goes evenly, as logarithms, from 0.1 to 1.
    """
    if mode == "balanced":
        return (1.0,) * count
    if mode == "guess":
        return tuple(np.logspace(-1, 0, count).tolist())
    if kind == "t2i_adapter":
        return ADAPTER_SOFT[:count]
    return tuple(SOFT_BASE ** (SOFT_TOP - j) for j in range(count))


def at_size(control_map: Float, height: int, width: int) -> Float:
    """Bring a control map (H, W) to a residual's size: (height, width), the mean over what each cell covers."""
    if control_map.min() == control_map.max():  # exactly that value, whatever the resampling rounds
        return np.full((height, width), control_map.flat[0], np.float32)
    shrunk = Image.fromarray(control_map).resize((width, height), Image.Resampling.BOX)
    return np.clip(np.asarray(shrunk, np.float32), 0, 1)


def _among(net: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    _expect(value in choices, f"control {net}: {name} is {value!r}, expected one of {', '.join(choices)}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)
