"""The preprocessors by name, each with one line about it, its settings and what it needs beside the picture."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glassine.errors import RequestError
from glassine.runtime.image import Bytes
from glassine.runtime.preprocess import colour, learned, lines, pose, texture
from glassine.runtime.preprocess.network import NORMALISATIONS

# "network": the user's file is opened and handed to `run`; "keypoints": `run` is given the file, if any, and decides.
Needs = Literal["nothing", "mask", "network", "keypoints"]
Value = float | str


@dataclass(frozen=True, slots=True)
class Setting:
    """One number of a preprocessor. low, high: the range it may have. whole: integers only."""

    name: str
    default: float
    low: float
    high: float
    says: str
    whole: bool = False

    def checked(self, owner: str, value: Value) -> float:
        """Return `value`, a number or its text, as this setting takes it.

        Raises:
            RequestError: it is no number, out of range, or not whole where it has to be.
        """
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high or (self.whole and number != int(number)):
            kind = "a whole number" if self.whole else "a number"
            raise RequestError(f"{owner}: {self.name} is {value}, expected {kind} from {self.range} ({self.says})")
        return int(number) if self.whole else number

    @property
    def range(self) -> str:
        """What it may be, in words."""
        return f"{self.low:.10g} to {self.high:.10g}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One word of a preprocessor: one of `words`, the first by default."""

    name: str
    words: tuple[str, ...]
    says: str

    def checked(self, owner: str, value: Value) -> str:
        """Return `value`.

        Raises:
            RequestError: it is not one of the words.
        """
        if value not in self.words:
            raise RequestError(f"{owner}: {self.name} is {value}, expected {' or '.join(self.words)} ({self.says})")
        return str(value)

    @property
    def default(self) -> str:
        """The word it is when none is given."""
        return self.words[0]

    @property
    def range(self) -> str:
        """What it may be, in words."""
        return " or ".join(self.words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A preprocessor.

    run: (H, W, 3) uint8 RGB and the settings -> (H, W, 3) uint8; None where a mask decides.
    scaled: it looks at the picture at a resolution of its own. padded: there with sides that are multiples of 64.
    """

    says: str
    run: Callable[..., Bytes] | None = None
    settings: tuple[Setting | Choice, ...] = ()
    needs: Needs = "nothing"
    scaled: bool = True
    padded: bool = True

    def checked(self, name: str, given: Mapping[str, Value]) -> dict[str, Any]:
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
_MULTIPLE = Setting("multiple", 1, 1, 256, "of the sides, for a network that takes any size", whole=True)


def _input(first: str) -> Choice:
    words = (first, *(word for word in NORMALISATIONS if word != first))
    return Choice("input", words, "what the network wants colours to be: (x/255 - mean)/std, -1..1, 0..1 or 0..255")


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
    "depth": Kind(
        says="near white, far black; needs a depth network",
        run=learned.depth,
        settings=(_input("imagenet"), _MULTIPLE, Choice("near", ("high", "low"), "its number for what is near")),
        needs="network",
        padded=False,
    ),
    "normal": Kind(
        says="which way surfaces face; needs a normal network",
        run=learned.normal,
        settings=(_input("imagenet"), _MULTIPLE, Choice("output", ("signed", "unit"), "normals in -1..1 or in 0..1")),
        needs="network",
        padded=False,
    ),
    "softedge": Kind(
        says="soft lines; needs an edge or line-art network",
        run=learned.softedge,
        settings=(
            _input("unit"),
            _MULTIPLE,
            Choice("output", ("unit", "logits", "bytes"), "lines in 0..1, before the sigmoid, or in 0..255"),
            Choice("lines", ("bright", "dark"), "how the network draws them"),
        ),
        needs="network",
        padded=False,
    ),
    "segment": Kind(
        says="a colour for every class of ADE20K; needs a segmentation network",
        run=learned.segment,
        settings=(_input("imagenet"), _MULTIPLE),
        needs="network",
        padded=False,
    ),
    "pose": Kind(
        says="people as stick figures; macOS finds them, or keypoints from a file",
        run=pose.pose,
        settings=(Setting("score", 0.3, 0, 1, "points less sure than this are left out"),),
        needs="keypoints",
        padded=False,
    ),
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
