"""A child that is timed, on a clock of its own: python bench_child.py '{"cpu_and_ne": 0.2}' JOB

The plan says for every choice of compute units, and for "UNITS PACKAGE" where one package differs: how many seconds a
call takes, or what goes wrong: "killed", "hangs", "refused", "nan", or "runs UNITS" for other units than those asked
for. Nothing waits: the clock is moved on (timed_child.py). "load" is what loading takes, ten times that with an empty
compile cache.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from timed_child import Clock, serve, suffer

from glassine.errors import PackageError
from glassine.runtime.bench import worker
from glassine.runtime.engine import EngineOptions, Realised
from glassine.runtime.engine.contract import TensorSpec

PLAN = json.loads(sys.argv[1])
clock = Clock()


def delay(units: str, package: str = "") -> float:
    """Suffer what is planned, or return the seconds of a call."""
    planned = PLAN.get(f"{units} {package}", PLAN.get(units, 1.0))
    suffer(planned)
    if isinstance(planned, str) and planned.startswith("runs "):
        return delay(planned.split()[1], package)
    return 1.0 if planned == "nan" else planned


class Stub:
    """An engine that takes the time it is told."""

    def __init__(self, package: Path, options: EngineOptions, *, function: str | None = None) -> None:
        self.package, self.units = package.stem, options.compute_units or options.device or "all"
        if package.parent.is_dir() and not package.is_dir():
            raise PackageError(f"{package.name} is not there")
        planned = PLAN.get(f"{self.units} {self.package}", PLAN.get(self.units))
        if planned == "refused":
            suffer(planned)
        options.tell(f"{package.name}: loading on {self.units}")
        device = planned.split()[1] if isinstance(planned, str) and planned.startswith("runs ") else self.units
        cold = "GLASSINE_CACHE" in os.environ and not Path(os.environ["GLASSINE_CACHE"], self.package).exists()
        if cold:
            Path(os.environ["GLASSINE_CACHE"]).mkdir(exist_ok=True)
            Path(os.environ["GLASSINE_CACHE"], self.package).touch()
        clock.now += PLAN.get("load", 2.0) * (10 if cold else 1)
        notices = (f"{package.name} runs on {device}",) if device != self.units else ()
        self.realised = Realised(
            engine=options.engine, device=device, precision="as converted", load_seconds=0.0, notices=notices
        )
        self.inputs = {"x": TensorSpec("x", (1, 4), "float32"), "ids": TensorSpec("ids", (1, 7), "int32")}
        self.outputs = {"y": TensorSpec("y", (1,), "float32")}
        self.calls = 0

    def predict(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        assert arrays["x"].shape == (1, 4)
        assert arrays["ids"].dtype == np.int32
        clock.pass_call(delay(self.units, self.package), self.calls)
        self.calls += 1
        return {"y": np.full(1, np.nan if PLAN.get(self.units) == "nan" else 1.0, np.float32)}


class Picture:
    """Whole pictures: twenty calls of the stub."""

    def __init__(self, job: dict, options: EngineOptions) -> None:
        self.job, self.engine, self.drawn = job, Stub(Path(job["folder"], "Unet.mlpackage"), options), 0

    def load(self) -> Realised:
        return self.engine.realised

    def run(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        started = clock()
        for _ in range(20):
            self.engine.predict(x=np.ones((1, 4), np.float32), ids=np.ones((1, 7), np.int32))
        latents = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 4, 8, 8)
        if self.engine.units != "cpu":  # the reference runs on the portable engine
            latents = latents + np.float32(0.01)
        if self.drawn == 0 and self.job["keep"] is not None:
            np.save(self.job["keep"], latents)
        self.drawn += 1
        stages = {"prepare": 0.0, "denoise": clock() - started, "decode": 0.0, "evaluations": 20.0}
        return {"latents": latents}, stages


worker.Picture = Picture
serve(Stub, clock)
