"""The verb that finds out how a model runs fastest on this machine, and remembers it: tune."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import FOLDER, as_json, give, model_size, say
from glassine.errors import PackageError
from glassine.manifest import FILE_NAME

if TYPE_CHECKING:
    from glassine.manifest import Part
    from glassine.runtime.foreign import Model
    from glassine.runtime.tuned import Choice
    from glassine.runtime.tuning import Tried


def read_duration(words: str) -> float:
    """Read a time such as 90s, 10m or 1h, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", words.strip())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"{words!r} is not a time; expected a number and s, m or h, such as 10m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


@click.command()
@click.argument("model", type=FOLDER)
@click.option("--budget", callback=lambda _, __, value: read_duration(value), default="10m", show_default=True,
              metavar="TIME", help="When to stop trying, such as 90s, 10m or 1h.")  # fmt: skip
@click.option("--part", "parts", multiple=True, metavar="ROLE",
              help="Tune this part alone, such as unet or vae_decoder; may be repeated.  [default: all]")  # fmt: skip
@click.option("--engine", type=click.Choice(["auto", "coreml", "portable"]), default="auto", show_default=True,
              help="auto: Core ML on a Mac, PyTorch elsewhere.")  # fmt: skip
@model_size
@click.option("--reset", is_flag=True, help="Forget what was found for the model here; nothing is tried.")
@as_json
def tune(model: Path, budget: float, parts: tuple[str, ...], reset: bool, as_json: bool, **asked: Any) -> None:
    """Find out how a model runs fastest on this machine.

    Times every part on the Neural Engine, the GPU, all units and the CPU, and every UNet also with other attention and
    other numbers of rows a call; where there is no Core ML, on the devices that PyTorch has. What crashes, hangs,
    returns NaN or differs from the reference is not chosen. From then on pictures of the model are drawn as was found,
    unless --units or --device say otherwise. A form of a UNet that won becomes a part of the folder, on the same
    weights, which --reset removes again. The choices are in GLASSINE_CONFIG, or where the system keeps settings.

    \b
    Example:
      glassine tune dreamshaper
      glassine tune dreamshaper --budget 30m --part unet
      glassine tune dreamshaper --reset
    """
    from glassine.commands.ways import keep, other_forms, own_ways
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.engine.contract import engine_name
    from glassine.runtime.foreign import read_model
    from glassine.runtime.tuned import place_of
    from glassine.runtime.tuning import Tuner, candidates

    ends = time.monotonic() + budget
    found = read_model(model)
    size = asked["size"] if asked["size"] is not None else found.manifest.sizes[0]
    options = EngineOptions(engine=asked["engine"], tell=say)
    place = place_of(found.folder, found.manifest, size, engine_name(options))
    if place is None:
        sizes = ", ".join(f"{width}x{height}" for width, height in found.manifest.sizes)
        raise PackageError(f"{model}: has no UNet of {size[0]}x{size[1]}; it was converted for {sizes}")
    if reset:
        _reset(place, found, size)
        give({"model": str(model), "forgotten": str(place)}, f"{model}: runs as it was converted", as_json)
        return
    notes: list[str] = []
    own = own_ways(found, size, parts)
    with other_forms(found, size, options, own, notes) as forms:
        ways = {role: [way, *forms.get(role, {}).values()] for role, way in own.items()}
        alone = [role for role, several in ways.items() if len(candidates({role: several}, options)) < 2]
        notes += [f"{role}: there is one way to run it here" for role in alone]
        ways = {role: several for role, several in ways.items() if role not in alone}
        tried = Tuner(ways, options, ends=ends, tell=say).run()
    winners = {one.candidate.role: one for one in tried if one.chosen}
    choices = {}
    for role, one in winners.items():
        won = next((form for form, way in forms.get(role, {}).items() if way is one.candidate.way), None)
        played = keep(found, size, role, won) if one.candidate.way.form else (role, one.candidate.way.part)
        choices[role] = _choice(found, one, played, tried)
    _store(place, found, size, choices)
    notes += [f"{role}: nothing could be chosen; it runs as before" for role in ways if role not in winners]
    for note in notes:
        say(f"note: {note}")
    rows = [_row(one) for one in tried]
    give({"model": str(model), "stored": str(place), "notes": notes, "tried": rows}, "\n".join(_table(tried)), as_json)
    if ways and not winners:
        raise click.ClickException("nothing could be chosen; the table says why")


def _reset(place: Path, found: Model, size: tuple[int, int]) -> None:
    """Forget the choices of a model, then remove what they have put into its folder."""
    from glassine.convert.forms import drop_forms

    try:
        place.unlink(missing_ok=True)
    except OSError as error:
        raise PackageError(f"{place}: cannot be removed ({error.strerror})") from None
    if (found.folder / FILE_NAME).is_file():
        drop_forms(found.folder, size)


def _choice(found: Model, one: Tried, played: tuple[str, Part], tried: Sequence[Tried]) -> Choice:
    """What is stored of a winner; `played`: the role of what plays it, and its part."""
    from glassine.runtime.tuned import Choice, programs_of

    candidate = one.candidate
    role, part = played
    return Choice(
        role=role,
        units=candidate.units,
        device=candidate.device,
        programs=programs_of(found.folder, part),
        why=_why(one, [other for other in tried if other.candidate.role == candidate.role]),
    )


def _why(one: Tried, tried: Sequence[Tried]) -> str:
    """The winner's time, and that of what would run without tuning."""
    assert one.step is not None
    form = f"{one.candidate.way.form}, " if one.candidate.way.form else ""
    said = f"{form}{_ms(one.step[0])}"
    usual = next((o for o in tried if o.candidate.way.own and o.candidate.on in ("all", "cpu") and o is not one), None)
    if usual is None or usual.step is None:
        return said
    return f"{said}; as converted on {usual.candidate.on} {_ms(usual.step[0])}"


def _store(place: Path, found: Model, size: tuple[int, int], choices: Mapping[str, Choice]) -> None:
    """Write the choices, beside those that are there for other parts."""
    from glassine.runtime.machine import this_machine
    from glassine.runtime.tuned import Tuning, read, write

    if not choices:
        return
    before: Mapping[str, Choice] = {}
    if place.is_file():
        try:
            before = read(place).choices
        except PackageError as error:
            say(f"note: {error}")
    machine = this_machine()
    tuning = Tuning(
        model=found.manifest.name,
        size=size,
        machine=f"{machine.chip}, {machine.name}",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        choices={**before, **choices},
    )
    write(place, tuning)


def _row(one: Tried) -> dict[str, Any]:
    """A candidate for machines; psnr null: not compared, or equal to the last bit (then equal is true)."""
    candidate = one.candidate
    measured = one.psnr is not None and math.isfinite(one.psnr)
    return {
        "part": candidate.role,
        "form": candidate.way.form,
        "package": candidate.way.part.file,
        "units": candidate.units,
        "device": candidate.device,
        "realised": one.realised,
        "calls_a_step": candidate.way.calls,
        "step_seconds": None if one.step is None else dict(zip(("median", "low", "high"), one.step, strict=True)),
        "load_seconds": one.load,
        "psnr_db": one.psnr if measured else None,
        "equal": one.psnr == math.inf,
        "chosen": one.chosen,
        "verdict": one.verdict,
    }


def _table(tried: Sequence[Tried]) -> list[str]:
    """What was tried, part by part; what there was no time for in one line."""
    from glassine.runtime.tuning import OUT_OF_TIME

    done = [one for one in tried if one.excluded != OUT_OF_TIME]
    head = ("", "part", "form", "on", "a step (quartiles)", "load", "dB", "")
    rows = [head, *(_cells(one) for role in dict.fromkeys(o.candidate.role for o in done) for one in done
                    if one.candidate.role == role)]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    left = [str(one.candidate) for one in tried if one.excluded == OUT_OF_TIME]
    return [*lines, f"{OUT_OF_TIME} (--budget): {'; '.join(left)}"] if left else lines


def _cells(one: Tried) -> tuple[str, ...]:
    candidate, step = one.candidate, one.step
    times = "" if step is None else f"{_ms(step[0])} ({_ms(step[1])} to {_ms(step[2])})"
    quality = "" if one.psnr is None else ("equal" if one.psnr == math.inf else f"{one.psnr:.1f}")
    load = "" if one.load is None else f"{one.load:.1f} s"
    form = candidate.way.form if candidate.way.form else "its only one"
    return ("*" if one.chosen else " ", candidate.role, form, candidate.on, times, load, quality, one.verdict)


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1000 * seconds:.3g} ms"
