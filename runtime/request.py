"""The settings of one picture: everything about it that can be written down in a line of text."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from glassine.errors import RequestError
from glassine.manifest import Prediction

Rule = Literal["scale", "cap", "authors", "time"]
NoiseKind = Literal["torch", "philox"]
Emphasis = Literal["original", "no_norm"]
Fit = Literal["crop", "fit", "stretch"]

_KINDS: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "int": int,
    "float": (int, float),
    "tuple[int, int]": (tuple, list),
}
DEFAULT_STRENGTH = 0.75  # of an image without a change map: A1111's
RULES: tuple[Rule, ...] = ("scale", "cap", "authors", "time")
NOISE_KINDS: tuple[NoiseKind, ...] = ("torch", "philox")
EMPHASES: tuple[Emphasis, ...] = ("original", "no_norm")
LAYER_KINDS = ("joint", "fg2bg", "bg2fg", "fg2ble", "bg2ble", "fgble2bg", "bgble2fg")
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

    transparent: draw RGBA, with the model's transparent UNet. passes: of the transparent decoder, 1 (fast) or 8 (best).
    layers: draw with the model's UNet of this kind, such as "joint" (LAYER_KINDS); "" = with none of these.
    fg_prompt, bg_prompt, blend_prompt: words for one of the pictures alone, put before the prompt.
    stop_at: the share of the diffusion, counted from the noise, after which the base UNet takes over from the patched
        one (transparency, layers); 1 = never.

    What only some families read; the others take no notice:
    original_size, target_size: (width, height), crop: (left, top), in pixels: SDXL's micro-conditioning, which says
        what the picture would be like in the training set (arXiv 2307.01952, section 2.2). None is the picture's size.
        negative_...: the same for the negative prompt; None is as for the prompt.
    aesthetic_score, negative_aesthetic_score: the SDXL refiner's, 0..10.
    refine_at: the share of the noise levels, counted from the noisiest, after which the refiner takes over.
    image_guidance: instruct-pix2pix, how close the result stays to the picture; 1 = without.
    A full LCM model reads guidance_scale as a number of its own (w); it has no negative prompt.

    prediction_type: what the UNet predicts, for folders that others made and that were taken for the wrong thing; None
        is what the model says.
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
    transparent: bool = False
    passes: int = 8
    layers: str = ""
    fg_prompt: str = ""
    bg_prompt: str = ""
    blend_prompt: str = ""
    stop_at: float = 1.0
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    refine_at: float = 0.8
    image_guidance: float = 1.5
    prediction_type: Prediction | None = None

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
        _expect(0.0 <= self.refine_at <= 1.0, f"refine_at is {self.refine_at}, expected 0 to 1")
        for name in ("aesthetic_score", "negative_aesthetic_score", "image_guidance"):
            _expect(math.isfinite(getattr(self, name)), f"{name} is {getattr(self, name)}, expected a finite number")
        for name in ("original_size", "crop", "target_size"):
            for pair in (getattr(self, name), getattr(self, f"negative_{name}")):
                _expect(pair is None or _is_pair(pair), f"{name} is {pair}, expected two whole numbers of pixels")
        _expect(0.0 <= self.stop_at <= 1.0, f"stop_at is {self.stop_at}, expected 0 to 1")
        _expect(self.passes in (1, 8), f"passes is {self.passes}, expected 1 (fast) or 8 (best)")
        if self.prediction_type is not None:
            _among("prediction_type", self.prediction_type, get_args(Prediction))
        _among("layers", self.layers, ("", *LAYER_KINDS))
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
            good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            _expect(optional or good, f"setting {name!r} is {value!r}, expected {wanted}")
        settings: dict[str, Any] = {}
        for name, value in raw.items():
            settings[name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        return cls(**settings)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(side) is int and side >= 0 for side in value)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)


def _among(name: str, value: str, choices: tuple[str, ...]) -> None:
    _expect(value in choices, f"{name} is {value!r}, expected one of {', '.join(choices)}")
