"""The verb that says what a file or a folder is: inspect."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.memory import memory_lines, memory_of
from glassine.commands.options import as_json, give, say
from glassine.commands.placement import placement_options, show_placement
from glassine.commands.tuned import tuned_here, tuned_lines

if TYPE_CHECKING:
    from glassine.runtime.engine.contract import ComputeUnits
    from glassine.runtime.engine.portable.program import Function
    from glassine.runtime.engine.portable.summary import Summary


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@placement_options
@as_json
def inspect(model: Path, placement: bool, units: ComputeUnits, as_json: bool) -> None:
    """Show what is inside a model.

    MODEL is a model folder, whoever converted it, or one .mlpackage: inputs, outputs, operations, parameters, FLOPs,
    precision, size, memory, and how it runs on this machine if it was tuned. Or it is what could be converted, a
    .safetensors file or a diffusers folder: what it is, and which tensor says so. With --placement: which operations
    run where, what they cost, and why some are not on the Neural Engine; by Core ML's own plan on a Mac, else a
    prediction.

    \b
    Example:
      glassine inspect dreamshaper
      glassine inspect dreamshaper --placement --units cpu_and_ne
      glassine inspect dreamshaper/Unet.mlpackage --json
      glassine inspect dreamshaper_8.safetensors
    """
    from glassine.runtime.engine.portable.program import read_package
    from glassine.runtime.engine.portable.summary import summarise
    from glassine.runtime.foreign import is_model, read_model

    if model.is_file() or (model.suffix != ".mlpackage" and model.is_dir() and not is_model(model)):
        if placement:
            raise click.UsageError("--placement is about packages; convert the checkpoint first")
        _inspect_source(model, as_json)
        return
    if model.suffix == ".mlpackage":
        packages, about, functions = {model.stem: model}, {}, {}
    else:
        found = read_model(model)
        for notice in found.notices:
            say(f"note: {notice}")
        packages = found.packages()
        about = dataclasses.asdict(found.manifest)
        about = {key: value for key, value in about.items() if key not in ("parts", "versions")}
        functions = {role: part.about.get("function") for role, part in found.manifest.parts.items()}
    if placement:
        show_placement(packages, functions, units, as_json)
        return
    programs = {role: read_package(package) for role, package in packages.items()}
    summaries = {role: summarise(program) for role, program in programs.items()}
    memory = memory_of(model, summaries) if about else {}
    if as_json:
        parts = {role: dataclasses.asdict(summary) for role, summary in summaries.items()}
        give({"model": about, "parts": parts, "memory": memory, "tuned": tuned_here(model) if about else {}}, "", True)
        return
    if about:
        click.echo(
            "{name}: {family}, {prediction_type}, {width}x{height}, batch {batch}, {tokens} tokens".format(**about)
        )
        click.echo("\n".join(decisions(about["decided"])))
    for role, package in packages.items():
        click.echo("\n".join(describe(f"{role} ({package.name})", programs[role].function(), summaries[role])))
    if about:
        click.echo("\n".join([*memory_lines(memory), *tuned_lines(tuned_here(model))]))


def _inspect_source(path: Path, as_json: bool) -> None:
    """Say what a checkpoint is, without converting it."""
    from glassine.convert.checkpoint import open_checkpoint
    from glassine.convert.detect import detect

    found = detect(open_checkpoint(path))
    parameters = {part: sum(map(math.prod, weights.shapes.values())) for part, weights in found.parts.items()}
    result: dict[str, Any] = {
        "family": found.family.name,
        "prediction_type": found.family.prediction,
        "size": found.family.size,
        "zero_terminal_snr": found.scheduler.zero_terminal_snr,
        "defaults": dict(found.defaults),
        "parameters": parameters,
        "decided": dict(found.reasons),
    }
    counts = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in parameters.items())
    lines = [f"{path.name}: {found.family.name}, {found.family.prediction}, {found.family.size}", f"  {counts}"]
    give(result, "\n".join([*lines, *(f"  {what}: {why}" for what, why in found.reasons.items())]), as_json)


def describe(name: str, function: Function, summary: Summary) -> list[str]:
    """Lay out one package for reading: its size, then inputs, outputs and operations."""
    stored = ", ".join(f"{size / 1e6:,.1f} MB {dtype}" for dtype, size in summary.weight_bytes.items())
    flops = f"{summary.flops / 1e9:,.1f} GFLOP" + (" and more of unknown shape" if summary.unsized else "")
    lines = [f"\n{name}: {summary.parameters / 1e6:,.2f} M parameters, {stored}, {flops}, {summary.precision}"]
    for side, features in (("in", function.inputs), ("out", function.outputs)):
        lines += [f"  {side:4} {feature.name:24} {feature.shape} {feature.dtype}" for feature in features]
    counts = ", ".join(f"{operation} {count}" for operation, count in summary.operations.items())
    lines += textwrap.wrap(counts, 110, initial_indent="  ops  ", subsequent_indent="       ")
    return lines


def decisions(decided: Mapping[str, str]) -> list[str]:
    """Say what decided the things that a user may want to decide otherwise."""
    shown = ("family", "prediction type", "schedule", "few steps", "size", "VAE precision")
    return [f"  {what}: {decided[what]}" for what in shown if what in decided]
