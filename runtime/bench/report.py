"""What a benchmark found, as the file it is kept in: schema.json describes it, and decides what is read.

Report -> JSON            written whole or not at all
JSON -> schema -> Report  an unknown version, a missing or wrong field is an error that says where
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from glassine.errors import RequestError
from glassine.runtime.bench.statistics import drift, quartiles, warnings
from glassine.runtime.bench.timing import Timing

FORMAT = "glassine-bench"
FORMAT_VERSION = 1
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured of one contender; seconds and bytes.

    asked: the units, or the portable engine's device. engine, device, precision: what really ran. samples: in the
    order of time, each begun at `at` since the benchmark's start. low, high: quartiles. drift: how much slower the
    second half was. stages: medians of a picture's. images_per_minute: of pictures. placement: shares of the cost by
    Core ML's plan. roof: share of what the chip could do. energy: by powermetrics. quality: beside the portable engine
    in float32.
    """

    asked: str
    engine: str
    device: str
    precision: str
    cold_load: float | None
    warm_load: float
    first: float
    samples: tuple[float, ...]
    at: tuple[float, ...]
    median: float
    low: float
    high: float
    drift: float
    peak_bytes: int
    base_bytes: int
    memory: str
    stages: Mapping[str, float] = field(default_factory=dict)
    images_per_minute: float | None = None
    placement: Mapping[str, float] | None = None
    roof: Json | None = None
    energy: Json | None = None
    quality: Json | None = None
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, asked: str, timing: Timing, *, started: float, **more: Any) -> Figures:
        """Summarise a timing; `started` is when the benchmark began, on the same clock."""
        low, high = quartiles(timing.samples)
        return cls(
            asked=asked,
            engine=timing.realised.engine,
            device=timing.realised.device,
            precision=timing.realised.precision,
            cold_load=timing.cold_load,
            warm_load=timing.warm_load,
            first=timing.first,
            samples=timing.samples,
            at=tuple(at - started for at in timing.at),
            median=timing.median,
            low=low,
            high=high,
            drift=drift(timing.samples),
            peak_bytes=timing.peak_bytes,
            base_bytes=timing.base_bytes,
            memory=timing.memory,
            placement=timing.placement,
            notices=timing.notices,
            warnings=warnings(timing.samples),
            **more,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One part of a model, or its whole pictures: the contenders' figures, those that failed, and their order.

    role: of the part, or "picture". about: what it is, its packages, rows, forms, work; steps of a picture.
    failures: what was asked -> why there are no figures.
    """

    role: str
    about: Json
    order: str
    figures: tuple[Figures, ...]
    failures: Mapping[str, str]

    def of(self, asked: str) -> Figures | None:
        """The figures of one contender, if there are any."""
        return next((one for one in self.figures if one.asked == asked), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the benchmark; schema.json says what is in its objects."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    glassine: str
    started: str
    seconds: float
    settings: Json
    machine: Json
    model: Json
    parts: tuple[Measured, ...]
    pictures: Measured | None
    batching: tuple[Json, ...] = ()
    notes: tuple[str, ...] = ()

    def measured(self) -> tuple[Measured, ...]:
        """The parts, and the pictures last."""
        return self.parts if self.pictures is None else (*self.parts, self.pictures)

    def text(self) -> str:
        """The report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report.

        Raises:
            RequestError: it cannot be read, is no report, or of a version that this Glassine does not know.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(
                f"{path}: cannot be read ({error}); expected a file of 'glassine bench --json'"
            ) from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise RequestError(f"{path}: not a file of 'glassine bench --json'")
        if raw.get("format_version") != FORMAT_VERSION:
            raise RequestError(
                f"{path}: format_version {raw.get('format_version')}, this Glassine reads {FORMAT_VERSION}; "
                "measure again, or take the Glassine that wrote it"
            )
        whole = schema()
        wrong = mismatch(raw, whole, whole)
        if wrong is not None:
            raise RequestError(f"{path}: damaged: {wrong}; measure again")
        return cls(
            **{
                **raw,
                "parts": tuple(map(_measured, raw["parts"])),
                "pictures": None if raw["pictures"] is None else _measured(raw["pictures"]),
                "batching": tuple(raw["batching"]),
                "notes": tuple(raw["notes"]),
            }
        )


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that could not be written, before anything is measured.

    Raises:
        RequestError: it is a folder, or in one that is not there or may not be written; or it is there already.
    """
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RequestError(f"{path}: cannot be written; choose a file in a folder that is there and yours")
    if path.exists() and not overwrite:
        raise RequestError(f"{path}: exists; choose another name or pass --overwrite to replace it")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place at the end; if that fails, nothing is left.

    Raises:
        RequestError: it cannot be written there.
    """
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        RequestError: it cannot be written there.
    """
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def schema() -> Json:
    """The JSON Schema (draft 2020-12) of a report."""
    text = resources.files("glassine.runtime.bench").joinpath("schema.json").read_text(encoding="utf-8")
    found: Json = json.loads(text)
    return found


def mismatch(value: object, expected: Json, whole: Json, where: str = "") -> str | None:
    """Say where and how a value breaks a schema, or None. Knows what schema.json uses of JSON Schema, and no more.

    Args:
        expected: the schema of this value. whole: the schema that its references point into.
    """
    if "$ref" in expected:
        return mismatch(value, whole["$defs"][expected["$ref"].rpartition("/")[2]], whole, where)
    if "anyOf" in expected:
        wrong = [mismatch(value, one, whole, where) for one in expected["anyOf"]]
        return None if None in wrong else wrong[0]
    at = where if where else "the file"
    kinds = expected.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{at} is {_shown(value)}, expected {' or '.join(kinds)}"
    if "const" in expected and (value != expected["const"] or isinstance(value, bool)):
        return f"{at} is {_shown(value)}, expected {expected['const']!r}"
    if isinstance(value, int | float) and value < expected.get("minimum", -math.inf):
        return f"{at} is {value}, expected {expected['minimum']} or more"
    if isinstance(value, list):
        return _list_mismatch(value, expected, whole, where)
    return _object_mismatch(value, expected, whole, where) if isinstance(value, dict) else None


def _list_mismatch(value: list[Any], expected: Json, whole: Json, where: str) -> str | None:
    if len(value) < expected.get("minItems", 0):
        return f"{where} has {len(value)} entries, expected {expected['minItems']} or more"
    found = (mismatch(one, expected.get("items", {}), whole, f"{where}[{index}]") for index, one in enumerate(value))
    return next((wrong for wrong in found if wrong is not None), None)


def _object_mismatch(value: Json, expected: Json, whole: Json, where: str) -> str | None:
    known, others = expected.get("properties", {}), expected.get("additionalProperties", {})
    missing = [name for name in expected.get("required", []) if name not in value]
    if missing:
        return f"{where if where else 'the file'} has no {', '.join(missing)}"
    for name, one in value.items():
        below = known.get(name, others)
        path = f"{where}.{name}" if where else name
        wrong = f"{path} is not known" if below is False else mismatch(one, below, whole, path)
        if wrong is not None:
            return wrong
    return None


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds: dict[str, bool] = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "number": isinstance(value, int | float),
        "integer": whole,
        "null": value is None,
    }
    return kinds.get(kind, False)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _measured(raw: Json) -> Measured:
    return Measured(**{**raw, "figures": tuple(map(_figures, raw["figures"]))})


def _figures(raw: Json) -> Figures:
    fields: Json = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return Figures(**fields)
