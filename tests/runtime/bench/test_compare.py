"""Comparisons of reports of which the ratios are known."""

from __future__ import annotations

import dataclasses
import json

import pytest

from glassine.errors import RequestError
from glassine.runtime.bench.compare import as_json, compare


def changed(report, place: str, **values):
    return dataclasses.replace(report, **{place: {**getattr(report, place), **values}})


def test_ratios_and_what_differs(reports):
    base, slower = reports.report(), reports.report(1.5)
    compared = compare([base, slower, base], ["a", "b", "c"])
    assert [row.name for row in compared.rows] == [
        "unet on ane", "unet on gpu", "vae_decoder on gpu", "picture on ane", "picture on gpu",
    ]  # fmt: skip
    for row in compared.rows:
        assert row.ratios[0].value == pytest.approx(1.5)
        assert 1.4 < row.ratios[0].low <= 1.5 <= row.ratios[0].high < 1.6
        assert row.ratios[0].differs
        assert not row.ratios[1].differs
    assert compared.remarks == ()
    written = json.loads(as_json(compared))
    assert written["files"] == ["a", "b", "c"]
    assert written["rows"][0]["ratios"][0]["differs"] is True


@pytest.mark.parametrize(
    ("place", "values", "said"),
    [
        ("model", {"digest": "cd" * 32}, "they differ in the weights .abababababab and cdcdcdcdcdcd"),
        ("settings", {"width": 768}, "they differ in the width .512 and 768"),
        ("settings", {"height": 768}, "they differ in the height"),
    ],
)
def test_what_cannot_be_compared_is_refused(reports, place, values, said):
    with pytest.raises(RequestError, match=f"a and b cannot be compared: {said}"):
        compare([reports.report(), changed(reports.report(), place, **values)], ["a", "b"])


def test_nothing_in_common_is_refused(reports):
    with pytest.raises(RequestError, match="nothing in them was measured on the same units"):
        compare([reports.report(), reports.report(parts=(), pictures=None)], ["a", "b"])


def test_other_steps_are_left_out_and_other_circumstances_are_said(reports):
    base = reports.report()
    other = changed(base, "machine", chip="Apple M4", versions={"numpy": "1.26"})
    unet = other.parts[0]
    unet = dataclasses.replace(
        unet,
        about={**unet.about, "attention": "einsum"},
        figures=(reports.figures("ane", 0.2, count=20, device="cpu_and_gpu", warnings=("the quartiles",)),),
    )
    pictures = dataclasses.replace(other.pictures, about={"steps": 30})
    other = dataclasses.replace(other, parts=(unet,), pictures=pictures, glassine="0.3.0")
    compared = compare([base, other], ["a", "b"])
    assert [row.name for row in compared.rows] == ["unet on ane"]
    assert compared.remarks == (
        "b: another chip: Apple M4 instead of Apple M2 Pro",
        "b: measured with Glassine 0.3.0 instead of 0.2.0",
        "b: numpy 1.26 instead of 2.3.5",
        "b: unet has attention einsum instead of split",
        "b: unet asked for ane ran on cpu_and_gpu instead of cpu_and_ne",
        "b: has no vae_decoder",
        "b: pictures of 30 steps instead of 20: left out",
        "b: doubtful in itself: unet on ane",
    )
