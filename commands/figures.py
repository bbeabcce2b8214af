"""What a benchmark found, laid out for reading in 80 columns, with or without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from glassine.runtime.bench.compare import Compared, Row
    from glassine.runtime.bench.report import Figures, Measured, Report

WIDTH = 80
_SHORT = {"neural_engine": "ANE", "gpu": "GPU", "cpu": "CPU"}
_WORDS = {"cpu_and_ne": "ane", "cpu_and_gpu": "gpu", "cpu_only": "cpu", "all": "all"}  # as `--units` says them


def show(report: Report) -> None:
    """Print the tables of a report, and what there is to say about them."""
    click.echo("\n".join(_heading(report)))
    if report.parts:
        _print(_times(report.parts), _limits(report.parts))
    if report.pictures is not None:
        _print(_pictures(report.pictures))
    for line in _remarks(report):
        click.echo("\n".join(textwrap.wrap(line, WIDTH, subsequent_indent="  ")))


def show_comparison(compared: Compared) -> None:
    """Print ratios, with what makes the files differ."""
    table = _table("", compared.names[0], *compared.names[1:], numbers=len(compared.names))
    for row in compared.rows:
        table.add_row(row.name, *_compared(row))
    _print(table)
    for line in compared.remarks:
        click.echo("\n".join(textwrap.wrap(line, WIDTH, subsequent_indent="  ")))


def _compared(row: Row) -> list[str]:
    cells = [seconds(row.base)]
    for ratio in row.ratios:
        if ratio is None:
            cells.append("-")
        else:
            words = f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
            cells.append(words if ratio.differs else f"no difference seen ({ratio.low:.2f} to {ratio.high:.2f})")
    return cells


def _heading(report: Report) -> list[str]:
    settings, machine, model = report.settings, report.machine, report.model
    engine = {"coreml": "Core ML", "portable": f"the portable engine (PyTorch, {settings['precision']})"}
    size = f"{settings['width']}x{settings['height']}"
    lines = [
        f"{model['name']} ({model['family']}), {size}, on {engine[settings['engine']]}",
        f"{machine['chip']}, {machine['system']}, Glassine {report.glassine}",
    ]
    if settings["engine"] == "portable":
        lines.append("This is PyTorch, not Core ML: it says nothing about a Mac's units.")
    return [line for whole in lines for line in textwrap.wrap(whole, WIDTH)]


def _times(parts: Sequence[Measured]) -> Table:
    table = _table("", "cold load", "load", "first", "median (quartiles)", "peak", numbers=5)
    for part in parts:
        table.add_row(f"[bold]{part.role}[/]")
        quickest = min((one.median for one in part.figures), default=0.0)
        for one in part.figures:
            mark = " *" if one.median == quickest and len(part.figures) > 1 else ""
            cold = "-" if one.cold_load is None else seconds(one.cold_load)
            row = (cold, seconds(one.warm_load), seconds(one.first), spread(one), f"{one.peak_bytes / 1e9:.2f} GB")
            table.add_row(f"  {one.asked}{mark}", *row)
        for asked in part.failures:
            table.add_row(f"  {asked}", "failed")
    return table


def _limits(parts: Sequence[Measured]) -> Table:
    table = _table("", "GFLOP", "TFLOP/s", "GB/s", "limit", "reached", "ran on", numbers=5)
    for part in parts:
        work = part.about["work"]
        table.add_row(f"[bold]{part.role}[/]", "" if work is None else f"{work['flops'] / 1e9:,.3g}")
        for one in part.figures:
            roof = one.roof if one.roof is not None else {}
            reached = "?" if roof.get("share") is None else f"{roof['share']:.0%}"
            rates = [f"{roof[name]:.3g}" if name in roof else "?" for name in ("tflops", "gigabytes")]
            table.add_row(f"  {one.asked}", "", *rates, roof.get("bound") or "?", reached, ran_on(one))
    return table


def _pictures(pictures: Measured) -> Table:
    energy = any(one.energy is not None for one in pictures.figures)
    quality = any(one.quality is not None for one in pictures.figures)
    further = [name for name, there in (("energy", energy), ("latents", quality)) if there]
    table = _table("", "load", "first", "a picture (quartiles)", "a minute", "a step", "peak", *further, numbers=9)
    table.add_row(f"[bold]whole pictures, {pictures.about['steps']} steps[/]")
    for one in pictures.figures:
        step = one.stages["denoise"] / max(1.0, one.stages["evaluations"])
        rate = "" if one.images_per_minute is None else f"{one.images_per_minute:.3g}"
        cells = [seconds(one.warm_load), seconds(one.first), spread(one), rate, seconds(step)]
        cells.append(f"{one.peak_bytes / 1e9:.2f} GB")
        if energy:
            cells.append("?" if one.energy is None else f"{one.energy['joules_per_picture']:.3g} J")
        if quality:
            psnr = None if one.quality is None else one.quality["psnr"]
            cells.append("?" if one.quality is None else "equal" if psnr is None else f"{psnr:.1f} dB")
        table.add_row(f"  {one.asked}", *cells)
    for asked in pictures.failures:
        table.add_row(f"  {asked}", "failed")
    return table


def _remarks(report: Report) -> Iterator[str]:
    """What has to be said beside the figures: failures, other units than those asked for, doubts, sources."""
    for measured in report.measured():
        for asked, reason in measured.failures.items():
            yield f"failed: {measured.role} on {asked}: {reason}"
        for one in measured.figures:
            for words in (*one.notices, *one.warnings):
                yield f"note: {measured.role} on {one.asked}: {words}"
    for one in report.batching:
        few, many = one["rows"]
        word = f"{one['ratio']:.2f} times as fast a row as" if one["low"] > 1 or one["high"] < 1 else "no faster than"
        yield (
            f"batch on {one['asked']}: the UNet with {many} rows a call is {word} with {few} "
            f"({one['low']:.2f} to {one['high']:.2f}): {seconds(one['medians'][1])} against {many // few} x "
            f"{seconds(one['medians'][0])}"
        )
    sources = {one.roof["source"] for part in report.parts for one in part.figures if one.roof is not None}
    for source in sorted(source for source in sources if source is not None):
        yield f"limits: {source}"
    yield from (f"note: {note}" for note in report.notes)


def seconds(value: float) -> str:
    """Seconds with three figures, in ms below one."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def spread(one: Figures) -> str:
    """The median with quartiles, in one unit, and how many samples."""
    scale, unit = (1000.0, "ms") if one.median < 1 else (1.0, "s")
    median, low, high = one.median * scale, one.low * scale, one.high * scale
    return f"{median:.3g} {unit} ({low:.3g}-{high:.3g}) n={len(one.samples)}"


def ran_on(one: Figures) -> str:
    """What really ran: the units, and where Core ML's plan puts the cost."""
    device = _WORDS.get(one.device, one.device)
    device = device if device == one.asked else f"{device}, not {one.asked}"
    return device if one.placement is None else f"{device}: {shares(one.placement)}"


def shares(placement: Mapping[str, float]) -> str:
    """The shares of the cost, largest first, those below half a percent left out."""
    there = sorted(placement.items(), key=lambda item: -item[1])
    return " ".join(f"{_SHORT[unit]} {share:.0%}" for unit, share in there if share >= 0.005)


def _table(*columns: str, numbers: int) -> Table:
    """An empty table; the columns behind the first are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if 0 < index <= numbers else "left", no_wrap=index == 0)
    return table


def _print(*tables: Table) -> None:
    from rich.console import Console

    console = Console(file=click.get_text_stream("stdout"), highlight=False)
    for table in tables:
        console.print()
        console.print(table, width=None if console.is_terminal else WIDTH)
    console.print()
