"""What a benchmark found, laid out for reading in 80 columns, with or without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from glassine.runtime.bench.words import seconds, three

if TYPE_CHECKING:
    from rich.table import Table

    from glassine.runtime.bench.compare import Compared, Row
    from glassine.runtime.bench.report import Figures, Measured, Report

WIDTH = 80
_NAME = 19  # columns for the names of parts; longer ones are folded
_SHORT = {"neural_engine": "ANE", "gpu": "GPU", "cpu": "CPU"}


def show(report: Report) -> None:
    """Print the tables of a report, and what there is to say about them."""
    click.echo("\n".join(_heading(report)))
    if report.parts:
        _print(_times(report.parts), _limits(report.parts))
    if report.pictures is not None:
        _print(_pictures(report.pictures), _inside(report.pictures))
    for line in _remarks(report):
        click.echo("\n".join(textwrap.wrap(line, WIDTH, subsequent_indent="  ")))


def show_comparison(compared: Compared) -> None:
    """Print ratios, with what makes the files differ."""
    from rich.markup import escape

    table = _table("", *map(escape, compared.names), numbers=len(compared.names))
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
        table.add_row(f"[bold]{part.role}[/]", "" if work is None else three(work["flops"] / 1e9))
        for one in part.figures:
            roof = one.roof if one.roof is not None else {}
            reached = "?" if roof.get("share") is None else f"{roof['share']:.0%}"
            rates = [three(roof[name]) if name in roof else "?" for name in ("tflops", "gigabytes")]
            table.add_row(f"  {one.asked}", "", *rates, roof.get("bound") or "?", reached, ran_on(one))
    return table


def _pictures(pictures: Measured) -> Table:
    table = _table("", "load", "first", "median (quartiles)", "a minute", "peak", numbers=5)
    table.add_row(f"[bold]a picture, {pictures.about['steps']} steps[/]")
    for one in pictures.figures:
        rate = "" if one.images_per_minute is None else three(one.images_per_minute)
        peak = f"{one.peak_bytes / 1e9:.2f} GB"
        table.add_row(f"  {one.asked}", seconds(one.warm_load), seconds(one.first), spread(one), rate, peak)
    for asked in pictures.failures:
        table.add_row(f"  {asked}", "failed")
    return table


def _inside(pictures: Measured) -> Table:
    """What a picture's time, energy and latents come to."""
    table = _table("", "prepare", "a step", "decode", "energy", "power", "latents", numbers=6)
    table.add_row("[bold]of it[/]")
    for one in pictures.figures:
        stages, energy, judged = one.stages, one.energy, one.quality
        step = stages["denoise"] / max(1.0, stages["evaluations"])
        joules = "-" if energy is None else f"{three(energy['joules_per_picture'])} J"
        watts = "-" if energy is None else f"{three(sum(energy['watts'].values()))} W"
        psnr = "-" if judged is None else "equal" if judged["psnr"] is None else f"{judged['psnr']:.1f} dB"
        times = (seconds(stages["prepare"]), seconds(step), seconds(stages["decode"]))
        table.add_row(f"  {one.asked}", *times, joules, watts, psnr)
    return table


def _remarks(report: Report) -> Iterator[str]:
    """What has to be said beside the figures: failures, other units than those asked for, doubts, sources."""
    for measured in report.measured():
        yield from (f"failed: {reason}" for reason in measured.failures.values())
        for one in measured.figures:
            yield from (f"note: {notice}" for notice in one.notices)
            if one.warnings:
                words = ", and ".join(one.warnings)
                yield f"doubtful: {measured.role} on {one.asked}: {words}; measure again on a quiet, cool machine"
    yield from map(_batched, report.batching)
    roofs = [one.roof for part in report.parts for one in part.figures if one.roof is not None]
    yield from dict.fromkeys(_limit(roof) for roof in roofs if roof["source"] is not None)
    yield from (f"note: {note}" for note in report.notes)


def _limit(roof: Mapping[str, Any]) -> str:
    """What a unit could do at most, and who says so."""
    peaks = ((roof["peak_tflops"], "TFLOP/s"), (roof["peak_gigabytes"], "GB/s"))
    said = ", ".join(f"{three(most)} {unit}" for most, unit in peaks if most is not None)
    return f"limits, {said}: {roof['source']}"


def _batched(found: Mapping[str, Any]) -> str:
    """Whether one call with many rows beats many calls with few."""
    (few, many), (short, long) = found["rows"], found["medians"]
    differs = found["low"] > 1 or found["high"] < 1
    word = f"{found['ratio']:.2f} times as fast a row as" if differs else "not seen to differ, a row, from"
    return (
        f"batch on {found['asked']}: the UNet with {many} rows a call is {word} with {few} "
        f"({found['low']:.2f} to {found['high']:.2f}): {seconds(long)} against {many / few:g} x {seconds(short)}"
    )


def spread(one: Figures) -> str:
    """The median with quartiles, in one unit, and how many samples."""
    unit = 1.0 if seconds(one.median).endswith(" s") else 1000.0
    low, high = three(one.low * unit), three(one.high * unit)
    return f"{seconds(one.median)} ({low}-{high}) n={len(one.samples)}"


def ran_on(one: Figures) -> str:
    """What really ran: the units, and where Core ML's plan puts the cost."""
    from glassine.runtime.bench.settings import SHORT

    device = SHORT.get(one.device, one.device)
    words = [] if device == one.asked else [f"{device}, not {one.asked}:"]
    return " ".join([*words, device if one.placement is None else shares(one.placement)])


def shares(placement: Mapping[str, float]) -> str:
    """The shares of the cost, largest first, those below half a percent left out."""
    there = sorted(placement.items(), key=lambda item: -item[1])
    return " ".join(f"{_SHORT[unit]} {share:.0%}" for unit, share in there if share >= 0.005)


def _table(*columns: str, numbers: int) -> Table:
    """An empty table; the columns behind the first are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(columns[0], max_width=_NAME, overflow="fold")
    for index, column in enumerate(columns[1:]):
        table.add_column(column, justify="right" if index < numbers else "left", no_wrap=index < numbers)
    return table


def _print(*tables: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(WIDTH, console.width) if console.is_terminal else WIDTH
    for table in tables:
        console.print()
        console.print(table)
    console.print()
