"""One package tried on one compute unit in a child process: compile, load, predict once.

Core ML's compilers can hang for hours or end the process that called them, some of them only at the first prediction
(coremltools issues 2367, 2247 and 2758). All of that happens to a child first; what it says while it works:

parent  TRIAL + job as JSON -> child    {"stage": "load"} ... {"not_finite": []} or {"error": "..."}, one per line
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glassine.errors import EngineError
from glassine.runtime.engine.child import answering, child, leave_out_frameworks
from glassine.runtime.engine.contract import TensorSpec

Stage = Literal["start", "compile", "load", "predict"]
Ending = Literal["passed", "refused", "crashed", "hung", "not finite", "full"]
TRIAL: tuple[str, ...] = (
    sys.executable,
    "-m",
    "glassine.runtime.engine.trial",
)  # the stand-in for Core ML puts its own here
UNITS = {"all": "ALL", "cpu_and_ne": "CPU_AND_NE", "cpu_and_gpu": "CPU_AND_GPU", "cpu_only": "CPU_ONLY"}
_DOING = {"start": "starting", "compile": "compiling", "load": "loading", "predict": "predicting once"}
_HEARTBEAT = 15.0  # seconds of silence after which a person is told that it still works
_GLANCE = 0.2  # seconds between looks at whether anybody waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a child is to do: compile `package` in the empty folder `workshop`, put it at `model`, and try it there.

    model: the .mlmodelc; compiled already if it is there. units: Core ML's name. timeout: seconds for all of it.
    """

    package: Path
    workshop: Path
    model: Path
    units: str
    function: str | None
    inputs: tuple[TensorSpec, ...]
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How it went: the stage it came to, how it ended there, and why, in words."""

    stage: Stage
    ending: Ending
    reason: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the unit runs the package."""
        return self.ending == "passed"


def attempt(job: Job, tell: Callable[[str], None], given_up: Callable[[], bool] = lambda: False) -> Trial:
    """Run the job in a child and watch it; the child is gone when this returns.

    Args:
        tell: is given what the child is doing, in words, at every stage and every 15 seconds.
        given_up: whether nobody waits for it any more.

    Raises:
        EngineError: it was given up.
    """
    started = time.perf_counter()
    told = 0.0
    stage: Stage = "start"
    with child([*TRIAL, json.dumps(dataclasses.asdict(job), default=str)], job.workshop) as watched:
        while True:
            left = job.timeout - (time.perf_counter() - started)
            try:
                answer = watched.answer(min(_GLANCE, left))
            except TimeoutError:
                seconds = time.perf_counter() - started
                if seconds >= job.timeout:
                    return Trial(stage=stage, ending="hung", reason=f"no answer in {job.timeout:g} s", seconds=seconds)
                if given_up():
                    raise EngineError(f"{job.package}: given up while {_DOING[stage]} on {job.units.lower()}") from None
                if seconds - told >= _HEARTBEAT:
                    told = seconds
                    tell(f"{job.package.name}: still {_DOING[stage]} on {job.units.lower()} ({seconds:.0f} s)")
                continue
            seconds = time.perf_counter() - started
            if answer is None:
                return Trial(stage=stage, ending="crashed", reason=watched.ending(), seconds=seconds)
            if "stage" in answer:
                stage, told = answer["stage"], seconds
                tell(f"{job.package.name}: {_DOING[stage]} on {job.units.lower()}")
                continue
            return _result(answer, stage, seconds)


def _result(answer: dict[str, Any], stage: Stage, seconds: float) -> Trial:
    if answer.get("errno") in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in answer.get("error", ""):
        return Trial(stage=stage, ending="full", reason=answer["error"], seconds=seconds)
    if "error" in answer:
        return Trial(stage=stage, ending="refused", reason=answer["error"], seconds=seconds)
    names = answer["not_finite"]
    if names:
        reason = f"{', '.join(names)} came out NaN or infinite"
        return Trial(stage=stage, ending="not finite", reason=reason, seconds=seconds)
    return Trial(stage=stage, ending="passed", reason="", seconds=seconds)


def main(argument: str) -> None:
    """Be the child: do the job that `argument` describes, and say how it goes on what was stdout."""
    say, _ = answering()
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # or its warnings would be taken for the reason
    job = json.loads(argument)
    # A call into Core ML may hold the interpreter; a signal without a handler ends the process all the same.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(job["timeout"]) + 30)
    try:
        say(not_finite=_work(job, lambda stage: say(stage=stage)))
    except Exception as error:  # whatever it is, it is the parent's to judge
        say(error=str(error), errno=getattr(error, "errno", None))
    os._exit(0)  # without Core ML's own clean-up: it has been seen to crash


def _work(job: dict[str, Any], enter: Callable[[Stage], None]) -> list[str]:
    """Compile, load, predict once; return the outputs that are not finite."""
    import coremltools.models
    import numpy as np

    model = Path(job["model"])
    if not model.is_dir():
        enter("compile")
        made = coremltools.models.utils.compile_model(job["package"], str(Path(job["workshop"]) / model.name))
        try:
            os.rename(made, model)
        except OSError:
            if not model.is_dir():  # it is: a child whose parent was killed has finished the same
                raise
    enter("load")
    units = coremltools.models.model._ComputeUnit[job["units"]]
    loaded = coremltools.models.CompiledMLModel(str(model), units, job["function"])
    enter("predict")
    # In [0, 1): token numbers given as floats stay inside the vocabulary, and nothing overflows by itself.
    random = np.random.default_rng(0)
    inputs = {
        spec["name"]: np.zeros(spec["shape"], np.int32)
        if spec["dtype"].startswith(("int", "uint"))
        else random.random(spec["shape"], np.float32)
        for spec in job["inputs"]
    }
    return sorted(name for name, array in loaded.predict(inputs).items() if not np.isfinite(array).all())


if __name__ == "__main__":
    leave_out_frameworks()
    main(sys.argv[1])
