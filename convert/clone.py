"""Files that share their bytes where the disk can, and a weight.bin of which some records are written anew."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.convert.index import Place
from glassine.convert.lora import Adder, Lora
from glassine.errors import ConversionError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}
_FICLONE = 0x40049409  # linux/fs.h: share the extents of another file
_PIECE = 1 << 19  # elements that are read, changed and written at a time
_WRITERS = 2


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the disk has no hard links (exFAT)."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        clone_or_copy(source, target)


def clone_or_copy(source: Path, target: Path) -> None:
    """Make `target` a new file with the bytes of `source`; where the disk can (APFS, Btrfs, XFS) they share them."""
    if not _cloned(source, target):
        shutil.copyfile(source, target)


def _cloned(source: Path, target: Path) -> bool:
    if sys.platform == "darwin":
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        return bool(library.clonefile(os.fsencode(source), os.fsencode(target), 0) == 0)
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            cloned = False
        else:
            cloned = True
    if not cloned:
        target.unlink()
    return cloned


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
    cloned = _cloned(base, target)
    with base.open("rb", buffering=0) as old, target.open("r+b" if cloned else "xb", buffering=0) as new:
        source, out = old.fileno(), new.fileno()
        if not cloned:
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
    if not np.isfinite(stored).all():
        origins = " with ".join(patch.origin(place.name) for patch in patches)
        worst = float(np.abs(values).max())
        raise ConversionError(
            f"{place.name} with {origins}: values up to {worst:g} are outside the range of {place.dtype}; "
            "lower the strength, or use another copy of the LoRA"
        )
    return memoryview(stored.reshape(-1).view(np.uint8))


def _put(out: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(out, view, offset)
        view, offset = view[written:], offset + written
