"""Charts: what is drawn is what was measured; and what is said where none can be drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from glassine.errors import MissingDependency, RequestError
from glassine.runtime.bench.chart import check_charts, draw


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from here on."""
    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (kept.append(self), save(self, *args, **more))[1]
    )
    return kept


def test_the_marks_are_the_figures(reports, drawn, tmp_path):
    report = reports.report()
    draw(report, tmp_path / "a.png")
    pictures, parts = drawn[0].axes
    assert [bar.get_width() for bar in pictures.patches] == [one.median for one in report.pictures.figures]
    assert pictures.get_xlim()[0] == 0
    dots = [line.get_xdata()[0] for line in parts.lines]
    assert dots == pytest.approx([one.median * 1000 for part in report.parts for one in part.figures])
    assert parts.get_xscale() == "log"
    lines = [c for c in parts.collections if isinstance(c, LineCollection)]
    runs, quartiles = lines[::2], lines[1::2]
    for one, drawn_runs, drawn_quartiles in zip(report.parts[0].figures, runs[:2], quartiles[:2], strict=True):
        assert [path[0][0] for path in drawn_runs.get_segments()] == pytest.approx([1000 * s for s in one.samples])
        ((start, end),) = drawn_quartiles.get_segments()
        assert (start[0], end[0]) == pytest.approx((1000 * one.low, 1000 * one.high))
    words = " ".join(text.get_text() for text in (*drawn[0].texts, *parts.texts, *pictures.texts))
    for said in (
        "boat, 512 x 512",
        "Apple M2 Pro",
        "Neural Engine failed",
        "4.50 s   13.3 a minute",
        "200 ms",
        "10 to 20",
    ):
        assert said in words
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 1920


def test_units_that_did_not_run_are_not_shown_as_if_they_had(reports, drawn, tmp_path):
    elsewhere = reports.figures("ane", 4.0, picture=True, device="cpu_and_gpu")
    report = reports.report()
    pictures = report.pictures.__class__(
        role="picture", about={"steps": 20}, order="alone", figures=(elsewhere,), failures={}
    )
    draw(reports.report(pictures=pictures), tmp_path / "a.svg")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Neural Engine\n(ran on GPU)"]
    assert [line.get_markerfacecolor() for line in axes.lines] == ["white"]


def test_svg_is_the_same_every_time_and_parts_or_pictures_alone_are_drawn(reports, tmp_path):
    for name in ("a.svg", "b.svg"):
        draw(reports.report(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    draw(reports.report(pictures=None), tmp_path / "parts.svg")
    draw(reports.report(parts=()), tmp_path / "pictures.svg")
    assert len({(tmp_path / f"{name}.svg").read_bytes() for name in ("a", "parts", "pictures")}) == 3


def test_what_cannot_be_drawn_is_refused(reports, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"a\.jpg: a chart is a \.png or \.svg file"):
        check_charts([tmp_path / "a.png", tmp_path / "a.jpg"])
    with pytest.raises(RequestError, match="nothing was measured"):
        draw(reports.report(parts=(), pictures=None), tmp_path / "a.png")
    with pytest.raises(RequestError, match=r"a\.png: cannot be written"):
        draw(reports.report(), tmp_path / "nothing" / "a.png")
    assert list(tmp_path.iterdir()) == []
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(MissingDependency, match=r"pip install 'glassine\[chart\]'"):
        draw(reports.report(), Path("a.png"))
