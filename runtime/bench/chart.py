"""A report as one picture, for a post: seconds a picture, and the median of every part, by compute units.

Every timed run is drawn, with the median on it and a line from quartile to quartile. The axis of the parts is
logarithmic, since a text encoder takes a hundredth of a UNet's time; that of the pictures begins at zero.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassine.errors import MissingDependency, RequestError
from glassine.runtime.bench.report import written_whole
from glassine.runtime.bench.settings import SHORT
from glassine.runtime.bench.words import seconds, three

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from glassine.runtime.bench.report import Figures, Measured, Report

ENDINGS = (".png", ".svg")
# Colours that stay apart with every kind of colour blindness (Okabe and Ito 2008).
_COLOURS = {"ane": "#0072B2", "gpu": "#D55E00", "all": "#009E73", "cpu": "#7A7A7A"}
_OTHER = "#CC79A7"
_NAMES = {"ane": "Neural Engine", "gpu": "GPU", "all": "all units", "cpu": "CPU"}
_INK, _FAINT, _GRID, _BAND = "#222222", "#666666", "#E4E4E4", "#F6F6F6"
_WIDTH, _LEFT, _RIGHT = 9.6, 1.75, 0.5  # inches: the chart, and beside its axes
_HEAD, _FOOT, _GAP = 1.62, 1.05, 1.15  # above, below and between the axes
_BAR, _ROW = 0.42, 0.25  # a picture's bar; one contender of a part
_LABEL = 20  # characters on a line of a part's name
_BETWEEN = 0.6  # rows between two parts


def check_charts(paths: Sequence[Path]) -> None:
    """Refuse charts that could not be drawn.

    Raises:
        MissingDependency: matplotlib is not installed. RequestError: a file that is neither PNG nor SVG.
    """
    if paths and importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("charts need matplotlib; install it with: pip install 'glassine[chart]'")
    for path in paths:
        if path.suffix.lower() not in ENDINGS:
            raise RequestError(f"{path}: a chart is a {' or '.join(ENDINGS)} file")


def draw(report: Report, path: Path) -> None:
    """Draw the chart.

    Raises:
        MissingDependency, RequestError: as `check_charts`; or there is nothing to draw, or the file cannot be written.
    """
    check_charts([path])
    if not any(one.figures for one in report.measured()):
        raise RequestError(f"{path}: nothing was measured, so there is nothing to draw")
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[str, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "glassine"}
    with matplotlib.rc_context(style):
        pictures = [report.pictures] if report.pictures is not None else []
        heights = [_BAR * _rows(pictures)] * len(pictures)
        heights += [_ROW * (_rows(report.parts) + _BETWEEN * len(report.parts))] if report.parts else []
        height = _HEAD + sum(heights) + _GAP * (len(heights) - 1) + _FOOT
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        top = height - _HEAD
        width = (_WIDTH - _LEFT - _RIGHT) / _WIDTH
        for index, tall in enumerate(heights):
            axes = figure.add_axes((_LEFT / _WIDTH, (top - tall) / height, width, tall / height))
            if index < len(pictures):
                _draw_pictures(axes, pictures[index])
            else:
                _draw_parts(axes, report.parts)
            top -= tall + _GAP
        _write_words(figure, report, height)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        with written_whole(path) as beside:
            figure.savefig(beside, dpi=200, metadata=metadata)


def _write_words(figure: Figure, report: Report, height: float) -> None:
    """Title, what the colours mean, and the small print."""
    title, under = _titles(report)
    left = 0.3 / _WIDTH
    figure.text(left, 1 - 0.4 / height, title, fontsize=16, fontweight="bold", color=_INK, va="center")
    figure.text(left, 1 - 0.72 / height, under, fontsize=9.5, color=_FAINT, va="center")
    figure.text(left, 0.14 / height, _small_print(report), fontsize=7.5, color=_FAINT, va="bottom", linespacing=1.5)
    at = 0.36
    for asked in report.settings["asked"]:
        core_ml = report.settings["engine"] == "coreml"
        colour = _COLOURS.get(asked, _OTHER) if core_ml else _OTHER
        name = _NAMES.get(asked, asked) if core_ml else f"PyTorch on {asked}"
        figure.text(at / _WIDTH, 1 - 1.03 / height, "\u25cf", fontsize=11, color=colour, va="center")
        figure.text((at + 0.17) / _WIDTH, 1 - 1.03 / height, name, fontsize=9.5, color=_INK, va="center")
        at += 0.45 + 0.085 * len(name)


def _draw_pictures(axes: Axes, pictures: Measured) -> None:
    """Seconds a picture, as bars from zero."""
    labels = []
    for row, one in enumerate(pictures.figures):
        axes.barh(row, one.median, height=0.62, color=_colour(one), alpha=0.28, zorder=2)
        _marks(axes, row, one, 1.0, 0.24)
        rate = 0.0 if one.images_per_minute is None else one.images_per_minute
        text = f"{seconds(one.median)}   {three(rate)} a minute"
        axes.annotate(text, (max(one.samples), row), (9, 0), textcoords="offset points", va="center", fontsize=10,
                      fontweight="bold", color=_INK)  # fmt: skip
        labels.append(_label(one))
    slowest = max((max(one.samples) for one in pictures.figures), default=1.0)
    axes.set_xlim(0, slowest * 1.38)
    labels += [f"{_NAMES.get(asked, asked)}" for asked in pictures.failures]
    for row, _ in enumerate(pictures.failures, len(pictures.figures)):
        axes.text(0, row, " failed", va="center", color=_FAINT)
    _finish(axes, labels, f"A whole picture, {pictures.about['steps']} steps", "seconds; less is better")


def _draw_parts(axes: Axes, parts: Sequence[Measured]) -> None:
    """The parts' medians, on a logarithmic axis: without bars, which would lie on it."""
    row, ticks, labels = 0.0, [], []
    values = [sample * 1000 for part in parts for one in part.figures for sample in one.samples]
    for part in parts:
        begun = row
        for one in part.figures:
            _marks(axes, row, one, 1000.0, 0.3)
            text = f"{seconds(one.median)}{_elsewhere(one, ', ran on {}')}"
            axes.annotate(text, (max(one.samples) * 1000, row), (6, 0), textcoords="offset points", va="center",
                          fontsize=8.5, color=_INK)  # fmt: skip
            row += 1
        for asked in part.failures:
            axes.text(min(values), row, f"{_NAMES.get(asked, asked)} failed", va="center", fontsize=8.5, color=_FAINT)
            row += 1
        ticks.append((begun + row - 1) / 2)
        if len(ticks) % 2:
            axes.axhspan(begun - 0.5 - _BETWEEN / 2, row - 0.5 + _BETWEEN / 2, color=_BAND, zorder=0)
        labels.append(textwrap.fill(part.role.replace(":", ": ").replace("_", " "), _LABEL))
        row += _BETWEEN
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.4, max(values) * 2.2)
    _finish(axes, labels, "One call of every part", "milliseconds, logarithmic; less is better", ticks)
    axes.set_ylim(row - _BETWEEN / 2 - 0.5, -_BETWEEN / 2 - 0.5)


def _marks(axes: Axes, row: float, one: Figures, scale: float, half: float) -> None:
    """Every run as a thin line, quartile to quartile as a thick one, the median as a dot."""
    colour = _colour(one)
    samples = [sample * scale for sample in one.samples]
    axes.vlines(samples, row - half, row + half, color=colour, alpha=0.35, linewidth=0.8, zorder=3)
    axes.hlines(row, one.low * scale, one.high * scale, color=colour, linewidth=3.2, zorder=4)
    face = "white" if _elsewhere(one, "{}") else colour
    axes.plot([one.median * scale], [row], "o", color=colour, markerfacecolor=face, markersize=7, zorder=5)


def _finish(axes: Axes, labels: Sequence[str], title: str, unit: str, ticks: Sequence[float] | None = None) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yticks(range(len(labels)) if ticks is None else ticks, labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_INK, pad=8)
    axes.set_xlabel(unit, fontsize=9, color=_FAINT)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0, labelsize=10, labelcolor=_INK)
    axes.tick_params(axis="x", labelsize=8.5, labelcolor=_FAINT, color=_GRID, which="both")
    axes.grid(axis="x", color=_GRID, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _colour(one: Figures) -> str:
    return _COLOURS.get(one.asked, _OTHER) if one.engine == "coreml" else _OTHER


def _label(one: Figures) -> str:
    name = _NAMES.get(one.asked, one.asked) if one.engine == "coreml" else f"PyTorch, {one.device}"
    return f"{name}{_elsewhere(one, chr(10) + '(ran on {})')}"


def _elsewhere(one: Figures, words: str) -> str:
    """The words with the units that really ran, if they are not those that were asked for."""
    ran = SHORT.get(one.device, one.asked)
    return "" if ran == one.asked else words.format(_NAMES[ran])


def _titles(report: Report) -> tuple[str, str]:
    settings, machine = report.settings, report.machine
    engine = {"coreml": "Core ML", "portable": "Glassine's portable engine (PyTorch), not Core ML"}[settings["engine"]]
    under = f"{machine['chip']} · {machine['system']} · {engine}"
    return f"{report.model['name']}, {settings['width']} x {settings['height']}", under


def _small_print(report: Report) -> str:
    """What the marks mean, how it was measured, and what makes it doubtful."""
    measured = report.measured()
    counts = sorted({len(one.samples) for part in measured for one in part.figures})
    spelled = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    orders = ", ".join(dict.fromkeys(part.order for part in measured if part.order != "alone"))
    doubtful = sum(bool(one.warnings) for part in measured for one in part.figures)
    load = report.machine["before"]["load"]
    lines = [
        f"Dot: median. Thick line: quartile to quartile. Thin lines: every one of {spelled} timed calls. "
        + (f"Contenders: {orders}. A hollow dot ran on other units than those asked for." if orders else ""),
        f"Batch {report.model['batch']}, {report.model['tokens']} tokens. Load average before: {load[0]:.2f}. "
        + (f"{doubtful} series are doubtful (spread or drift). " if doubtful else "")
        + f"Glassine {report.glassine}, {report.started[:10]}.",
    ]
    return "\n".join(lines)


def _rows(measured: Sequence[Measured]) -> int:
    return sum(len(one.figures) + len(one.failures) for one in measured)
