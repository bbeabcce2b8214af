"""The file: what is written is read back, the schema is JSON Schema's own, and whatever is damaged is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from glassine.errors import RequestError
from glassine.runtime.bench.report import Report, check_writable, mismatch, schema, write_text

WRONG: tuple[Any, ...] = (None, True, -1, 0.5, "x", [], {"x": 1})


@pytest.fixture(scope="module")
def raw(reports) -> dict[str, Any]:
    return json.loads(reports.report().text())


@pytest.fixture(scope="module")
def small(reports) -> dict[str, Any]:
    """A report with one of everything."""
    part = {**json.loads(reports.report().text())["parts"][0]}
    part["figures"] = [json.loads(json.dumps(dataclasses.asdict(reports.figures("gpu", 0.4))))]
    made = json.loads(reports.report(parts=()).text())
    return {**made, "parts": [part], "pictures": {**made["pictures"], "figures": made["pictures"]["figures"][:1]}}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of lists the first and the last entry."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, below in value.items():
            yield from places(below, (*path, key))
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from places(value[index], (*path, index))


def changed(raw: dict[str, Any], path: tuple[Any, ...], change: Any) -> dict[str, Any]:
    made = copy.deepcopy(raw)
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return made


def test_a_report_is_read_back_whole(reports, tmp_path):
    report = reports.report()
    write_text(tmp_path / "a.json", report.text())
    assert Report.read(tmp_path / "a.json") == report
    nothing = reports.report(pictures=None, parts=(), batching=(), notes=())
    write_text(tmp_path / "a.json", nothing.text())
    assert Report.read(tmp_path / "a.json") == nothing
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_schema_is_a_schema_and_holds_the_report(raw):
    Draft202012Validator.check_schema(schema())
    Draft202012Validator(schema()).validate(raw)


def test_every_object_of_the_schema_is_closed_or_a_map():
    def closed(one: Any) -> Iterator[bool]:
        if isinstance(one, dict):
            if one.get("type") == "object":
                yield "additionalProperties" in one
                yield set(one.get("required", ())) == set(one.get("properties", ()))
            for below in one.values():
                yield from closed(below)
        elif isinstance(one, list):
            for below in one:
                yield from closed(below)

    assert all(closed(schema()))


def test_what_is_read_is_what_json_schema_allows(small):
    """Every field taken away, doubled under another name, and replaced by values of every type."""
    whole = schema()
    judge = Draft202012Validator(whole)
    refused = 0
    for path in places(small):
        broken = [
            changed(small, path, lambda holder, key, value=value: holder.__setitem__(key, value)) for value in WRONG
        ]
        broken.append(changed(small, path, lambda holder, key: holder.pop(key)))
        if isinstance(path[-1], str):
            broken.append(changed(small, path, lambda holder, key: holder.__setitem__(f"{key}_", holder[key])))
        for one in broken:
            said = mismatch(one, whole, whole)
            assert (said is None) == judge.is_valid(one), (path, said)
            refused += said is not None
    assert refused > 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100000, "cannot be read"),
        ("[]", "not a file of 'glassine bench --json'"),
        ('{"format": "else"}', "not a file of 'glassine bench --json'"),
        ('{"format": "glassine-bench", "format_version": 2}', "format_version 2, this Glassine reads 1"),
        ('{"format": "glassine-bench", "format_version": 1}', "damaged: the file has no glassine, started"),
    ],
)
def test_files_that_are_no_reports_are_refused(text, said, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=said):
        Report.read(path)
    with pytest.raises(RequestError, match="cannot be read"):
        Report.read(tmp_path / "nothing.json")


def test_damage_is_said_with_its_place(raw, tmp_path):
    path = tmp_path / "a.json"
    broken = changed(raw, ("parts", 0, "figures", 1, "median"), lambda holder, key: holder.__setitem__(key, "fast"))
    path.write_text(json.dumps(broken))
    with pytest.raises(
        RequestError, match=r'parts\[0\]\.figures\[1\]\.median is "fast", expected number; measure again'
    ):
        Report.read(path)
    few = changed(raw, ("parts", 0, "figures", 0, "samples"), lambda holder, key: holder.__setitem__(key, [0.1] * 9))
    path.write_text(json.dumps(few))
    with pytest.raises(RequestError, match=r"figures\[0\]\.samples has 9 entries, expected 10 or more"):
        Report.read(path)
    path.write_text(json.dumps(raw).replace("300.5", "NaN"))
    with pytest.raises(RequestError, match="NaN is no number"):
        Report.read(path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    check_writable(tmp_path / "a.json", overwrite=False)
    for path in (tmp_path, tmp_path / "nothing" / "a.json"):
        with pytest.raises(RequestError, match="cannot be written"):
            check_writable(path, overwrite=False)
        with pytest.raises(RequestError, match="cannot be written"):
            write_text(path, "{}")
    assert list(tmp_path.iterdir()) == []
