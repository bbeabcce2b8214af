"""A child process that tries packages on a Core ML of a few lines: compiling copies, predicting counts.

    python light_trial.py '{"load CPU_AND_NE": "killed"}' JOB

What runs is glassine.runtime.engine.trial as on a Mac; only coremltools is replaced, so that a test can start hundreds.
In the folder LIGHT_TRIAL_LOG, if that is set, "pids" and "compilations" get a line each.
"""

import enum
import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np

from glassine.runtime.engine import trial

FAULTS = json.loads(sys.argv[1])


def log(name: str) -> None:
    if folder := os.environ.get("LIGHT_TRIAL_LOG"):
        with (Path(folder) / name).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")


def suffer(where: str) -> None:
    fault = FAULTS.get(where, "")
    if fault == "killed":
        print("Core ML's last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        time.sleep(3600)
    if fault == "refused":
        raise RuntimeError("ANECCompile() FAILED (11)")
    if fault == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if fault.startswith("slow "):
        time.sleep(float(fault.split()[1]))


class ComputeUnit(enum.Enum):
    ALL, CPU_AND_NE, CPU_AND_GPU, CPU_ONLY = range(4)


class CompiledMLModel:
    def __init__(self, path: str, units: ComputeUnit, function: str | None) -> None:
        assert Path(path).is_dir()
        self.units = units.name
        suffer(f"load {self.units}")

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        suffer(f"predict {self.units}")
        value = np.nan if FAULTS.get(f"predict {self.units}") == "nan" else float(len(inputs))
        return {"out0": np.full((1,), value, np.float32)}


def compile_model(package: str, destination: str) -> str:
    made = Path(os.environ["TMPDIR"]) / "made.mlmodelc"
    made.mkdir()
    for path in sorted(Path(package).rglob("*")):  # piece by piece: a kill can come between
        target = made / path.relative_to(package)
        target.mkdir() if path.is_dir() else shutil.copyfile(path, target)
        suffer("compile")
    log("compilations")
    return shutil.move(made, destination)


def module(name: str, **members: object) -> ModuleType:
    made = sys.modules[name] = ModuleType(name)
    vars(made).update(members)
    return made


log("pids")
model = module("coremltools.models.model", _ComputeUnit=ComputeUnit)
utils = module("coremltools.models.utils", compile_model=compile_model)
models = module("coremltools.models", model=model, utils=utils, CompiledMLModel=CompiledMLModel)
module("coremltools", models=models)
trial.main(sys.argv[2])
