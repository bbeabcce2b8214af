"""Which layers of a UNet keep more bits: measured by what each one does to the output, not guessed.

    for each group of layers:  the UNet in which they alone have the fewest bits  ->  noise in the output
    noise and bytes of every group  ->  the recipe that `convert --palette` reads

Errors of weights are small and independent, so the noise of groups adds up, and each further bit takes away 6 dB: one
run a group is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.convert.clone import write_all
from glassine.convert.package import read_half, write_package
from glassine.convert.palettize import Form, Palette, approximated
from glassine.convert.program import Requests, bits_of, lower
from glassine.convert.weights import WeightSource
from glassine.errors import ConversionError
from glassine.manifest import WEIGHT_FILE
from glassine.models.config import UNetConfig

# A package, and the offsets at which its weight file has changed since the last run -> its output, on inputs that are
# always the same.
Run = Callable[[Path, Collection[int]], NDArray[np.float32]]
Report = Callable[[int, int, str], None]

_WRITERS = 2
PIXELS = 64  # side of the picture that noise is measured on: weights, not activations, cost the time
_KINDS = ("attentions", "resnets", "downsamplers", "upsamplers")


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that get the same form.

    noise: power of the output's error over that of the output, in the form of the fewest bits. bits: by form (None:
    fp16), what their weights take.
    """

    name: str
    weights: tuple[str, ...]
    noise: float
    bits: Mapping[Form | None, int]

    def noise_in(self, form: Form | None, lowest: Form) -> float:
        """Return the noise in a form: a bit more quarters it."""
        return 0.0 if form is None else self.noise * 4.0 ** (lowest.bits - form.bits)


class Judge:
    """Runs a UNet, for a small picture, with some of its weights in fewer bits.

    The package is written once; then weights of fewer bits stand in its weight file as the numbers that they become.
    """

    def __init__(self, config: UNetConfig, weights: WeightSource, scratch: Path, run: Run) -> None:
        """Write the package.

        Args:
            scratch: a folder for it. run: runs it.
        """
        from glassine.models.unet import unet

        cells = PIXELS // 8
        requests = Requests(weights.shapes)
        program = unet(config, requests, batch=1, height=cells, width=cells, attention="einsum", layout="channels_last")
        lowered = lower(program)
        self._package, self._run = scratch / "measured.mlpackage", run
        self._places = {weight.name: (record, weight) for record, weight in lowered.plan.weights()}
        self._rough: set[str] = set()  # weights that stand in fewer bits in the file
        self.weights = weights
        write_package(self._package, lowered, weights)
        self.plain = run(self._package, ())

    def noise(self, palette: Palette) -> float:
        """Return the power of the output's error over that of the output."""
        halves = [name for name, (record, _) in self._places.items() if record.dtype == "float16"]
        forms = {name: palette.form_of(name, self.weights.shapes[name]) for name in halves}
        rough = {name for name, form in forms.items() if form is not None}
        changed = sorted(rough | self._rough)
        with (self._package / WEIGHT_FILE).open("r+b", buffering=0) as file, ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda name: self._write(file.fileno(), name, forms[name]), changed))
        self._rough = rough
        error = self._run(self._package, [self._places[name][0].offset for name in changed]) - self.plain
        return float(np.square(error, dtype=np.float64).mean() / np.square(self.plain, dtype=np.float64).mean())

    def _write(self, file: int, name: str, form: Form | None) -> None:
        record, weight = self._places[name]
        half = read_half(weight, record.shape, self.weights)
        stored = half if form is None else approximated(half, form)
        write_all(file, stored.reshape(-1).view(np.uint8).data, record.data_offset)


def measure(judge: Judge, forms: Sequence[Form], report: Report) -> list[Group]:
    """Measure every group of layers of a UNet.

    Args:
        forms: palettes, from the fewest bits to the most. report: called with (done, total, group).

    Raises:
        ConversionError: `forms` are in another order, or not all palettes of one table.
    """
    widths = [form.bits for form in forms]
    if widths != sorted(set(widths)) or any(form.kind != "palette" or form.group for form in forms):
        raise ConversionError(f"forms {', '.join(map(str, forms))}: expected some of 4, 6, 8, the fewest bits first")
    large = {name: shape for name, shape in judge.weights.shapes.items() if forms[0].fits(shape)}
    groups: dict[str, list[str]] = {}
    for name in large:
        groups.setdefault(group_of(name), []).append(name)
    found = []
    for done, (group, names) in enumerate(groups.items()):
        report(done, len(groups), group)
        bits: dict[Form | None, int] = {None: 16 * sum(math.prod(large[name]) for name in names)}
        bits.update({form: sum(_stored_bits(large[name], form) for name in names) for form in forms})
        found.append(Group(group, tuple(names), judge.noise(Palette(None, dict.fromkeys(names, forms[0]))), bits))
    report(len(groups), len(groups), "")
    return found


def choose(
    groups: Sequence[Group], forms: Sequence[Form], *, megabytes: float | None = None, decibels: float | None = None
) -> dict[str, Form | None]:
    """Choose a form for every group: the smallest for `decibels` of signal to noise, or the best within `megabytes`.

    From the fewest bits on, the group whose next form takes away the most noise a bit is given it.

    Raises:
        ConversionError: not even the fewest bits fit into `megabytes`, or not exactly one target is given.
    """
    if (megabytes is None) == (decibels is None):
        raise ConversionError("give a size in megabytes or a signal to noise in decibels, one of the two")
    ladder: list[Form | None] = [*forms, None]
    level = {group.name: 0 for group in groups}
    size = sum(group.bits[forms[0]] for group in groups) / 8e6
    if megabytes is not None and size > megabytes:
        raise ConversionError(
            f"{megabytes:g} MB: with {forms[0]} bits everywhere the weights take {size:.0f} MB already"
        )

    def gain(group: Group) -> float:
        now, then = (ladder[level[group.name] + up] for up in (0, 1))
        saved = group.noise_in(now, forms[0]) - group.noise_in(then, forms[0])
        return saved / (group.bits[then] - group.bits[now])

    while True:
        if decibels is not None and signal_to_noise(groups, _forms(level, ladder), forms[0]) >= decibels:
            break
        rising = [group for group in groups if level[group.name] + 1 < len(ladder)]
        if megabytes is not None:
            rising = [group for group in rising if size + _step(group, level, ladder) <= megabytes]
        if not rising:
            break
        best = max(rising, key=gain)
        size += _step(best, level, ladder)
        level[best.name] += 1
    return _forms(level, ladder)


def signal_to_noise(groups: Sequence[Group], chosen: Mapping[str, Form | None], lowest: Form) -> float:
    """Return what `chosen` should give, in dB."""
    noise = sum(group.noise_in(chosen[group.name], lowest) for group in groups)
    return -10 * math.log10(noise) if noise else math.inf


def recipe(groups: Sequence[Group], chosen: Mapping[str, Form | None]) -> Palette:
    """Return the palette that gives every group its form."""
    return Palette(None, {name: chosen[group.name] for group in groups for name in group.weights})


def write_recipe(path: Path, palette: Palette, measured: Mapping[str, object]) -> None:
    """Write what `Palette.read` reads, with what was measured beside it."""
    other = {name: None if form is None else str(form) for name, form in palette.other.items()}
    text = json.dumps({"form": None, "other": other, "measured": measured}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def group_of(name: str) -> str:
    """Return the group of a weight: the layers of one kind in one block."""
    parts = name.split(".")
    kind = next((i for i, part in enumerate(parts) if part in _KINDS), 0)
    return ".".join(parts[: kind + 1])


def _stored_bits(shape: tuple[int, ...], form: Form) -> int:
    return sum(math.prod(item) * bits_of(dtype) for item, dtype in form.items(shape).values())


def _forms(level: Mapping[str, int], ladder: Sequence[Form | None]) -> dict[str, Form | None]:
    return {name: ladder[height] for name, height in level.items()}


def _step(group: Group, level: Mapping[str, int], ladder: Sequence[Form | None]) -> float:
    """Megabytes that the group's next form takes beyond this one."""
    now, then = (ladder[level[group.name] + up] for up in (0, 1))
    return (group.bits[then] - group.bits[now]) / 8e6
