"""The child that is timed: it loads one network, or a whole pipeline, and runs it when it is asked to.

      {"ready": true}                what it needs is imported
asked {"do": "load", "warm"}      -> {"seconds", "realised", "base": bytes before}; warm: compile before, if need be
      {"do": "run", "times": 5}   -> {"seconds": [...], "at": [...], "stages": [...], "not_finite": [...]}
      {"do": "memory"}            -> {"peak": bytes, "counts": "resident set"}
      {"do": "peak", "device"}    -> {"tflops", "gigabytes", "source"}
      {"do": "placement", "units"} -> {"placement": {unit: share of the cost}, "source": "plan"}

Times are of this process's clock, around the call alone: neither the message nor the making of the inputs is in them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from glassine.runtime.bench.memory import peak_memory
from glassine.runtime.bench.model import packages_of
from glassine.runtime.bench.roofline import measured_peak
from glassine.runtime.engine import Engine, EngineOptions, open_engine
from glassine.runtime.engine.child import Words, answering, leave_out_frameworks
from glassine.runtime.engine.compose import Chain
from glassine.runtime.engine.contract import ComputeUnits, Realised, TensorSpec
from glassine.runtime.foreign import read_model

Clock = Callable[[], float]
Open = Callable[..., Engine]
PICTURE = (
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae_decoder",
)  # the parts that every picture needs, where it has them
_VARIED = 1000  # pictures before a prompt comes again


class Task(Protocol):
    """What is timed."""

    def packages(self) -> list[tuple[Path, str | None]]:
        """What it loads, each with the function that is used."""
        ...

    def load(self) -> Realised:
        """Make it ready."""
        ...

    def run(self) -> tuple[Mapping[str, NDArray[np.generic]], dict[str, float]]:
        """Run it once; its results, and the seconds of its stages as far as it knows them."""
        ...


class Network:
    """One network: a package, or several that run one after the other, on random inputs.

    Floats are in [0, 1), so that nothing overflows by itself; token numbers are 0. An input's name and the number of a
    row decide the row, so that a network of one row and one of two read the same.
    """

    def __init__(self, job: Words, options: EngineOptions, open_: Open) -> None:
        self._job, self._options, self._open = job, options, open_
        self._keep = job["keep"]

    def packages(self) -> list[tuple[Path, str | None]]:
        """The packages of the job."""
        return [(Path(package), self._job["function"]) for package in self._job["packages"]]

    def load(self) -> Realised:
        """Open the packages."""
        stages = [self._open(package, self._options, function=function) for package, function in self.packages()]
        self._engine: Engine = stages[0] if len(stages) == 1 else Chain(stages)
        self._inputs = {name: _input(spec) for name, spec in self._engine.inputs.items()}
        return self._engine.realised

    def run(self) -> tuple[Mapping[str, NDArray[np.generic]], dict[str, float]]:
        """Predict once; the first results are kept if the job says where."""
        results = self._engine.predict(**self._inputs)
        if self._keep is not None:
            np.savez(self._keep, **results)  # type: ignore[arg-type]
            self._keep = None
        return results, {}


class Picture:
    """Whole pictures, every one with a seed and a prompt of its own: a pipeline remembers prompts."""

    def __init__(self, job: Words, options: EngineOptions) -> None:
        self._job, self._options = job, options
        self._size = (job["size"][0], job["size"][1])
        self._drawn = 0

    def packages(self) -> list[tuple[Path, str | None]]:
        """The packages of the parts that every picture needs."""
        model = read_model(Path(self._job["folder"]))
        parts = [part for role in PICTURE if (part := model.manifest.part(role, self._size)) is not None]
        return [(file, part.about.get("function")) for part in parts for file in packages_of(model.folder, part)]

    def load(self) -> Realised:
        """Open the model and the parts that every picture needs."""
        from glassine.runtime.pipeline import Pipeline

        self._pipe = Pipeline.load(self._job["folder"], self._options, size=self._size)
        engines = [self._pipe.engine(role) for role in PICTURE if role in self._pipe.manifest.parts]
        return dataclasses.replace(
            engines[0].realised,
            device=" + ".join(dict.fromkeys(engine.realised.device for engine in engines)),
            load_seconds=sum(engine.realised.load_seconds for engine in engines),
            notices=self._pipe.notices,
        )

    def run(self) -> tuple[Mapping[str, NDArray[np.generic]], dict[str, float]]:
        """Draw one picture, from the prompt to its pixels; the first has seed 0 and is kept if the job says where."""
        steps = {} if self._job["steps"] is None else {"steps": self._job["steps"]}
        prompt = f"a paper boat on a lake, number {self._drawn % _VARIED}"
        run = self._pipe.run(self._pipe.request({"prompt": prompt, "seed": self._drawn, **steps}))
        result = run.finish()
        if self._drawn == 0 and self._job["keep"] is not None:
            np.save(self._job["keep"], result.latents)
        self._drawn += 1
        return {"latents": result.latents}, {**result.seconds, "evaluations": float(result.evaluations)}


def serve(job: str, *, open_: Open = open_engine, clock: Clock = time.perf_counter) -> None:
    """Be the child: do what is asked until the parent is gone.

    Args:
        job: as JSON, what to time and how. open_, clock: others than the real ones, for tests.
    """
    say, asked = answering()
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # or its warnings would be taken for the reason
    try:
        described = json.loads(job)
        options = EngineOptions(**described["options"], tell=lambda words: say(tell=words))
        task: Task = Picture(described, options) if "folder" in described else Network(described, options, open_)
        _import(described["core_ml"])
        base, _ = peak_memory()
        say(ready=True)
        while True:
            words = asked.get()
            if words["do"] == "load":
                if words["warm"] and described["core_ml"]:
                    _compile(task, options)
                started = clock()
                realised = task.load()
                say(seconds=clock() - started, realised=dataclasses.asdict(realised), base=base)
            elif words["do"] == "run":
                say(**_timed(task, words["times"], clock))
            elif words["do"] == "memory":
                peak, counts = peak_memory()
                say(peak=peak, counts=counts)
            elif words["do"] == "peak":
                say(**dataclasses.asdict(measured_peak(words["device"], clock)))
            else:
                say(**_placement(described, words["units"]))
    except Exception as error:  # whatever it is, it is the parent's to judge
        say(error=f"{error}" if str(error) else repr(error))
        os._exit(0)


def _compile(task: Task, options: EngineOptions) -> None:
    """See to it that the compile cache has all that will be loaded."""
    from glassine.runtime.engine.coreml import warm

    for package, function in task.packages():
        warm(package, options, function)


def _timed(task: Task, times: int, clock: Clock) -> Words:
    seconds, at, stages = [], [], []
    not_finite: set[str] = set()
    for _ in range(times):
        started = clock()
        results, parts = task.run()
        seconds.append(clock() - started)
        at.append(started)
        stages.append(parts)
        not_finite |= {name for name, array in results.items() if not np.isfinite(array).all()}
    return {"seconds": seconds, "at": at, "stages": stages, "not_finite": sorted(not_finite)}


def _placement(job: Words, units: ComputeUnits) -> Words:
    """Where the operations run that Core ML has loaded: the shares of the cost, over all packages of a network."""
    from glassine.runtime.engine.placement import UNITS, placement
    from glassine.runtime.engine.portable.program import read_package
    from glassine.runtime.engine.portable.summary import flops_of

    shares: dict[str, float] = dict.fromkeys(UNITS, 0.0)
    source, whole = "plan", 0.0
    for package in map(Path, job["packages"]):
        found = placement(package, units, job["function"])
        weight = max(1.0, math.fsum(flops_of(read_package(package).function(job["function"])).values()))
        for unit in UNITS:
            shares[unit] += weight * found.share(unit)
        source, whole = found.source, whole + weight
    return {"placement": {unit: share / whole for unit, share in shares.items()}, "source": source}


def _input(spec: TensorSpec) -> NDArray[np.generic]:
    if spec.dtype.startswith(("int", "uint")):
        return np.zeros(spec.shape, np.int32)
    name = zlib.crc32(spec.name.encode())
    rows = [np.random.default_rng([name, row]).random(spec.shape[1:], np.float32) for row in range(spec.shape[0])]
    return np.stack(rows).reshape(spec.shape)


def _import(core_ml: bool) -> None:
    """Import the engine's library now: loading is timed without it."""
    if core_ml:
        import coremltools.models  # noqa: F401
    else:
        with suppress(ModuleNotFoundError):  # `open_engine` says what is missing
            from glassine.runtime.engine.portable import executor  # noqa: F401


if __name__ == "__main__":
    if json.loads(sys.argv[1])["core_ml"]:
        leave_out_frameworks()
    serve(sys.argv[1])
