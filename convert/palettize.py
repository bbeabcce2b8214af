"""Weights in fewer bits: an index into a table of 2^b numbers, or an int8 with a scale a channel.

    weight (fp16) -> palette or scales -> what its records in weight.bin hold

The forms are those Core ML decompresses by itself: `constexpr_lut_to_dense` with one table (macOS 13) or a table for
each group of output channels (macOS 15), and `constexpr_affine_dequantize` / `constexpr_blockwise_shift_scale`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glassine.convert.histogram import RANKS, VALUES, Floats, Histograms, Ints, borders_of
from glassine.convert.kmeans import good_palettes, optimal_palette
from glassine.errors import ConversionError

Half = NDArray[np.float16]
Bytes = NDArray[np.uint8]
Item = Literal["indices", "table", "values", "scales"]
MAIN_ITEMS = ("indices", "values")  # of which there is one an element

SMALLEST = 2048  # elements; smaller weights stay as they are
EXACT = 4096  # elements up to which the one table of a weight is the best there is
_PIECE = 1 << 18  # elements at a time, so that what is made of them stays in the processor's cache
_COUNTED = 1 << 20  # elements of groups that get their tables at a time


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is stored: `bits` an element, in a table for each `group` output channels (0: one table)."""

    kind: Literal["palette", "int8"]
    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        good = self.bits in ((4, 6, 8) if self.kind == "palette" else (8,)) and self.group >= 0
        if not good or (self.kind == "int8" and self.group):
            raise ConversionError(f"{self.kind} of {self.bits} bits: expected 8, 6 or 4 bits, or int8")

    @classmethod
    def read(cls, words: str) -> Form:
        """Read "8", "6", "4", "6/16" (a table for each 16 output channels) or "int8".

        Raises:
            ConversionError: other words.
        """
        found = re.fullmatch(r"(int8)|([468])(?:/([1-9]\d{0,4}))?", words)
        if found is None:
            raise ConversionError(
                f'palette "{words}": expected 8, 6, 4, int8, or 6/16 for a table for each 16 channels'
            )
        return cls("int8", 8) if found[1] else cls("palette", int(found[2]), int(found[3]) if found[3] else 0)

    def __str__(self) -> str:
        return "int8" if self.kind == "int8" else f"{self.bits}/{self.group}" if self.group else str(self.bits)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight can be stored so: a matrix or kernel, large enough, whose channels make whole groups."""
        large = len(shape) > 1 and math.prod(shape) >= SMALLEST
        if not self.group or not large:
            return large
        whole = shape[0] % self.group == 0 and self.group < shape[0]
        return whole and self.group * math.prod(shape[1:]) % 4 == 0  # a table's indices fill whole bytes

    def items(self, shape: tuple[int, ...]) -> dict[Item, tuple[tuple[int, ...], str]]:
        """What a weight of `shape` is stored as: item -> (shape, dtype), as iOS 18's operations have them."""
        ones = (1,) * (len(shape) - 1)
        if self.kind == "int8":
            return {"values": (shape, "int8"), "scales": ((shape[0], *ones), "float16")}
        tables = shape[0] // self.group if self.group else 1
        return {"indices": (shape, f"uint{self.bits}"), "table": ((tables, *ones, 1 << self.bits, 1), "float16")}


@dataclass(frozen=True, slots=True)
class Palette:
    """The form of every weight: `form` for all, but for those in `other` (None: it stays fp16)."""

    form: Form | None
    other: Mapping[str, Form | None] = field(default_factory=dict)

    @classmethod
    def read(cls, words: str) -> Palette:
        """Read the words of a `Form`, or the JSON file of a recipe: {"form": "6", "other": {"conv_in.weight": "8"}}.

        null in the place of a form is fp16.

        Raises:
            ConversionError: other words, or a file of another form.
        """
        if not words.endswith(".json"):
            return cls(Form.read(words))
        try:
            raw = json.loads(Path(words).read_text(encoding="utf-8"))
            other = {str(name): None if form is None else Form.read(form) for name, form in raw["other"].items()}
            return cls(None if raw["form"] is None else Form.read(raw["form"]), other)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(
                f'{words}: cannot be used as a recipe ({error}); expected {{"form": "6", "other": {{"NAME": "8"}}}}'
            ) from None

    def __str__(self) -> str:
        return "mixed" if self.other else str(self.form)

    @property
    def grouped(self) -> bool:
        """Whether any weight has several tables, which are for macOS 15."""
        return any(form is not None and form.group > 0 for form in (self.form, *self.other.values()))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse what does nothing for a network's weights.

        Raises:
            ConversionError: a recipe of another model, or groups that no weight's channels make.
        """
        strangers = sorted(set(self.other) - set(shapes))
        if strangers:
            raise ConversionError(
                f"the recipe has weights that this model does not have ({len(strangers)}, the first is "
                f"{strangers[0]}); it was made for another one: make its own with 'glassine recipe'"
            )
        forms = {self.form_of(name, shape) for name, shape in shapes.items()}
        if self.form is not None and self.form.group and not any(form is not None and form.group for form in forms):
            raise ConversionError(
                f"palette {self.form}: no weight has channels that make several whole groups of {self.form.group}; "
                f"16 fits every Stable Diffusion, and {self.form.bits} alone is one table a weight"
            )

    def form_of(self, name: str, shape: tuple[int, ...]) -> Form | None:
        """Return the form of the weight `name`, or None if it stays as it is.

        A weight whose channels make no whole groups gets one table.
        """
        name = name.rpartition(":")[2]
        form = self.other.get(name, self.form)
        if form is None or form.fits(shape):
            return form
        alone = Form(form.kind, form.bits)
        return alone if alone.fits(shape) else None


@dataclass(frozen=True, slots=True)
class Loss:
    """What a weight lost: sums of squares of its values and of the errors."""

    form: Form
    elements: int
    power: float
    error: float

    @property
    def snr(self) -> float:
        """Signal to noise, dB."""
        return 10 * math.log10(self.power / self.error) if self.error and self.power else math.inf


@dataclass(frozen=True, slots=True)
class Encoding:
    """The bytes of a weight's items, in pieces that are made when they are asked for, and its loss."""

    items: Mapping[Item, Iterable[Bytes]]
    loss: Loss


def encode(weight: Half, form: Form) -> Encoding:
    """Store a weight (channels first, finite) in a form that `fits` it."""
    if form.kind == "int8":
        return _int8(weight, form)
    groups = _groups(weight, form)
    numbers, loss = _tables(groups, form)
    table = numbers.reshape(-1).view(np.uint8)
    return Encoding({"indices": _indices(groups, numbers, form.bits), "table": [table]}, loss)


def approximated(weight: Half, form: Form) -> Half:
    """Return what a palette makes of a weight that it `fits`: every value becomes the nearest number of its table."""
    groups = _groups(weight, form)
    numbers, _ = _tables(groups, form)
    nearest = np.empty_like(groups)
    for group, row, lengths, out in zip(groups, numbers, _lengths(numbers), nearest, strict=True):
        np.repeat(row.view(np.uint16), lengths).take(RANKS).take(group, out=out, mode="clip")
    return nearest.view(np.float16).reshape(weight.shape)


def _groups(weight: Half, form: Form) -> NDArray[np.uint16]:
    """The bits of a weight's values, a row for each table."""
    return weight.reshape(weight.shape[0] // form.group if form.group else 1, -1).view(np.uint16)


def _tables(groups: NDArray[np.uint16], form: Form) -> tuple[Half, Loss]:
    """Make the palettes: (G, m) bits -> (G, 2^b), ascending, and what is lost."""
    exact = not form.group and groups.size <= EXACT
    numbers = np.empty((len(groups), 1 << form.bits), np.float16)
    power = error = 0.0
    step = max(1, _COUNTED // groups.shape[1])
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        counted = Histograms.of_groups(part) if form.group else Histograms.of_one(part[0])
        table = _table(counted, 1 << form.bits, exact=exact)
        numbers[start : start + step] = table
        power += counted.power()
        error += counted.error(table)
    return numbers, Loss(form, groups.size, power, error)


def _table(counted: Histograms, k: int, *, exact: bool) -> Floats:
    """Make the palette of every group: (G, k), ascending, of fp16 numbers."""
    if exact:
        best = optimal_palette(counted.values, counted.counts, k)
        palettes = np.pad(best, (0, k - len(best)), mode="edge")[None]
    else:
        palettes = good_palettes(counted, k)
    return np.sort(palettes.astype(np.float16), axis=1).astype(np.float64)


def _lengths(numbers: Half) -> Ints:
    """Return of how many fp16 values each number is the nearest: (G, k). Asked of the numbers after their rounding."""
    return np.diff(borders_of(numbers.astype(np.float64)), axis=1, prepend=0, append=len(VALUES))


def _indices(groups: NDArray[np.uint16], numbers: Half, bits: int) -> Iterator[Bytes]:
    """The packed indices, a piece of a group at a time; every group fills whole bytes."""
    for group, lengths in zip(groups, _lengths(numbers), strict=True):
        codes = np.repeat(np.arange(1 << bits, dtype=np.uint8), lengths).take(RANKS)
        for start in range(0, len(group), _PIECE):
            yield pack(codes.take(group[start : start + _PIECE]), bits)


def _int8(weight: Half, form: Form) -> Encoding:
    """Round to a scale a channel, symmetric: scale * (-127 ... 127)."""
    rows = weight.reshape(weight.shape[0], -1)
    values = np.empty(rows.shape, np.int8)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float32)
    scales = (largest / 127).astype(np.float16)
    scales[scales == 0] = np.finfo(np.float16).smallest_subnormal
    power = error = 0.0
    step = max(1, _PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        exact = rows[start : start + step].astype(np.float32)
        scale = scales[start : start + step, None].astype(np.float32)
        whole = np.clip(np.rint(exact / scale), -127, 127)
        values[start : start + step] = whole
        power += float(np.vdot(exact, exact))
        lost = exact - whole * scale
        error += float(np.vdot(lost, lost))
    items: dict[Item, Iterable[Bytes]] = {
        "values": [values.reshape(-1).view(np.uint8)],
        "scales": [scales.view(np.uint8)],
    }
    return Encoding(items, Loss(form, weight.size, power, error))


def pack(indices: Bytes, bits: int) -> Bytes:
    """Pack indices of `bits` bits, the first one in the lowest bits, as Core ML reads them; the end is filled up."""
    if bits == 8:
        return indices
    per_word, word = {4: (2, 1), 6: (4, 3)}[bits]  # indices, and the bytes they fill
    padded = indices if len(indices) % per_word == 0 else np.pad(indices, (0, -len(indices) % per_word))
    packed = np.empty(len(padded) // per_word * word, np.uint8)
    step = _PIECE // per_word * per_word
    for start in range(0, len(padded), step):
        columns = padded[start : start + step].reshape(-1, per_word)
        out = packed[start // per_word * word :][: len(columns) * word].reshape(-1, word)
        if bits == 4:
            out[:, 0] = columns[:, 0] | columns[:, 1] << 4
        else:
            out[:, 0] = columns[:, 0] | columns[:, 1] << 6
            out[:, 1] = columns[:, 1] >> 2 | columns[:, 2] << 4
            out[:, 2] = columns[:, 2] >> 4 | columns[:, 3] << 2
    return packed[: -(-len(indices) * bits // 8)]
