"""The verb that says what a file or a folder is: inspect."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.memory import memory_lines, memory_of
from glassine.commands.options import as_json, give, say
from glassine.commands.placement import placement_options, show_placement
from glassine.commands.tuned import tuned_here, tuned_lines
from glassine.errors import GlassineError

if TYPE_CHECKING:
    from glassine.convert.kinds import Described
    from glassine.runtime.engine.contract import ComputeUnits
    from glassine.runtime.engine.portable.program import Function
    from glassine.runtime.engine.portable.summary import Summary


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@placement_options
@as_json
def inspect(model: Path, placement: bool, units: ComputeUnits, as_json: bool) -> None:
    """Show what is inside a model, and what any file is.

    MODEL is a model folder, whoever converted it, or one .mlpackage: inputs, outputs, operations, parameters, FLOPs,
    precision, size, memory, and how it runs on this machine if it was tuned. Or it is what people have beside models: a
    checkpoint, LoRA, textual inversion, ControlNet ... (what it is, the family it is for, which tensor says so, and the
    command that takes it), a whole folder of such files, or a PNG: how it was drawn. With --placement: which operations
    of a model run where, what they cost, and why some are not on the Neural Engine; by Core ML's own plan on a Mac,
    else a prediction.

    \b
    Example:
      glassine inspect dreamshaper
      glassine inspect dreamshaper --placement --units cpu_and_ne
      glassine inspect dreamshaper/Unet.mlpackage --json
      glassine inspect dreamshaper_8.safetensors
      glassine inspect downloads
      glassine inspect boat.png
    """
    from glassine.convert.kinds import is_diffusers
    from glassine.runtime.engine.portable.program import read_package
    from glassine.runtime.engine.portable.summary import summarise
    from glassine.runtime.foreign import is_model, read_model

    if model.is_file() or (model.suffix != ".mlpackage" and model.is_dir() and not is_model(model)):
        if placement:
            raise click.UsageError("--placement is about packages; convert the checkpoint first")
        if model.suffix.lower() == ".png":
            _inspect_picture(model, as_json)
        elif model.is_dir() and not is_diffusers(model):
            _inspect_files(model, as_json)
        else:
            _inspect_source(model, as_json)
        return
    if model.suffix == ".mlpackage":
        packages, about, functions, lost = {model.stem: model}, {}, {}, {}
    else:
        found = read_model(model)
        for notice in found.notices:
            say(f"note: {notice}")
        packages = found.packages()
        about = dataclasses.asdict(found.manifest)
        about = {key: value for key, value in about.items() if key not in ("parts", "versions")}
        functions = {role: part.about.get("function") for role, part in found.manifest.parts.items()}
        lost = {role: part.about["palette"] for role, part in found.manifest.parts.items() if "palette" in part.about}
    if placement:
        show_placement(packages, functions, units, as_json)
        return
    programs = {role: read_package(package) for role, package in packages.items()}
    summaries = {role: summarise(program) for role, program in programs.items()}
    memory = memory_of(model, summaries) if about else {}
    if as_json:
        parts = {role: dataclasses.asdict(summary) for role, summary in summaries.items()}
        for role, palette in lost.items():
            parts[role]["palette"] = palette
        give({"model": about, "parts": parts, "memory": memory, "tuned": tuned_here(model) if about else {}}, "", True)
        return
    if about:
        click.echo(
            "{name}: {family}, {prediction_type}, {width}x{height}, batch {batch}, {tokens} tokens".format(**about)
        )
        click.echo("\n".join(decisions(about["decided"])))
    for role, package in packages.items():
        click.echo("\n".join(describe(f"{role} ({package.name})", programs[role].function(), summaries[role])))
        if role in lost:
            click.echo("\n".join(palette_lines(lost[role])))
    if about:
        click.echo("\n".join([*memory_lines(memory), *tuned_lines(tuned_here(model))]))


def _inspect_source(path: Path, as_json: bool) -> None:
    """Say what a weights file or a diffusers folder is, without converting it."""
    from glassine.convert.kinds import describe_file

    found = describe_file(path)
    result = {"what": found.what, "family": found.family, **found.facts, "use": found.use}
    give(result, "\n".join([f"{path.name}: {_said(found)}", *_details(found), f"  use: {found.use}"]), as_json)


def _inspect_files(folder: Path, as_json: bool) -> None:
    """Say of every file below a folder what it is; those that are nothing, or nothing whole, say why."""
    from glassine.convert.kinds import describe_file, weights_below

    result: dict[str, Any] = {}
    lines: list[str] = []
    files = list(weights_below(folder))
    if not files:
        raise click.ClickException(f"{folder}: no model, and no weights files in it")
    names = {path: str(path.relative_to(folder)) for path in files}
    width = max(map(len, names.values()))
    for path, name in names.items():
        try:
            found = describe_file(path)
        except GlassineError as error:
            result[name] = {"error": str(error)}
            lines.append(f"{name:{width}}  not for Glassine: {str(error).removeprefix(f'{path}: ')}")
        else:
            result[name] = {"what": found.what, "family": found.family, **found.facts, "use": found.use}
            lines.append(f"{name:{width}}  {_said(found)}")
    refused = sum("error" in found for found in result.values())
    give({"files": result}, "\n".join([*lines, f"{len(files)} files, {refused} of them not for Glassine"]), as_json)


def _inspect_picture(path: Path, as_json: bool) -> None:
    """Say how a picture was drawn."""
    from glassine.runtime.metadata import read_record

    record = read_record(path)
    lines = [f"{path.name}: drawn by {'Glassine' if record.written_by == 'glassine' else 'another tool, in its words'}"]
    size = None if record.size is None else "{}x{}".format(*record.size)
    said = {**record.request, "size": size, "model": record.model.get("name")}
    lines += [f"  {name}: {value}" for name, value in said.items() if value is not None and value != ""]
    collage = dict(record.collage) if record.collage is not None else {}
    layers = [("layer", layer) for layer in collage.pop("layers", ())]
    controls = [("control", control) for control in record.controls]
    lines += [
        f"  {name}: {_plain(told)}" for name, told in (*record.inputs.items(), *controls, *collage.items(), *layers)
    ]
    lines += [f"  note: {notice}" for notice in record.notices]
    again = "generate MODEL" if record.collage is None else "collage --model MODEL"
    lines.append(f"  use: glassine {again} --from {path.name}")
    give(dataclasses.asdict(record), "\n".join(lines), as_json)


def _plain(told: Any) -> str:
    """What a picture says of itself, in words: a file is its name."""
    if not isinstance(told, dict):
        return str(told)
    return (
        str(told["name"])
        if {"name", "sha256"} <= told.keys()
        else ", ".join(f"{key} {_plain(each)}" for key, each in told.items())
    )


def _said(found: Described) -> str:
    """What a file is, in a line."""
    facts, family = found.facts, "of an unknown family" if found.family is None else f"for {found.family}"
    if found.what == "checkpoint":
        parts = ", ".join(facts["parameters"])
        return f"{found.family}, {facts['prediction_type']}, {facts['size']} ({parts})"
    if found.what == "LoRA":
        ranks = facts["ranks"]
        rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
        return f"{' and '.join(facts['methods']) or 'LoRA'} {family}{rank}"
    if found.what == "textual inversion":
        return f'textual inversion {family}: "{facts["word"]}", {facts["vectors"]} tokens'
    alone = found.family is None and found.what in {"LayerDiffuse", "TAESD"}  # they read no text that would tell
    return found.what if alone else f"{found.what} {family}"


def _details(found: Described) -> list[str]:
    """What more its header tells."""
    facts = found.facts
    if found.what == "checkpoint":
        counts = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in facts["parameters"].items())
        return [f"  {counts}", *(f"  {what}: {why}" for what, why in facts["decided"].items())]
    if found.what != "LoRA":
        return []
    layers = facts["layers"]
    lines = [f"  layers: {layers['unet']} of the UNet, {layers['text']} of text encoders"]
    lines += [f"  {name}: {facts[name]}" for name in ("title", "base", "trigger") if name in facts]
    return [*lines, *([f"  words of its captions: {', '.join(facts['words'])}"] if "words" in facts else [])]


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


def palette_lines(lost: Mapping[str, Any]) -> list[str]:
    """Say what weights in fewer bits have lost, and what that does to the output."""
    forms = ", ".join(f"{count} weights as {form}" for form, count in lost["weights"].items())
    if lost["snr_db"] is None:
        return [f"  palettes: {forms}; nothing is lost"]
    worst = f"the worst, {lost['worst']['name']}, at {lost['worst']['snr_db']:.1f} dB"
    psnr = lost.get("output_psnr_db")
    output = "not measured yet (glassine verify)" if psnr is None else f"{psnr:.1f} dB (PSNR) beside its source"
    return [
        f"  palettes: {forms}; signal to noise of the weights {lost['snr_db']:.1f} dB, {worst}",
        f"  output: {output}",
    ]


def decisions(decided: Mapping[str, str]) -> list[str]:
    """Say what decided the things that a user may want to decide otherwise."""
    shown = ("family", "prediction type", "schedule", "few steps", "size", "VAE precision")
    return [f"  {what}: {decided[what]}" for what in shown if what in decided]
