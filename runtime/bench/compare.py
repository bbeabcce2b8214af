"""Several reports, held against the first: are they comparable, and is one faster, with what certainty."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glassine.errors import RequestError
from glassine.runtime.bench.report import Figures, Measured, Report
from glassine.runtime.bench.statistics import Ratio, ratio_of_medians

_MUST = (  # what has to be the same: where it stands, and its name
    ("model", "digest", "the weights"),
    ("settings", "width", "the width"),
    ("settings", "height", "the height"),
)
_MAY = (  # what may differ, and is said
    ("machine", "chip", "chip"),
    ("machine", "system", "system"),
    ("machine", "python", "Python"),
    ("settings", "engine", "engine"),
    ("settings", "precision", "precision"),
    ("settings", "warmup", "warm-up calls"),
    ("model", "batch", "batch"),
    ("model", "tokens", "tokens"),
)
_FORMS = ("rows", "attention", "palette", "precision")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was timed: the first file's median, and every other file's ratio to it; None was not measured."""

    name: str
    base: float
    ratios: tuple[Ratio | None, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """The rows, the files' names in their order, and what differs between them."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]


def compare(reports: Sequence[Report], names: Sequence[str]) -> Compared:
    """Hold reports against the first: times of the same part on the same units, and of whole pictures.

    A ratio is another file's median time over the first one's: below 1 is faster.

    Raises:
        RequestError: the files are of other weights or sizes, or have nothing in common.
    """
    base, others = reports[0], reports[1:]
    for other, name in zip(others, names[1:], strict=True):
        different = [
            f"{words} ({_short(getattr(base, place)[key])} and {_short(getattr(other, place)[key])})"
            for place, key, words in _MUST
            if getattr(base, place)[key] != getattr(other, place)[key]
        ]
        if different:
            raise RequestError(f"{names[0]} and {name} cannot be compared: they differ in {', '.join(different)}")
    rows = []
    for measured in base.measured():
        for one in measured.figures:
            ratios = tuple(_ratio(other, measured, one) for other in others)
            if any(ratio is not None for ratio in ratios):
                rows.append(Row(f"{measured.role} on {one.asked}", one.median, ratios))
    if not rows:
        raise RequestError(f"{', '.join(names)}: nothing in them was measured on the same units; measure again alike")
    remarks = [remark for other, name in zip(others, names[1:], strict=True) for remark in _remarks(base, other, name)]
    remarks += [remark for report, name in zip(reports, names, strict=True) for remark in _doubts(report, name)]
    return Compared(tuple(names), tuple(rows), tuple(remarks))


def as_json(compared: Compared) -> str:
    """The comparison as one JSON object."""
    rows = [
        {
            "name": row.name,
            "median": row.base,
            "ratios": [
                None if one is None else {**dataclasses.asdict(one), "differs": one.differs} for one in row.ratios
            ],
        }
        for row in compared.rows
    ]
    return json.dumps({"files": compared.names, "rows": rows, "remarks": compared.remarks}, indent=1) + "\n"


def _ratio(other: Report, measured: Measured, one: Figures) -> Ratio | None:
    """Another file's time of the same thing over this one's; None: it has none, or its pictures have other steps."""
    theirs = next((found for found in other.measured() if found.role == measured.role), None)
    figures = None if theirs is None else theirs.of(one.asked)
    if theirs is None or figures is None or theirs.about.get("steps") != measured.about.get("steps"):
        return None
    return ratio_of_medians(figures.samples, one.samples)


def _remarks(base: Report, other: Report, name: str) -> Iterator[str]:
    """What differs besides the times."""
    for place, key, words in _MAY:
        ours, theirs = getattr(base, place)[key], getattr(other, place)[key]
        if ours != theirs:
            yield f"{name}: another {words}: {theirs} instead of {ours}"
    if base.glassine != other.glassine:
        yield f"{name}: measured with Glassine {other.glassine} instead of {base.glassine}"
    versions = (base.machine["versions"], other.machine["versions"])
    for library in sorted(set(versions[0]) | set(versions[1])):
        if versions[0].get(library) != versions[1].get(library):
            yield f"{name}: {library} {versions[1].get(library)} instead of {versions[0].get(library)}"
    theirs = {found.role: found for found in other.measured()}
    for measured in base.measured():
        found = theirs.get(measured.role)
        if found is None:
            yield f"{name}: has no {measured.role}"
            continue
        if found.about.get("steps") != measured.about.get("steps"):
            yield f"{name}: pictures of {found.about['steps']} steps instead of {measured.about['steps']}: left out"
        for form in _FORMS:
            if found.about.get(form) != measured.about.get(form):
                yield f"{name}: {measured.role} has {form} {found.about[form]} instead of {measured.about[form]}"
        for one in measured.figures:
            same = found.of(one.asked)
            if same is not None and same.device != one.device:
                yield f"{name}: {measured.role} asked for {one.asked} ran on {same.device} instead of {one.device}"


def _doubts(report: Report, name: str) -> Iterator[str]:
    """The series of a file that it calls doubtful itself."""
    doubtful = [f"{found.role} on {one.asked}" for found in report.measured() for one in found.figures if one.warnings]
    if doubtful:
        yield f"{name}: doubtful in itself: {', '.join(doubtful)}"


def _short(value: Any) -> str:
    return str(value)[:12]
