"""A child that is timed, for `tune`: python tune_child.py '{"cpu_and_ne Unet": 0.2}' JOB

The plan says for "UNITS PACKAGE", UNITS or PACKAGE (or a device in the place of units) how many seconds a call takes,
or what goes wrong: "killed", "hangs", "refused", "nan", "wrong" (other results than the reference's), "moves" (it runs
on the CPU). Nothing waits: the clock is moved on. A package whose name ends in _1 has one row, others have two.
"""

import json
import sys
from pathlib import Path

import numpy as np
from timed_child import Clock, serve, suffer

from glassine.runtime.engine import EngineOptions, Realised
from glassine.runtime.engine.contract import TensorSpec

PLAN = json.loads(sys.argv[1])
clock = Clock()


class Stub:
    def __init__(self, package: Path, options: EngineOptions, *, function: str | None = None) -> None:
        reference = options.engine == "portable" and options.device is None
        units = options.compute_units if options.compute_units is not None else options.device
        keys = (f"{units} {package.stem}", units, package.stem)
        self.planned = 1.0 if reference else next((PLAN[key] for key in keys if key in PLAN), 1.0)
        if self.planned == "refused":
            suffer("refused")
        device = "cpu_only" if self.planned == "moves" else str(units)
        self.realised = Realised(engine=options.engine, device=device, precision="", load_seconds=0.0)
        rows = 1 if package.stem.endswith("_1") else 2
        self.inputs = {"x": TensorSpec("x", (rows, 4), "float32")}
        self.outputs = {"y": TensorSpec("y", (rows, 4), "float32")}
        self.calls = 0

    def predict(self, x: np.ndarray) -> dict[str, np.ndarray]:
        suffer(self.planned)
        clock.pass_call(self.planned if isinstance(self.planned, float) else 0.001, self.calls)
        self.calls += 1
        worse = {"wrong": 0.2, "nan": np.nan}.get(self.planned, 0.0) if isinstance(self.planned, str) else 0.0
        return {"y": x + np.float32(worse)}


serve(Stub, clock)
