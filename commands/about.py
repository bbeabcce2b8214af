"""The verbs that show Glassine itself: demo and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from glassine.commands.options import FOLDER, as_json, engine_of, engine_options, give, say

MARKS = {"ok": "ok  ", "note": "note", "missing": "miss"}


@click.command()
@click.option("--model", type=FOLDER, help="Draw with this converted model instead of the embedded tiny family.")
@click.option("--out", "-o", type=FOLDER, default=Path("glassine-demo"), show_default=True, help="Where pictures go.")
@engine_options
@as_json
def demo(model: Path | None, out: Path, as_json: bool, **asked: Any) -> None:
    """Draw with the embedded tiny model.

    Converts the tiny family that ships with Glassine (seconds), then draws a prompt, a change map, a soft inpaint, a
    strength fan and a shape that follows drawn edges, and one contact sheet of them.

    \b
    Example:
      glassine demo
      glassine demo --model dreamshaper --out pictures
    """
    from glassine.commands.demo import run

    paths = [str(path) for path in run(out, model, engine_of(asked), say)]
    give({"paths": paths}, "\n".join(paths), as_json)


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """Say what is installed, what runs, what is missing.

    Looks at the chip, the system, memory, disk, libraries, engines and compiled models, and names combinations that are
    known not to work, with what to do. Exit code 1 if something is missing.

    \b
    Example:
      glassine doctor
    """
    from glassine.commands.doctor import examine

    findings = examine()
    if as_json:
        give({f.name: {"status": f.status, "text": f.text, "advice": f.advice} for f in findings}, "", True)
    else:
        for f in findings:
            click.echo(f"{MARKS[f.status]} {f.name:22} {f.text}" + (f"\n    -> {f.advice}" if f.advice else ""))
    if any(f.status == "missing" for f in findings):
        raise SystemExit(1)
