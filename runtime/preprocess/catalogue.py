"""The preprocessors by name, each with one line about it, its settings and what it needs beside the picture."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from glassine.errors import RequestError
from glassine.runtime.image import Bytes
from glassine.runtime.preprocess import colour, lines, texture

Needs = Literal["nothing", "mask", "model"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One number of a preprocessor. low, high: the range it may have. whole: integers only."""

    name: str
    default: float
    low: float
    high: float
    says: str
    whole: bool = False

    def checked(self, owner: str, value: float) -> float:
        """Return `value` as this setting takes it.

        Raises:
            RequestError: it is out of range, not finite, or not whole where it has to be.
        """
        kind = "a whole number" if self.whole else "a number"
        if not math.isfinite(value) or not self.low <= value <= self.high or (self.whole and value != int(value)):
            raise RequestError(
                f"{owner}: {self.name} is {value:g}, expected {kind} from {self.low:g} to {self.high:g} ({self.says})"
            )
        return int(value) if self.whole else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A preprocessor.

    run: (H, W, 3) uint8 RGB and the settings -> (H, W, 3) uint8; None where a mask or a model decides.
    scaled: it looks at the picture at a resolution of its own. padded: there with sides that are multiples of 64.
    """

    says: str
    run: Callable[..., Bytes] | None = None
    settings: tuple[Setting, ...] = ()
    needs: Needs = "nothing"
    scaled: bool = True
    padded: bool = True

    def checked(self, name: str, given: Mapping[str, float]) -> dict[str, float]:
        """Return every setting: what was given, else its default.

        Raises:
            RequestError: a setting this preprocessor does not have, or a value out of range.
        """
        unknown = sorted(set(given) - {setting.name for setting in self.settings})
        if unknown:
            takes = ", ".join(setting.name for setting in self.settings)
            raise RequestError(
                f'preprocessor "{name}" has no setting {", ".join(unknown)}; '
                + (f"it has {takes}" if takes else "it has none")
            )
        return {s.name: s.checked(name, given.get(s.name, s.default)) for s in self.settings}


_GAMMA = Setting("gamma", 1, 0.1, 2, "below 1 brighter, above 1 darker")

KINDS: dict[str, Kind] = {
    "none": Kind(says="the picture as it is: a map made elsewhere", run=colour.unchanged, scaled=False),
    "canny": Kind(
        says="edges, one pixel wide",
        run=lines.canny,
        settings=(
            Setting("low", 100, 0, 2040, "weaker edges are dropped"),
            Setting("high", 200, 0, 2040, "stronger edges are kept for sure"),
        ),
    ),
    "scribble": Kind(
        says="rough strokes (XDoG)",
        run=lines.scribble,
        settings=(Setting("threshold", 32, 1, 510, "lower draws more strokes"),),
    ),
    "lineart": Kind(
        says="drawn lines, grey",
        run=lines.lineart,
        settings=(
            Setting("sigma", 6, 0.1, 100, "pixels; wider lines need more"),
            Setting("floor", 8, 0, 255, "levels; fainter lines do not set the brightness"),
        ),
    ),
    "threshold": Kind(
        says="white where the darkest channel is bright",
        run=lines.threshold,
        settings=(Setting("threshold", 127, 0, 255, "levels"),),
    ),
    "invert": Kind(says="the negative: black lines on paper become white on black", run=colour.invert, scaled=False),
    "tile": Kind(
        says="the picture with less detail",
        run=texture.tile,
        settings=(Setting("factor", 1, 1, 64, "how many times smaller; below 1.1 nothing changes"),),
        scaled=False,
    ),
    "blur": Kind(
        says="the picture blurred",
        run=texture.blur,
        settings=(Setting("sigma", 9, 0.1, 100, "pixels"),),
    ),
    "luminance": Kind(says="lightness, to be recoloured", run=colour.luminance, settings=(_GAMMA,), scaled=False),
    "intensity": Kind(says="largest channel, to be recoloured", run=colour.intensity, settings=(_GAMMA,), scaled=False),
    "shuffle": Kind(
        says="the picture's content moved about",
        run=texture.shuffle,
        settings=(Setting("seed", 0, 0, 2**32 - 1, "another one, another arrangement", whole=True),),
        padded=False,
    ),
    "grid": Kind(
        says="squares of the picture's colours",
        run=colour.grid,
        settings=(Setting("cell", 64, 1, 1024, "pixels a square", whole=True),),
    ),
    "inpaint": Kind(says="the picture with a mask cut out; needs a mask", needs="mask", scaled=False),
}  # fmt: skip


def find(name: str) -> Kind:
    """Return the preprocessor of this name.

    Raises:
        RequestError: there is none; the message names those that are spelled alike.
    """
    if name in KINDS:
        return KINDS[name]
    near = difflib.get_close_matches(name, KINDS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(KINDS)}"
    raise RequestError(f'preprocessor "{name}" is not known; {hint} (glassine preprocess --list says what each does)')
