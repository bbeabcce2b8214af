"""The verb that draws a file of jobs: batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.draw import watch
from glassine.commands.lora import prompt_loras, with_prompt_loras
from glassine.commands.options import (
    FILE,
    FOLDER,
    as_json,
    engine_of,
    engine_options,
    give,
    low_memory,
    overwrite,
    say,
)

if TYPE_CHECKING:
    from glassine.runtime.batch import Outcome


@click.command()
@click.argument("jobs", type=FILE)
@click.option("--out", "-o", type=FOLDER, required=True, help="The folder of the pictures.")
@click.option("--model", type=FOLDER, help="The model of jobs that name none.")
@prompt_loras
@overwrite
@engine_options
@low_memory
@as_json
def batch(jobs: Path, out: Path, model: Path | None, as_json: bool, **asked: Any) -> None:
    """Draw a file of jobs, and go on where it was stopped.

    JOBS has one JSON object a line: the settings of a picture by their names in Python, and model, size, image,
    change_map, mask, controls, collage, out (docs/batch.md). Every line is checked before anything is drawn. Whatever
    stops a batch, the same command draws what is missing and nothing twice. A job that fails is reported, the others
    go on; then the exit code is 1.

    \b
    Example:
      glassine batch jobs.jsonl --model dreamshaper -o out
    """
    from glassine.runtime.batch import draw_jobs
    from glassine.runtime.jobs import read_jobs

    read = read_jobs(jobs, out, model=model)
    find_model = partial(_with_loras, asked)
    outcomes = []
    for outcome in draw_jobs(read, engine_of(asked), finish=watch, find_model=find_model, overwrite=asked["overwrite"]):
        outcomes.append(outcome)
        _tell(jobs, outcome, f"{len(outcomes)} of {len(read)}", as_json)
    counts = {state: sum(each.state == state for each in outcomes) for state in ("drawn", "there", "failed")}
    if as_json:
        give({**counts, "jobs": [_report(outcome) for outcome in outcomes]}, "", True)
    else:
        say("{drawn} drawn, {there} there before, {failed} failed".format(**counts))
    if counts["failed"]:
        raise click.ClickException(
            f"{counts['failed']} of {len(read)} jobs failed; the same command tries them again, and only them"
        )


def _with_loras(asked: dict[str, Any], model: Path, prompt: str) -> Path:
    return with_prompt_loras(model, prompt, asked)


def _tell(file: Path, outcome: Outcome, count: str, as_json: bool) -> None:
    """Say what became of a job at once: its path when it was drawn, its line and the reason when it failed."""
    if outcome.state == "failed":
        say(f"{count}: {file}:{outcome.job.line}: {outcome.job.out.name}: {outcome.error}")
    elif outcome.result is not None:
        say(f"{count}: line {outcome.job.line}, {sum(outcome.result.seconds.values()):.1f} s")
        if not as_json:
            click.echo(str(outcome.job.out))


def _report(outcome: Outcome) -> dict[str, Any]:
    job, result = outcome.job, outcome.result
    report: dict[str, Any] = {"line": job.line, "path": str(job.out), "seed": job.request.seed, "state": outcome.state}
    if result is not None:
        report |= {"evaluations": result.evaluations, "seconds": result.seconds, "notices": result.notices}
    return report if not outcome.error else {**report, "error": outcome.error}
