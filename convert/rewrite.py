"""A weight.bin with LoRAs over its weights: the records they change are written anew, the rest is shared or copied."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.convert.clone import cloned
from glassine.convert.index import Place
from glassine.convert.lora import Adder, Lora
from glassine.errors import ConversionError

_PIECE = 1 << 19  # elements that are read, changed and written at a time
_WRITERS = 2


def write_changed(base: Path, target: Path, places: Sequence[Place], patches: Sequence[Lora]) -> None:
    """Write `target`: the weight.bin `base` with the patches over its weights, each record computed in float32.

    Args:
        places: every weight of the file.
        patches: the first one at the bottom.

    Raises:
        ConversionError: a weight is no longer finite, or too large for fp16.
        OSError: the disk.
    """
    changed = [place for place in places if any(place.name in patch.shapes for patch in patches)]
    is_clone = cloned(base, target)
    with base.open("rb", buffering=0) as old, target.open("r+b" if is_clone else "xb", buffering=0) as new:
        source, out = old.fileno(), new.fileno()
        if not is_clone:
            os.ftruncate(out, os.fstat(source).st_size)
            for start, stop in _between(changed, os.fstat(source).st_size):
                _copy_range(source, out, start, stop)
        with ThreadPoolExecutor(_WRITERS) as pool:
            over = [[patch for patch in patches if place.name in patch.shapes] for place in changed]
            jobs = [pool.submit(_rewrite, source, out, *job) for job in zip(changed, over, strict=True)]
            try:
                for job in jobs:
                    job.result()
            except BaseException:  # Ctrl-C too
                for job in jobs:
                    job.cancel()
                raise


def _between(places: Sequence[Place], size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that no place covers."""
    at = 0
    for place in sorted(places, key=lambda place: place.offset):
        if place.offset > at:
            yield at, place.offset
        at = max(at, place.offset + place.nbytes)
    if at < size:
        yield at, size


def _copy_range(source: int, out: int, start: int, stop: int) -> None:
    while start < stop:
        piece = os.pread(source, min(stop - start, 1 << 22), start)
        if not piece:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        _put(out, piece, start)
        start += len(piece)


def _rewrite(source: int, out: int, place: Place, patches: Sequence[Lora]) -> None:
    """Write one record: piece by piece where every patch adds to the rows it is given, as a whole where one cannot."""
    rows, columns = place.shape[0] if place.shape else 1, 1
    columns = place.nbytes // np.dtype(place.dtype).itemsize // max(rows, 1)
    adders = [patch.adder(place.name) for patch in patches]
    step = max(1, _PIECE // max(columns, 1)) if None not in adders else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = _read(source, place, start * columns, stop * columns)
        if step == rows:
            values = _applied(place, patches, values)
        else:
            _add(adders, start, stop, values.reshape(stop - start, columns))
        _put(out, _stored(place, patches, values), place.offset + start * columns * np.dtype(place.dtype).itemsize)


def _applied(place: Place, patches: Sequence[Lora], values: NDArray[np.float32]) -> NDArray[np.float32]:
    weight = values.reshape(place.shape)
    for patch in patches:
        weight = patch.apply(place.name, weight)
    return weight.reshape(-1)


def _add(adders: Sequence[Adder | None], start: int, stop: int, values: NDArray[np.float32]) -> None:
    for add in adders:
        assert add is not None
        add(start, stop, values)


def _read(source: int, place: Place, start: int, stop: int) -> NDArray[np.float32]:
    """The elements [start, stop) as the source had them, without the scale: float32, writable."""
    size = np.dtype(place.dtype).itemsize
    stored = np.frombuffer(os.pread(source, (stop - start) * size, place.offset + start * size), place.dtype)
    values = stored.astype(np.float32)
    if values.size != stop - start:
        raise OSError(errno.EIO, "the file became shorter while it was read")
    if place.scale != 1.0:
        values /= np.float32(place.scale)
    return values


def _stored(place: Place, patches: Sequence[Lora], values: NDArray[np.float32]) -> memoryview:
    """The record's own form: scaled, rounded, and refused where it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = values if place.scale == 1.0 else values * np.float32(place.scale)
        stored = np.ascontiguousarray(scaled, dtype=place.dtype)
    if not _all_finite(stored):
        origins = " with ".join(patch.origin(place.name) for patch in patches)
        worst = float(np.abs(values).max())
        raise ConversionError(
            f"{place.name} with {origins}: values up to {worst:g} are outside the range of {place.dtype}; "
            "lower the strength, or use another copy of the LoRA"
        )
    return stored.reshape(-1).view(np.uint8).data


def _all_finite(stored: NDArray[np.generic]) -> bool:
    """Read off the exponent bits of float16, which is several times faster than isfinite."""
    if stored.dtype != np.float16:
        return bool(np.isfinite(stored).all())
    return bool((stored.view(np.uint16) & np.uint16(0x7C00)).max(initial=0) < 0x7C00)


def _put(out: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(out, view, offset)
        view, offset = view[written:], offset + written
