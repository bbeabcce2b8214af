"""The settings of one picture: everything about it that can be written down in a line of text."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from glassine.errors import RequestError

Rule = Literal["scale", "cap", "authors", "time"]
NoiseKind = Literal["torch", "philox"]
Emphasis = Literal["original", "no_norm"]
Fit = Literal["crop", "fit", "stretch"]

_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float)}
DEFAULT_STRENGTH = 0.75  # of an image without a change map: A1111's
RULES: tuple[Rule, ...] = ("scale", "cap", "authors", "time")
NOISE_KINDS: tuple[NoiseKind, ...] = ("torch", "philox")
EMPHASES: tuple[Emphasis, ...] = ("original", "no_norm")
FITS: tuple[Fit, ...] = ("crop", "fit", "stretch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The settings of one picture. All of them can be stored in it, and `Request.from_dict` reads them back.

    steps: evaluations scheduled for strength 1. strength: how much of them an image may use, 0..1.
    sampler, spacing: names in SAMPLERS and SPACINGS; spacing None is the sampler's own.
    eta: the share of fresh noise for samplers that have it; None is the sampler's own.
    guidance_scale: classifier-free guidance, 1 = without. guidance_rescale: 0..1 (arXiv 2305.08891, section 3.4).
    clip_skip: 1 = the last layer (A1111's numbering); None is the model's own.
    rule: how the change map becomes a number of evaluations per latent cell.
    fit: what to do with a picture of another shape than the model's.
    """

    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 20
    sampler: str = "dpmpp_2m"
    spacing: str | None = None
    eta: float | None = None
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    seed: int = 0
    noise: NoiseKind = "torch"
    clip_skip: int | None = None
    emphasis: Emphasis = "original"
    strength: float = 1.0
    rule: Rule = "scale"
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        _expect(1 <= self.steps <= 1000, f"steps is {self.steps}, expected 1 to 1000")
        _expect(0 <= self.seed < 2**64, f"seed is {self.seed}, expected 0 to 2**64 - 1")
        _expect(0.0 <= self.strength <= 1.0, f"strength is {self.strength}, expected 0 to 1")
        _expect(0.0 <= self.guidance_rescale <= 1.0, f"guidance_rescale is {self.guidance_rescale}, expected 0 to 1")
        _expect(
            math.isfinite(self.guidance_scale), f"guidance_scale is {self.guidance_scale}, expected a finite number"
        )
        _expect(self.clip_skip is None or self.clip_skip >= 1, f"clip_skip is {self.clip_skip}, expected 1 or more")
        _expect(self.eta is None or self.eta >= 0, f"eta is {self.eta}, expected 0 or more")
        _among("rule", self.rule, RULES)
        _among("noise", self.noise, NOISE_KINDS)
        _among("emphasis", self.emphasis, EMPHASES)
        _among("fit", self.fit, FITS)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Request:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            RequestError: an unknown setting, or a value of the wrong type or out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(raw) - set(known))
        _expect(not unknown, f"unknown settings {unknown}; this Glassine knows {sorted(known)}")
        for name, value in raw.items():
            wanted = str(known[name].type)
            kind = _KINDS.get(wanted.split(" |", maxsplit=1)[0], str)
            optional = wanted.endswith("| None") and value is None
            good = isinstance(value, kind) and not isinstance(value, bool)
            _expect(optional or good, f"setting {name!r} is {value!r}, expected {wanted}")
        return cls(**raw)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)


def _among(name: str, value: str, choices: tuple[str, ...]) -> None:
    _expect(value in choices, f"{name} is {value!r}, expected one of {', '.join(choices)}")
