"""Programs that have been written before, kept in the user's cache folder.

Most checkpoints are one of a few architectures, and a program holds no weight: what was written for one serves all of
them. A conversion whose programs are all known needs neither a graph nor coremltools, which is most of its time.

ROOT/KEY    what became of one network at one size; zlib, which notices damage. The ones used last are kept.

KEY is the sha256 of all that decides the program: the network's description, form and size, the plan it continues,
the code of this package, and the versions of what it uses. The title and the author of a model are no part of it
(`program.described`).
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from glassine.convert.program import Lowered, Plan, Record, Requests, Weight

_MOST = 100 << 20  # bytes
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class Written:
    """What a network asked for, its program, and the programs it is cut into: itself, where it is not."""

    asked: Mapping[str, tuple[int, ...]]
    whole: Lowered
    pieces: list[Lowered]


def root() -> Path:
    """The folder: in GLASSINE_CACHE, or where the system keeps caches."""
    given = os.environ.get("GLASSINE_CACHE")
    return (Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("glassine"))) / "graphs"


def key_of(write: Callable[..., object], plan: Plan, *further: object) -> str | None:
    """Return the key of a program; None where what decides it is not all plain data.

    Args:
        write: a function of this package, or a `partial` of one.
        plan: that the program continues.
        further: what else decides it.
    """
    bound = write if isinstance(write, functools.partial) else functools.partial(write)
    if not all(map(_is_plain, (*bound.args, *bound.keywords.items(), *further))):
        return None
    decides = (_code(), bound.func.__module__, bound.func.__qualname__, bound.args, bound.keywords, plan.state, further)
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def _is_plain(value: object) -> bool:
    """Whether `repr` says all of a value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.items()))
    return isinstance(value, _PLAIN)


@functools.cache
def _code() -> str:
    """A digest of what writes programs: this package's code, and the versions of what it uses."""
    digest = hashlib.sha256(f"coremltools {version('coremltools')}, numpy {np.__version__}".encode())
    for folder in ("models", "convert"):
        for path in sorted((Path(__file__).parents[1] / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def recalled(key: str, plan: Plan) -> Written | None:
    """Return what is kept under `key`, placed in `plan`; None: nothing is, or it is damaged."""
    path = root() / key
    try:
        raw = json.loads(zlib.decompress(path.read_bytes()))
        os.utime(path)
    except (OSError, ValueError, zlib.error):
        return None
    _place(raw["records"], plan)
    whole = replace(_lowered(raw["whole"]), plan=plan)
    pieces = [whole]
    if raw["pieces"]:
        pieces = [_lowered(piece) for piece in raw["pieces"]]
        for piece, described in zip(pieces, raw["pieces"], strict=True):
            _place(described["records"], piece.plan)
    return Written({name: tuple(shape) for name, shape in raw["asked"].items()}, whole, pieces)


def keep(key: str, written: Written, records: list[Record]) -> None:
    """Keep what was written under `key`; `records` are those that it added to the plan.

    A folder that cannot be written costs the next conversion its time, and nothing else.
    """
    pieces = [] if written.pieces[0] is written.whole else written.pieces
    raw = {
        "asked": written.asked,
        "records": [_described(record) for record in records],
        "whole": _raw(replace(written.whole, model=b"") if pieces else written.whole),
        "pieces": [{**_raw(piece), "records": [_described(r) for r in piece.plan.records]} for piece in pieces],
    }
    with suppress(OSError):
        folder = root()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
            try:
                file.write(zlib.compress(json.dumps(raw).encode(), 1))
                os.replace(file.name, folder / key)
            except BaseException:
                Path(file.name).unlink()
                raise
        _forget(_MOST)


def _raw(lowered: Lowered) -> dict[str, Any]:
    model = base64.b64encode(lowered.model).decode()
    return {name: getattr(lowered, name) for name in ("inputs", "outputs", "parameters")} | {"model": model}


def _lowered(raw: Mapping[str, Any]) -> Lowered:
    sides = {side: {n: (tuple(shape), d) for n, (shape, d) in raw[side].items()} for side in ("inputs", "outputs")}
    model = base64.b64decode(raw["model"])
    return Lowered(
        model=model, plan=Plan(), parameters=raw["parameters"], inputs=sides["inputs"], outputs=sides["outputs"]
    )


def _described(record: Record) -> list[Any]:
    if isinstance(record.content, bytes):
        return [base64.b64encode(record.content).decode(), record.shape, record.dtype]
    assert isinstance(record.content, Weight)  # nothing is kept of programs with palettes, which take longer
    return [dataclasses.astuple(record.content), record.shape, record.dtype]


def _place(records: list[Any], plan: Plan) -> None:
    """Place the records in a plan, as they were when they were new to it."""
    for what, shape, dtype in records:
        if isinstance(what, str):
            plan.place(base64.b64decode(what), tuple(shape), dtype)
        else:
            name, own, scale, stored = what
            plan.place(Weight(name, tuple(own), scale, stored), tuple(shape), dtype)


def replay(written: Written, requests: Requests) -> None:
    """Ask for what the network asked for, so that `requests` can say what is missing."""
    for name, shape in written.asked.items():
        requests(name, shape)


def ask(write: Callable[[Requests, Any], object], requests: Requests, size: tuple[int, int]) -> None:
    """Let a network ask for its weights, and write no program."""
    key = key_of(write, Plan(), "asked", size)
    written = None if key is None else recalled(key, Plan())
    if written is not None:
        replay(written, requests)
        return
    write(requests, size)
    if key is not None:
        nothing = Lowered(model=b"", plan=Plan(), inputs={}, outputs={}, parameters=0)
        keep(key, Written(requests.asked, nothing, [nothing]), [])


def kept() -> tuple[int, int]:
    """Return how many there are, and their bytes."""
    sizes = [path.stat().st_size for path in _entries()]
    return len(sizes), sum(sizes)


def clear() -> None:
    """Remove all of them.

    Raises:
        OSError: the folder cannot be written.
    """
    _forget(0)


def _entries() -> list[Path]:
    """The entries, the one used last first; one that another process has just removed is left out."""
    used = []
    for path in root().glob("*"):
        with suppress(FileNotFoundError):
            used.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(used, reverse=True)]


def _forget(most: int) -> None:
    """Remove those that were used longest ago, until `most` bytes are left."""
    total = 0
    for path in _entries():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
            if total > most:
                path.unlink()
