"""Many jobs, one after the other: jobs -> pictures in a folder, whatever interrupts it.

A picture is written under a temporary name and renamed, with its job's digest inside; so a batch that was killed goes
on with the jobs whose pictures are not there, and none is drawn twice. Jobs of one model are drawn together, and its
packages stay loaded between them.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glassine.errors import GlassineError, RequestError
from glassine.runtime.collage_inputs import collage_inputs
from glassine.runtime.control_pictures import with_controls
from glassine.runtime.engine import EngineOptions
from glassine.runtime.image import save_png
from glassine.runtime.inputs import read_inputs
from glassine.runtime.jobs import KEYWORD, Job
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.prompt import network_tags
from glassine.runtime.run import Result, Run

_LEFTOVER = re.compile(r"\.(.+)\.\d+\.part")  # see `image.replaced`
_SHOWN = 20  # pictures in the way that are listed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: its picture was there already, was drawn (`result`), or could not be (`error`)."""

    job: Job
    state: Literal["there", "drawn", "failed"]
    result: Result | None = None
    error: str = ""


def draw_jobs(
    jobs: Sequence[Job],
    options: EngineOptions,
    *,
    finish: Callable[[Run], Result] = Run.finish,
    find_model: Callable[[Path, str], Path] = lambda model, _: model,
    overwrite: bool = False,
) -> Iterator[Outcome]:
    """Draw what is not there yet, and yield what became of each job: first of those that are done.

    A job that fails does not stop the others; a picture that cannot be written does, as the next could not be either.

    Args:
        jobs: of one folder, see `jobs.read_jobs`. options: how to run the models.
        finish: makes the steps of a run and finishes it. find_model: (model, prompt) -> the folder to draw with.
        overwrite: replace pictures that are in the way.

    Raises:
        RequestError: other pictures are in the way, another batch writes there, or a picture cannot be written.
    """
    if not jobs:
        return
    with _claimed(jobs[0].out.parent) as folder:
        left = [job for job in jobs if not job.done]
        in_the_way = [job for job in left if job.out.exists()]
        if in_the_way and not overwrite:
            raise RequestError(_refusal(in_the_way))
        _remove_leftovers(folder, {job.out.name for job in left})
        undone = {job.line for job in left}
        yield from (Outcome(job, "there") for job in jobs if job.line not in undone)
        models = _OneModel(options, find_model)
        try:
            for job in _together(left):
                try:
                    result = finish(_prepare(models.pipe(job), job, options))
                except GlassineError as error:
                    yield Outcome(job, "failed", error=str(error))
                    continue
                text = {**result.text, KEYWORD: job.digest}
                save_png(job.out, result.pixels, text=text, icc_profile=result.icc_profile, overwrite=overwrite)
                yield Outcome(job, "drawn", result)
        finally:
            models.close()


class _OneModel:
    """The model that is loaded; the next takes its place."""

    def __init__(self, options: EngineOptions, find_model: Callable[[Path, str], Path]) -> None:
        self._options = options
        self._find_model = find_model
        self._key: object = None
        self._pipe: Pipeline | None = None

    def pipe(self, job: Job) -> Pipeline:
        """Return the model of a job, loaded unless it is the last job's."""
        if self._pipe is None or self._key != _model_key(job):
            self.close()
            model = self._find_model(job.model, job.request.prompt)
            self._pipe = Pipeline.load(model, self._options, size=job.size, refiner=job.refiner)
            self._key = _model_key(job)
        return self._pipe

    def close(self) -> None:
        """Unload it."""
        if self._pipe is not None:
            self._pipe.close()
        self._pipe = None


def _model_key(job: Job) -> object:
    """What decides the packages; LoRAs in the prompt make a model of their own."""
    return job.model, job.size, job.refiner, tuple(network_tags(job.request.prompt))


def _together(jobs: Sequence[Job]) -> list[Job]:
    """Sort jobs so that those of one model follow each other, the models in the order they first appear in."""
    first: dict[object, int] = {}
    for job in jobs:
        first.setdefault(_model_key(job), job.line)
    return sorted(jobs, key=lambda job: first[_model_key(job)])


def _prepare(pipe: Pipeline, job: Job, options: EngineOptions) -> Run:
    fit = job.request.fit
    if job.collage is not None:
        inputs = collage_inputs(pipe, job.collage, job.request)
    else:
        inputs = read_inputs(job.image, job.maps, *pipe.size, fit=fit, keep_alpha=job.request.transparent)
    return pipe.run(job.request, with_controls(inputs, job.controls, pipe.size, fit, engine=options))


@contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """Make the folder, and hold it against a second batch; a process that dies lets go of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be made or opened ({error.strerror or error})") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{folder}: another batch writes there; wait for it, or choose another folder") from None
        yield folder
    finally:
        os.close(lock)


def _refusal(in_the_way: Sequence[Job]) -> str:
    lines = [f"{job.out}: is there, and is not the picture of line {job.line}" for job in in_the_way[:_SHOWN]]
    more = [f"and {len(in_the_way) - _SHOWN} more"] if len(in_the_way) > _SHOWN else []
    return "\n".join(
        [*lines, *more, "nothing was drawn; give the jobs other names, another folder, or say --overwrite"]
    )


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """Remove what a batch that was killed left of the picture it was writing."""
    for path in folder.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match is not None and match[1] in names:
            path.unlink()
