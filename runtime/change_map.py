"""The change map: how much every pixel may change, from words or a mask to the integers that the loop reads.

    words / mask + softness -> change (H, W) in [0, 1] -> latent cells (h, w) -> n, evaluations that may touch each cell

White is change: 1 is drawn anew with all the steps of the run, 0 stays as it is. n has S + 1 levels for S steps, so a
gradient over 20 steps has 21 tones. How a tone becomes n is a rule:

    scale     ceil(c S): half-way grey is half of the run's steps, whatever their spacing (default)
    cap       ceil(c N) but at most S: strength limits the map instead of scaling it (InvokeAI)
    authors   floor(c S) + 1, as the authors published it: even what is kept sees one evaluation
    time      by the level's timestep: with Karras spacing, dark tones get more steps than their share (ComfyUI)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError
from glassine.runtime.schedule import STABLE_DIFFUSION, NoiseSchedule, Sigmas

Rule = Literal["scale", "cap", "authors", "time"]
RULES: tuple[str, ...] = get_args(Rule)
Pooling = Literal["max", "mean"]
Map = NDArray[np.float32]

CELL = 8  # pixels a side of what one latent cell shows
# 0.3 of 10 steps is 3 steps, also where 0.3 * 10 comes out as 3.0000001: more than float32 maps err by up to 300 steps,
# less than the tones of 16-bit maps lie apart (1.5e-5).
_TINY = 1e-5


def to_cells(change: NDArray[np.floating[Any]], pooling: Pooling = "max") -> Map:
    """Bring a map (H, W) to latent cells (H/8, W/8).

    "max" lets a cell change as much as its most changeable pixel, so that a stroke one pixel wide is not lost; "mean"
    suits smooth maps.

    Raises:
        RequestError: not a 2-D map of multiples of 8, or values outside [0, 1].
    """
    if change.ndim != 2 or change.shape[0] % CELL or change.shape[1] % CELL or 0 in change.shape:
        raise RequestError(f"the change map has shape {change.shape}; expected (height, width) in multiples of {CELL}")
    low, high = float(change.min()), float(change.max())
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise RequestError(f"the change map runs from {low:g} to {high:g}; expected 0 (keep) to 1 (change)")
    height, width = change.shape
    blocks = change.reshape(height // CELL, CELL, width // CELL, CELL)
    pooled = blocks.max(axis=(1, 3)) if pooling == "max" else blocks.mean(axis=(1, 3))
    return np.asarray(pooled, dtype=np.float32)


def n_table(
    cells: NDArray[np.floating[Any]],
    sigmas: Sigmas,
    rule: str = "scale",
    *,
    total: int | None = None,
    schedule: NoiseSchedule = STABLE_DIFFUSION,
) -> NDArray[np.int64]:
    """Return n, (1, 1, h, w): how many of the S evaluations of a run may touch each cell.

    Args:
        cells: (h, w) change in [0, 1].
        sigmas: (S + 1,) levels of the run, after `last_steps` has taken the strength into account.
        rule: one of RULES.
        total: N, the steps before strength took some away; only "cap" asks; None is S.
        schedule: the training levels; only "time" asks.

    Raises:
        RequestError: unknown rule.
    """
    steps = len(sigmas) - 1
    change = cells.astype(np.float64)
    if rule == "scale":
        n = np.ceil(change * steps - _TINY)
    elif rule == "cap":
        n = np.ceil(change * (steps if total is None else total) - _TINY)
    elif rule == "authors":
        n = np.floor(change * steps + _TINY) + 1
    elif rule == "time":
        n = _released_by_time(change, sigmas, schedule)
    else:
        raise RequestError(f'change rule "{rule}" is not known; expected one of {", ".join(RULES)}')
    return np.clip(n, 0, steps).astype(np.int64)[None, None]


def _released_by_time(change: NDArray[np.float64], sigmas: Sigmas, schedule: NoiseSchedule) -> NDArray[np.float64]:
    """Count the evaluations at whose training time, 1 at the run's first level and 0 at sigma_min, c has been reached.

    What is to be kept (c = 0) stays kept even where the last level is at time 0; ComfyUI releases all of it there.
    """
    times = np.array([round(schedule.t_of_sigma(float(sigma))) for sigma in sigmas[:-1]], dtype=np.float64)
    end = 0.0 if sigmas[-1] <= schedule.sigma_min else round(schedule.t_of_sigma(float(sigmas[-1])))
    relative = (times - end) / (times[0] - end) if len(times) and times[0] > end else np.ones_like(times)
    reached = np.searchsorted(np.sort(relative), change + _TINY, side="right").astype(np.float64)
    return np.where(change > 0, reached, 0.0)


def soften(mask: NDArray[np.bool_], radius: float) -> Map:
    """Return a map (H, W) that is 1 on the mask and falls smoothly to 0 at `radius` pixels outside of it.

    Outward only, by Euclidean distance: what is selected changes fully, however thin it is.

    Raises:
        RequestError: a negative radius.
    """
    if radius < 0:
        raise RequestError(f"softness is {radius} pixels; expected 0 or more")
    if radius == 0 or not mask.any():
        return mask.astype(np.float32)
    near = np.clip(distance(mask, int(np.ceil(radius))) / np.float32(radius), 0, 1)
    return np.asarray(1 - near * near * (3 - 2 * near), dtype=np.float32)


def blurred(change: Map, sigma: float) -> Map:
    """Return a map (H, W) smoothed by a Gaussian of `sigma` pixels, cut off at three of them; its edges go on."""
    reach = math.ceil(3 * sigma)
    if reach == 0 or change.min() == change.max():
        return change
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis, side in enumerate(change.shape):
        padded = np.pad(change, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        change = sum(
            weight * np.take(padded, range(shift, shift + side), axis=axis) for shift, weight in enumerate(kernel)
        )
    return np.asarray(np.clip(change, 0, 1), np.float32)


def distance(mask: NDArray[np.bool_], reach: int) -> Map:
    """Return the exact Euclidean distance (H, W) in pixels to the nearest pixel of the mask, or reach + 1 beyond reach.

    Column by column first, then the best of all rows within reach, in whole numbers: 2 * reach cheap passes.
    """
    down = np.arange(mask.shape[0], dtype=np.int32)[:, None]
    far = np.int32(reach + 1)
    above = down - np.maximum.accumulate(np.where(mask, down, -far - 1), axis=0)
    below = np.minimum.accumulate(np.where(mask, down, down[-1] + far + 1)[::-1], axis=0)[::-1] - down
    squares = np.minimum(np.minimum(above, below), far) ** 2
    best = squares.copy()
    for shift in range(1, min(reach, mask.shape[1] - 1) + 1):
        shifted = squares + np.int32(shift * shift)
        np.minimum(best[:, shift:], shifted[:, :-shift], out=best[:, shift:])
        np.minimum(best[:, :-shift], shifted[:, shift:], out=best[:, :-shift])
    return np.asarray(np.sqrt(np.minimum(best, far * far)), dtype=np.float32)


def combine(maps: Sequence[Map]) -> Map:
    """Lay maps over one another: the strongest change wins, in any order."""
    return np.asarray(np.maximum.reduce(list(maps)), dtype=np.float32)


# Words. A description is shapes joined by "+", each `shape:arguments[:option=value]...`.

GRAMMAR = (
    "gradient:left-right | gradient:DIRECTION[:from=0][:to=1], box:LEFT,TOP,WIDTH,HEIGHT[:soft=PIXELS][:change=1], "
    "ellipse:LEFT,TOP,WIDTH,HEIGHT[:soft=PIXELS][:change=1], flat:CHANGE; lengths in pixels or percent; "
    'several joined by "+" (the strongest wins), such as "box:10%,10%,50%,50%:soft=24+flat:0.1"'
)
_DIRECTIONS = {"left-right": (1, False), "right-left": (1, True), "top-bottom": (0, False), "bottom-top": (0, True)}


def is_description(text: str) -> bool:
    """Say whether `text` describes a map in words (see GRAMMAR), rather than naming a file."""
    return text.partition(":")[0] in _SHAPES and ":" in text


def parse(text: str, width: int, height: int) -> Map:
    """Return the map (height, width) that a description such as "ellipse:25%,25%,50%,50%:soft=32" draws.

    Raises:
        RequestError: a part that is not in the grammar, with what was expected.
    """
    return combine([_shape(part.strip(), width, height) for part in text.split("+")])


def _shape(text: str, width: int, height: int) -> Map:
    name, *words = text.split(":")
    if name not in _SHAPES or not words:
        raise _unknown(text)
    make, known = _SHAPES[name]
    options = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise _unknown(text)
        options[key] = _number(value, text)
    for key in ("change", "from", "to"):
        if not 0 <= options.get(key, 0) <= 1:
            raise RequestError(f'map "{text}": {key} is {options[key]:g}; expected 0 (keep) to 1 (change)')
    return make(words[0], options, width, height, text)


def _gradient(direction: str, options: dict[str, float], width: int, height: int, text: str) -> Map:
    if direction not in _DIRECTIONS:
        raise RequestError(f'map "{text}": direction "{direction}"; expected one of {", ".join(_DIRECTIONS)}')
    axis, backwards = _DIRECTIONS[direction]
    ramp = np.linspace(options.get("from", 0.0), options.get("to", 1.0), (height, width)[axis], dtype=np.float32)
    ramp = ramp[::-1] if backwards else ramp
    return np.ascontiguousarray(np.broadcast_to(ramp[:, None] if axis == 0 else ramp, (height, width)))


def _box(bounds: str, options: dict[str, float], width: int, height: int, text: str) -> Map:
    x, y, dx, dy = _offsets(bounds, width, height, text)
    return _filled((np.abs(x) <= dx)[None, :] & (np.abs(y) <= dy)[:, None], options)


def _ellipse(bounds: str, options: dict[str, float], width: int, height: int, text: str) -> Map:
    x, y, dx, dy = _offsets(bounds, width, height, text)
    return _filled((x / dx)[None, :] ** 2 + (y / dy)[:, None] ** 2 <= 1, options)


def _flat(value: str, options: dict[str, float], width: int, height: int, text: str) -> Map:
    change = _number(value, text)
    if not 0 <= change <= 1:
        raise RequestError(f'map "{text}": {change:g}; expected 0 (keep) to 1 (change)')
    return np.full((height, width), change, dtype=np.float32)


def _filled(mask: NDArray[np.bool_], options: dict[str, float]) -> Map:
    return np.asarray(soften(mask, options.get("soft", 0.0)) * options.get("change", 1.0), dtype=np.float32)


def _offsets(
    bounds: str, width: int, height: int, text: str
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]], float, float]:
    """Pixel centres relative to the middle of LEFT,TOP,WIDTH,HEIGHT, along x and y, and its half extents."""
    words = bounds.split(",")
    if len(words) != 4:
        raise _unknown(text)
    left, top, across, down = (_length(word.strip(), (width, height)[i % 2], text) for i, word in enumerate(words))
    if across <= 0 or down <= 0:
        raise RequestError(f'map "{text}": width {across:g} and height {down:g} pixels; expected more than 0')
    x = np.arange(width) + 0.5 - (left + across / 2)
    y = np.arange(height) + 0.5 - (top + down / 2)
    return x, y, across / 2, down / 2


def _length(word: str, whole: int, text: str) -> float:
    return _number(word[:-1], text) / 100 * whole if word.endswith("%") else _number(word, text)


def _number(word: str, text: str) -> float:
    if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", word.strip()) is None:
        raise RequestError(f'map "{text}": "{word}" is not a number; expected {GRAMMAR}')
    return float(word)


def _unknown(text: str) -> RequestError:
    return RequestError(f'map "{text}" is not understood; expected {GRAMMAR}')


_Maker = Callable[[str, dict[str, float], int, int, str], Map]
_SHAPES: dict[str, tuple[_Maker, tuple[str, ...]]] = {
    "gradient": (_gradient, ("from", "to")),
    "box": (_box, ("soft", "change")),
    "ellipse": (_ellipse, ("soft", "change")),
    "flat": (_flat, ()),
}
