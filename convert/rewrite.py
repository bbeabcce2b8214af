"""A weight.bin with LoRAs over its weights: the records they change are written anew, the rest is shared or copied."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.convert.clone import cloned, copy_range, write_all
from glassine.convert.half import all_finite, to_float16, to_float32
from glassine.convert.index import Index, Packed, Place
from glassine.convert.lora import Lora
from glassine.convert.palettize import encode
from glassine.convert.tiles import row_ranges
from glassine.convert.weights import WeightSource
from glassine.errors import ConversionError

_WRITERS = 2


def write_changed(
    base: Path,
    target: Path,
    index: Index,
    patches: Sequence[Lora],
    exact: WeightSource | None = None,
    written: Callable[[int, int], None] | None = None,
) -> None:
    """Write `target`: the weight.bin `base` with the patches over its weights, each record computed in float32.

    Args:
        index: every weight of the file.
        patches: the first one at the bottom.
        exact: the weights that the file has in fewer bits, as they were before; None: the patches change none of them.
        written: called with how many records or gaps are written, and of how many.

    Raises:
        ConversionError: a weight is no longer finite, or too large for fp16.
        OSError: the disk.
    """
    over = [(place, [patch for patch in patches if place.name in patch.shapes]) for place in index.places]
    changed = [(place, above) for place, above in over if above]
    repacked = [(weight, [patch for patch in patches if weight.name in patch.shapes]) for weight in index.packed]
    repacked = [(weight, above) for weight, above in repacked if above]
    spans = [(place.offset, place.nbytes) for place, _ in changed]
    spans += [span for weight, _ in repacked for span in weight.spans.items()]
    is_clone = cloned(base, target)
    with base.open("rb", buffering=0) as old, target.open("r+b" if is_clone else "xb", buffering=0) as new:
        source, out = old.fileno(), new.fileno()
        size = os.fstat(source).st_size
        os.ftruncate(out, size)
        work = [(place.offset, partial(_rewrite, source, out, place, above)) for place, above in changed]
        work += [(min(weight.spans), partial(_repack, exact, out, weight, above)) for weight, above in repacked]
        if not is_clone:
            work += [(start, partial(copy_range, source, out, start, stop)) for start, stop in _between(spans, size)]
        with ThreadPoolExecutor(_WRITERS) as pool:
            # In the file's order: while one thread computes, the other copies.
            jobs = [pool.submit(job) for _, job in sorted(work, key=lambda work: work[0])]
            try:
                for done, job in enumerate(jobs, start=1):
                    job.result()
                    if written is not None:
                        written(done, len(jobs))
            except BaseException:  # Ctrl-C too
                for job in jobs:
                    job.cancel()
                raise


def _between(spans: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that no span (offset, bytes) covers."""
    at = 0
    for offset, nbytes in sorted(spans):
        if offset > at:
            yield at, offset
        at = max(at, offset + nbytes)
    if at < size:
        yield at, size


def _rewrite(source: int, out: int, place: Place, patches: Sequence[Lora]) -> None:
    """Write one record: some rows at a time where every patch adds to what it is given, as a whole where one cannot."""
    rows, columns = place.shape[0] if place.shape else 1, math.prod(place.shape[1:])
    adders = [patch.adder(place.name) for patch in patches]
    if None in adders:
        values = _read(source, place, 0, rows * columns)
        for patch in patches:
            values = patch.apply(place.name, values.reshape(place.shape))
        write_all(out, _stored(place, patches, values), place.offset)
        return
    for start, stop in row_ranges(rows, columns):
        values = _read(source, place, start * columns, stop * columns)
        for add in adders:
            assert add is not None
            add(start, stop, values.reshape(-1, columns))
        at = place.offset + start * columns * np.dtype(place.dtype).itemsize
        write_all(out, _stored(place, patches, values), at)


def _repack(exact: WeightSource | None, out: int, weight: Packed, patches: Sequence[Lora]) -> None:
    """Write the items of a weight in fewer bits, as a conversion with these patches does."""
    assert exact is not None  # see `change_loras`
    values = exact.read(weight.name, 0, math.prod(weight.shape)).astype(np.float32)
    for patch in patches:
        values = patch.apply(weight.name, values.reshape(weight.shape))
    whole = Place(weight.name, weight.shape, "float16", weight.scale, 0)
    half = np.frombuffer(_stored(whole, patches, values), np.float16).reshape(weight.stored)
    for item, pieces in encode(half, weight.form).items.items():
        at = weight.offsets[item]
        for piece in pieces:
            write_all(out, piece.data, at)
            at += len(piece)


def _read(source: int, place: Place, start: int, stop: int) -> NDArray[np.float32]:
    """The elements [start, stop) as the source had them, without the scale: float32, writable."""
    size = np.dtype(place.dtype).itemsize
    stored = np.frombuffer(os.pread(source, (stop - start) * size, place.offset + start * size), place.dtype)
    values = to_float32(stored) if stored.dtype == np.float16 else np.array(stored)
    if values.size != stop - start:
        raise OSError(errno.EIO, "the file became shorter while it was read")
    if place.scale != 1.0:
        values /= np.float32(place.scale)
    return values


def _stored(place: Place, patches: Sequence[Lora], values: NDArray[np.float32]) -> memoryview:
    """The record's own form: scaled, rounded, and refused where it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = values if place.scale == 1.0 else values * np.float32(place.scale)
    stored = to_float16(scaled) if place.dtype == "float16" else scaled
    if not all_finite(stored):
        origins = " with ".join(patch.origin(place.name) for patch in patches)
        worst = float(np.abs(values).max())
        raise ConversionError(
            f"{place.name} with {origins}: values up to {worst:g} are outside the range of {place.dtype}; "
            "lower the strength, or use another copy of the LoRA"
        )
    return stored.reshape(-1).view(np.uint8).data
