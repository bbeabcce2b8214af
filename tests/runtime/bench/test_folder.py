"""What the benchmark says of its own figures: pictures beside parts, numbers as words."""

from __future__ import annotations

import dataclasses

import pytest

from glassine.runtime.bench.folder import disagreements
from glassine.runtime.bench.words import seconds, three


@pytest.mark.parametrize(
    ("rows", "alone", "picture", "said"),
    [
        (2, 0.2, 4.5, False),  # 20 steps in nine tenths of it: 203 ms
        (2, 0.2, 7.5, True),  # 338 ms
        (2, 0.2, 2.5, True),  # 113 ms
        (1, 0.1, 4.5, False),  # two calls a step
        (1, 0.2, 4.5, False),  # one: no guidance
        (1, 0.05, 4.5, True),
        (2, 0.001, 0.45, False),  # the loop's own 20 ms
    ],
)
def test_parts_and_pictures_are_held_against_one_another(reports, rows, alone, picture, said):
    report = reports.report()
    unet = dataclasses.replace(
        report.parts[0], about={**report.parts[0].about, "rows": rows}, figures=(reports.figures("ane", alone),)
    )
    pictures = dataclasses.replace(report.pictures, figures=(reports.figures("ane", picture, picture=True),))
    found = list(disagreements((unet,), pictures))
    assert [words.startswith("pictures and parts disagree on ane: a step took") for words in found] == [True] * said
    assert list(disagreements((unet,), dataclasses.replace(pictures, figures=()))) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"), (0.00012345, "0.000123"), (0.0123, "0.0123"), (0.9996, "1.00"), (9.999, "10.0"), (1.5, "1.50"),
        (99.96, "100"), (199.4, "199"), (1523.4, "1,523"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_three_digits(value, words):
    assert three(value) == words


def test_seconds():
    assert [seconds(value) for value in (0.0061, 0.9994, 0.9996, 1.523, 62.34)] == [
        "6.10 ms", "999 ms", "1.00 s", "1.52 s", "62.3 s",
    ]  # fmt: skip
