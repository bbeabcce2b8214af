"""The verb that measures: how fast a model is on this machine, and whether one measurement differs from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from glassine.commands.options import FILE, FOLDER, model_size, options, overwrite, say

COMPARE = "compare"


what_options = options(
    click.option("--units", default="ane,gpu,all", show_default=True, metavar="ANE,GPU,...",
                 help="Core ML's compute units to measure: some of ane, gpu, cpu, all."),
    click.option("--engine", type=click.Choice(["auto", "coreml", "portable"]), default="auto", show_default=True,
                 help="auto: Core ML on a Mac, PyTorch elsewhere."),
    click.option("--device", help="Device of the portable engine: cpu, cuda, mps.  [default: cpu]"),
    click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
                 help="Of the portable engine."),
    click.option("--part", "parts", multiple=True, metavar="ROLE",
                 help="Time this part alone, such as unet or control:canny; may be repeated.  [default: all]"),
    model_size,
    click.option("--steps", type=click.IntRange(1, 1000), help="Of a whole picture.  [default: the model's, or 20]"),
    click.option("--other-batch", type=FOLDER,
                 help="The same model, converted with another --batch: its UNet takes turns with this one's."),
)  # fmt: skip
how_options = options(
    click.option("--runs", type=click.IntRange(0), default=20, show_default=True, help="Timed calls of every part."),
    click.option("--pictures", type=click.IntRange(0), default=10, show_default=True,
                 help="Timed whole pictures; 0 leaves them out."),
    click.option("--warmup", type=click.IntRange(0), default=3, show_default=True,
                 help="Calls before the timed ones that are not counted."),
    click.option("--no-cold", is_flag=True,
                 help="Do not load with an empty compile cache too, which takes minutes for the Neural Engine."),
    click.option("--energy", is_flag=True,
                 help="Joules a picture, by macOS's powermetrics, which needs root: 'sudo -v' first."),
    click.option("--quality", is_flag=True,
                 help="PSNR of the first picture's latents beside the portable engine in float32; needs PyTorch."),
    click.option("--timeout", type=click.FloatRange(min=1), default=900.0, show_default=True, metavar="SECONDS",
                 help="Silence after which a load or a call is given up."),
)  # fmt: skip
file_options = options(
    click.option("--json", "json_file", metavar="FILE", help="Write all figures there; '-' is stdout."),
    click.option("--chart", "charts", type=FILE, multiple=True, metavar="FILE.png|FILE.svg",
                 help="Draw a chart for a post; may be repeated."),
    overwrite,
)  # fmt: skip


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL|compare")
@click.argument("files", type=FILE, nargs=-1, metavar="[FILE]...")
@what_options
@how_options
@file_options
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    model: Path,
    files: tuple[Path, ...],
    json_file: str | None,
    charts: tuple[Path, ...],
    overwrite: bool,
    **asked: Any,
) -> None:
    """Measure how fast a model is on this machine.

    Times every part of MODEL, and whole pictures, on every choice of compute units: loads, first calls, median steps
    with quartiles, peak memory, how near the chip's limits; and on which units it really ran. Everything runs in child
    processes, in turns: what crashes or hangs is reported, and the rest is measured. Off a Mac it times the portable
    engine. docs/bench.md explains every figure.

    With compare, every other FILE that --json wrote is held against the first: ratios of median times, below 1 is
    faster, with intervals that hold with at least 95 % confidence; where one contains 1 no difference was seen.

    \b
    Example:
      glassine bench dreamshaper
      glassine bench dreamshaper --units ane,gpu --runs 50 --json mine.json --chart mine.png
      glassine bench dreamshaper --part unet --pictures 0 --no-cold
      sudo -v && glassine bench dreamshaper --units ane,gpu --energy
      glassine bench compare before.json after.json
    """
    if str(model) == COMPARE:
        given = [name for name in asked if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given or charts:
            raise click.UsageError("compare takes files, --json and --overwrite, no other options")
        _compare(files, json_file, overwrite)
    elif files:
        raise click.UsageError(f"one model at a time; got {model} and {', '.join(map(str, files))}")
    else:
        _measure(model, json_file, charts, overwrite, asked)


def _measure(
    model: Path, json_file: str | None, charts: tuple[Path, ...], overwrite: bool, asked: dict[str, Any]
) -> None:
    from glassine.commands.figures import show
    from glassine.runtime.bench.chart import check_charts, draw
    from glassine.runtime.bench.folder import bench as measure
    from glassine.runtime.bench.report import check_writable, write_text
    from glassine.runtime.bench.settings import SHORT, Settings
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.engine.contract import engine_name

    check_charts(charts)
    for path in (*charts, *(() if json_file in (None, "-") else (Path(str(json_file)),))):
        check_writable(path, overwrite=overwrite)
    engine = EngineOptions(**{name: asked.pop(name) for name in ("engine", "device", "precision")})
    said = [unit.strip() for unit in asked.pop("units").split(",")]
    units = tuple(SHORT.get(unit, unit) for unit in said)
    settings = Settings(units=units, options=engine, cold=not asked.pop("no_cold"), **asked)
    if engine_name(engine) == "portable":
        say("Core ML is macOS's: this measures the portable engine (PyTorch), and --units says nothing to it")
    report = measure(model, settings, say)
    if json_file == "-":
        click.echo(report.text(), nl=False)
    else:
        show(report)  # first: what has been measured is seen even where it cannot be written
        if json_file is not None:
            write_text(Path(json_file), report.text())
    for path in charts:
        draw(report, path)
    failed = [measured.role for measured in report.measured() if measured.failures]
    if failed:
        raise click.ClickException(f"not everything could be measured: {', '.join(failed)}; see above")


def _compare(files: tuple[Path, ...], json_file: str | None, overwrite: bool) -> None:
    from glassine.commands.figures import show_comparison
    from glassine.runtime.bench.compare import as_json, compare
    from glassine.runtime.bench.report import Report, check_writable, write_text

    if len(files) < 2:
        raise click.UsageError("two files or more can be compared; 'glassine bench MODEL --json FILE' writes them")
    if json_file not in (None, "-"):
        check_writable(Path(str(json_file)), overwrite=overwrite)
    compared = compare([Report.read(file) for file in files], _names(files))
    if json_file == "-":
        click.echo(as_json(compared), nl=False)
        return
    show_comparison(compared)
    if json_file is not None:
        write_text(Path(json_file), as_json(compared))


def _names(files: tuple[Path, ...]) -> list[str]:
    """The files' names without their ending; with their folder where two are the same."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]
