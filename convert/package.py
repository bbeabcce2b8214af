"""Program + weights -> .mlpackage: one pass over the plan, file to file, in a few megabytes of memory.

A package is Manifest.json and Data/com.apple.CoreML/{model.mlmodel, weights/weight.bin}. Equal input gives equal
bytes: there are no dates, and the identifiers are derived from the names.

Files are not fsynced (neither does `cp`): a killed process loses nothing, a power cut in the seconds after may.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import open_weights
from glassine.convert.clone import clone_or_copy, link_or_copy, write_all
from glassine.convert.half import all_finite, cast
from glassine.convert.palettize import encode
from glassine.convert.program import ALIGNMENT, BLOB_DTYPES, Encoded, Lowered, Plan, Record, Weight, bits_of
from glassine.convert.weights import Span, WeightSource
from glassine.errors import ConversionError, PackageError

# Bytes that are read, checked and written at a time: they stay in the processor's cache in between. The kernel could
# copy by itself (copy_file_range), but the check for NaN has to read every byte anyway.
_CHUNK = 1 << 19
_WRITERS = 2
_MODEL = "com.apple.CoreML/model.mlmodel"
_WEIGHTS = "com.apple.CoreML/weights"
_BLOB = "weight.bin"

Copied = Callable[[int], None]


def write_package(
    path: Path, lowered: Lowered, weights: WeightSource, *, overwrite: bool = False, copied: Copied | None = None
) -> None:
    """Write one .mlpackage at `path`, complete or not at all.

    Args:
        path: ends in .mlpackage.
        lowered: from `glassine.convert.program.lower`.
        weights: where the plan's weights come from.
        overwrite: an existing package is replaced once the new one is complete.
        copied: called with the number of bytes written since the last call.

    Raises:
        PackageError: `path` exists, cannot be written, or the disk is too full.
        ConversionError: a weight is not finite, or too large for fp16.
    """
    if path.exists() and not (path / "Manifest.json").is_file():
        raise PackageError(f"{path}: exists and is no model package, so it is not replaced; choose another name")
    with replacing(path, overwrite=overwrite) as fresh:
        check_space(fresh, lowered.plan.file_size + len(lowered.model))
        write_files(fresh, lowered, weights, copied)


def write_files(
    package: Path,
    lowered: Lowered,
    weights: WeightSource,
    copied: Copied | None = None,
    *,
    same_as: Path | None = None,
) -> None:
    """Write the package's files into the folder `package`, which exists and is empty.

    same_as: another package with an equal plan; the two share one weight.bin where the disk has hard links.
    """
    data = package / "Data"
    (data / _WEIGHTS).mkdir(parents=True)
    (data / _MODEL).write_bytes(lowered.model)
    if same_as is None or not _linked(same_as / "Data" / _WEIGHTS / _BLOB, data / _WEIGHTS / _BLOB):
        write_weights(data / _WEIGHTS / _BLOB, lowered.plan, weights, copied)
    (package / "Manifest.json").write_text(_manifest(), encoding="utf-8")


def _linked(existing: Path, link: Path) -> bool:
    try:
        os.link(existing, link)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}:
            raise
        return False  # this disk has none (exFAT): written a second time
    return True


def _manifest() -> str:
    """The package's table of contents; identifiers are random in Apple's tools, derived from the path here."""
    model, weights = (
        str(uuid.uuid5(uuid.NAMESPACE_URL, f"glassine:{name}")).upper() for name in ("model.mlmodel", "weights")
    )
    entries = {
        model: {
            "author": "com.apple.CoreML",
            "description": "CoreML Model Specification",
            "name": "model.mlmodel",
            "path": _MODEL,
        },
        weights: {
            "author": "com.apple.CoreML",
            "description": "CoreML Model Weights",
            "name": "weights",
            "path": _WEIGHTS,
        },
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": model}
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"


def write_weights(path: Path, plan: Plan, weights: WeightSource, copied: Copied | None = None) -> None:
    """Write weight.bin: the blob file that the offsets of `plan` point into.

    Records are independent, so a few threads write them side by side: reading, checking and writing all happen outside
    of the interpreter's lock. A plan that continues an existing file takes its bytes from there; one that adds nothing
    to it is that file. What is lost by weights that are stored in fewer bits is noted in `plan.losses`.
    """
    before = 0
    if plan.onto is not None:
        if not plan.records:
            link_or_copy(plan.onto, path)
            return
        clone_or_copy(plan.onto, path)
        with plan.onto.open("rb") as existing:
            (before,) = struct.unpack("<I", existing.read(4))
    with path.open("xb" if plan.onto is None else "r+b", buffering=0) as file, ThreadPoolExecutor(_WRITERS) as pool:
        out = file.fileno()
        os.ftruncate(out, plan.file_size)
        write_all(out, struct.pack("<II7Q", before + len(plan.records), 2, *[0] * 7), 0)
        jobs = [pool.submit(_write_records, out, records, plan, weights) for records in _in_source_order(plan, weights)]
        try:
            for job in jobs:
                count = job.result()
                if copied is not None:
                    copied(count)
        except BaseException:  # Ctrl-C too: nothing more is written
            for job in jobs:
                job.cancel()
            raise


def _write_records(out: int, records: list[Record], plan: Plan, weights: WeightSource) -> int:
    """Write one record, or those that one weight is stored in; return their bytes."""
    content = records[0].content
    if isinstance(content, Encoded):
        encoding = encode(read_half(content.weight, content.shape, weights), content.form)
        plan.losses[content.weight.name] = encoding.loss
    for record in records:
        write_all(out, _metadata(record), record.offset)
        if isinstance(record.content, Encoded):
            at = record.data_offset
            for piece in encoding.items[record.content.item]:
                write_all(out, piece.data, at)
                at += len(piece)
            continue
        for data, position in _content(record, weights):
            write_all(out, data, record.data_offset + position)
    return sum(record.nbytes for record in records)


def read_half(weight: Weight, shape: tuple[int, ...], weights: WeightSource) -> NDArray[np.float16]:
    """Return the whole weight in fp16 and in the program's shape, as a plain record holds it.

    Raises:
        ConversionError: it is not finite, or too large for fp16.
    """
    half = np.empty(shape, np.float16)
    flat = half.reshape(-1).view(np.uint8)
    for data, position in _content(Record(0, shape, "float16", weight), weights):
        flat[position : position + len(data)] = data
    return half


def _metadata(record: Record) -> bytes:
    filled_up = 8 * record.nbytes - record.bits
    return struct.pack(
        "<IIQQQ4Q", 0xDEADBEEF, BLOB_DTYPES[record.dtype], record.nbytes, record.data_offset, filled_up, *[0] * 4
    )


def read_records(path: Path) -> list[Record]:
    """List the records of a weight.bin, in their order; what they hold is not read, their shapes are flat.

    Raises:
        PackageError: the file is not one, or damaged.
    """
    dtypes = {number: dtype for dtype, number in BLOB_DTYPES.items()}
    records: list[Record] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        (count,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
        at = ALIGNMENT
        while len(records) < count:
            file.seek(at)
            magic, number, nbytes, start = struct.unpack("<IIQQ", file.read(24).ljust(24, b"\0"))
            if magic != 0xDEADBEEF or number not in dtypes or start != at + ALIGNMENT or start + nbytes > size:
                raise PackageError(f"{path}: damaged at byte {at}: no record of weights; convert the model again")
            records.append(Record(at, (8 * nbytes // bits_of(dtypes[number]),), dtypes[number], b""))
            at = -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT
    return records


def _in_source_order(plan: Plan, weights: WeightSource) -> list[list[Record]]:
    """Records in the order their bytes lie in the source: a cold disk is read from front to back.

    Those that one weight is stored in are together, so that it is read once.
    """

    def place(records: list[Record]) -> tuple[str, int]:
        content = records[0].content
        weight = content.weight if isinstance(content, Encoded) else content
        span = weights.span(weight.name) if isinstance(weight, Weight) else None
        return (str(span.path), span.offset) if span is not None else ("", records[0].offset)

    groups: dict[object, list[Record]] = {}
    for record in plan.records:
        content = record.content
        key = (content.weight, content.shape, content.form) if isinstance(content, Encoded) else record.offset
        groups.setdefault(key, []).append(record)
    return sorted(groups.values(), key=place)


def _content(record: Record, weights: WeightSource) -> Iterator[tuple[memoryview, int]]:
    """The record's bytes in pieces, each with its position in the record."""
    if isinstance(record.content, bytes):
        yield memoryview(record.content), 0
        return
    assert isinstance(record.content, Weight)
    weight = record.content
    span = weights.span(weight.name)
    if span is not None and span.dtype == record.dtype and weight.scale == 1.0:
        yield from _copied(record, span, weights)
    else:
        yield from _computed(record, weight, weights)


def _copied(record: Record, span: Span, weights: WeightSource) -> Iterator[tuple[memoryview, int]]:
    buffer = memoryview(bytearray(min(_CHUNK, span.nbytes)))
    with open_weights(span.path) as read:
        for position in range(0, span.nbytes, _CHUNK):
            piece = buffer[: min(_CHUNK, span.nbytes - position)]
            read(piece, span.offset + position)
            values = np.frombuffer(piece, dtype=record.dtype)
            if not all_finite(values):
                _explain(record, weights, values, values, position // values.itemsize)
            yield piece, position


def _computed(record: Record, weight: Weight, weights: WeightSource) -> Iterator[tuple[memoryview, int]]:
    size = np.dtype(record.dtype).itemsize
    step = _CHUNK // size
    count = record.nbytes // size
    for start in range(0, count, step):
        stored = weights.read(weight.name, start, min(start + step, count))
        with np.errstate(over="ignore", invalid="ignore"):
            values = cast(np.ascontiguousarray(stored), record.dtype, weight.scale)
        if not all_finite(values):
            _explain(record, weights, stored, values, start)
        yield values.view(np.uint8).data, start * size


def _explain(
    record: Record, weights: WeightSource, stored: NDArray[np.generic], values: NDArray[np.generic], start: int
) -> None:
    """Raise for the first element of `values` that is not finite."""
    assert isinstance(record.content, Weight)
    name = record.content.name
    first = int(np.flatnonzero(~np.isfinite(values))[0])
    shape = weights.shapes[name]
    index = tuple(int(i) for i in np.unravel_index(start + first, shape))
    source = float(stored[first])
    if np.isfinite(source):
        scale = f" x {record.content.scale}" if record.content.scale != 1.0 else ""
        raise ConversionError(
            f"{weights.origin(name)}: the value {source:g}{scale} at {index} is outside the range of "
            f"{record.dtype} (+-65504); use an fp16-safe version of this model"
        )
    raise ConversionError(
        f"{weights.origin(name)}: the value at {index} is {source}; the file is damaged or its training diverged, "
        "use another copy"
    )


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        PackageError: fewer than `needed` bytes (and a little) are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + (16 << 20):
        raise PackageError(
            f"{folder.parent}: {needed / 1e9:.2f} GB are needed here and {free / 1e9:.2f} GB are free; "
            "make room or choose another disk"
        )


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder beside `path` that becomes `path` when the block ends, and vanishes when it fails.

    An existing `path` stays as it is until then. The folder is locked while it is written: a second conversion to the
    same place is refused, and what a killed one left behind is recognised by its free lock and removed.

    Raises:
        PackageError: `path` exists and `overwrite` is False, it cannot be written, the disk became full, or another
            conversion to it is running.
    """
    path = path.resolve()
    if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PackageError(f"{path}: exists; choose another name or pass --overwrite to replace it")
    fresh = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.replaced")
    try:
        with _locked(fresh, path):
            if old.exists() and not path.exists():
                old.rename(path)  # killed between the two renames of _swap
            _empty(fresh)
            try:
                yield fresh
                _swap(fresh, path, old)
            except BaseException:  # Ctrl-C too
                shutil.rmtree(fresh, ignore_errors=True)
                raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename is not None else ""
        raise PackageError(f"{path}: cannot be written: {error.strerror}{where}; nothing was changed") from error


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Make `folder` and hold its lock, which ends with the process however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())
        except BlockingIOError:
            alone = False
        if not alone:  # another holds the lock, or has just renamed the folder to its final name
            raise PackageError(f"{target}: another conversion is writing here; wait for it or choose another name")
        yield
    finally:
        os.close(lock)


def _swap(fresh: Path, path: Path, old: Path) -> None:
    """Rename `fresh` to `path`; what was there is deleted after that, or put back if it fails."""
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        fresh.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
