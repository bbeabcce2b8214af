"""A stand-in for `coremltools.libcoremlpython`, the macOS-only bridge to Core ML, built on the portable engine.

    proxy.install()                  # before or after coremltools is imported
    coremltools.models.MLModel(path).predict({...})

After `install()`, coremltools believes it runs on macOS 15.5: MLModel, CompiledMLModel, compile_model, states and
optimization hints work on Linux, and so does coremltools' own test suite. It is for tests; nothing else imports it.
What Core ML says with an NSError is a RuntimeError here too, as coremltools expects. The child processes in which the
Core ML engine tries packages run through the stand-in too, with the faults that `install` is told to show there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from glassine.errors import GlassineError
from glassine.runtime.engine import trial
from glassine.runtime.engine.contract import Precision
from glassine.runtime.engine.portable import plan
from glassine.runtime.engine.portable.executor import Executable, to_array
from glassine.runtime.engine.portable.numerics import Numerics, open_device
from glassine.runtime.engine.portable.program import Feature, read_package

MACOS_VERSION = (15, 5)
_MODULE = "coremltools.libcoremlpython"

Fault = Literal["killed", "hangs", "refused", "nan", "full", "wrong"]


class _MLModelStateProxy:
    """The state of one model: a tensor per state feature, zero at first."""

    def __init__(self, features: tuple[Feature, ...], numerics: Numerics) -> None:
        self.values = {
            feature.name: [torch.zeros(feature.shape, dtype=numerics.dtype(feature.dtype), device=numerics.device)]
            for feature in features
        }

    def read_state(self, name: str) -> NDArray[Any]:
        """Return a copy of one state."""
        return np.array(to_array(self._cell(name)[0]))

    def write_state(self, name: str, value: NDArray[Any]) -> None:
        """Replace one state by an array of its shape."""
        cell = self._cell(name)
        if tuple(value.shape) != tuple(cell[0].shape):
            raise RuntimeError(f"state {name!r} has shape {tuple(cell[0].shape)}, got {value.shape}")
        cell[0] = torch.from_numpy(np.ascontiguousarray(value)).to(cell[0])

    def _cell(self, name: str) -> list[torch.Tensor]:
        if name not in self.values:
            raise RuntimeError(f"no state {name!r}; the model has {sorted(self.values)}")
        return self.values[name]


class _MLModelProxy:
    """One loaded package or compiled folder, with the methods coremltools calls."""

    precision: Precision = "fp32"
    device = "cpu"
    faults: Mapping[str, Fault] = {}
    delays: Mapping[str, float] = {}  # "CPU_AND_NE Unet" or "CPU_AND_NE" -> seconds that a prediction takes longer

    def __init__(
        self,
        path: str,
        compute_unit: str,
        function: str = "",
        hints: Mapping[str, str] | None = None,
        asset: Any = None,
    ) -> None:
        """Compile the function (the default one if empty); compute units and hints change nothing here."""
        started = time.perf_counter_ns()
        if asset is not None:
            raise RuntimeError("models in memory are not supported by the portable engine")
        self._units = compute_unit
        _suffer(self.faults.get(f"load {compute_unit}"))
        self._path = Path(path)
        try:
            program = read_package(self._path)
            self._function = program.function(function or None)
            numerics = Numerics(open_device(self.device), rounds=self.precision == "fp16")
            self._executable = Executable(program, self._function, numerics)
        except GlassineError as error:
            raise RuntimeError(str(error)) from error
        self._compiled: str | None = None
        self._load_nanoseconds = time.perf_counter_ns() - started
        self._predict_nanoseconds: int | None = None

    def predict(self, data: Mapping[str, Any], state: _MLModelStateProxy | None = None) -> dict[str, Any]:
        """Return one array (float32, int32) per output, or what a classifier returns; scalars have shape (1,)."""
        started = time.perf_counter_ns()
        fault = self.faults.get(f"predict {self._units}")
        _suffer(fault)
        time.sleep(self.delays.get(f"{self._units} {self._path.stem}", self.delays.get(self._units, 0.0)))
        arrays = {feature.name: self._input(feature, data) for feature in self._function.inputs}
        states = {feature.name: state.values[feature.name] for feature in self._function.states} if state else {}
        if self._function.states and not states:
            raise RuntimeError(f"{self._path}: the model has states; call predict with the result of make_state()")
        try:
            results = self._executable({**self._executable.feed(arrays), **states})
        except GlassineError as error:
            raise RuntimeError(f"Unable to compute the prediction using ML Program: {error}") from error
        self._predict_nanoseconds = time.perf_counter_ns() - started
        outputs = {feature.name: _output(results[feature.name]) for feature in self._function.outputs}
        if fault in ("nan", "wrong"):  # a wrong result is one that a check for NaN lets pass
            return {name: array[::-1] * (np.nan if fault == "nan" else -0.5) for name, array in outputs.items()}
        return outputs

    def batchPredict(self, batch: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Predict one by one."""
        return [self.predict(data) for data in batch]

    def newState(self) -> _MLModelStateProxy:
        """Return a state of zeros."""
        return _MLModelStateProxy(self._function.states, self._executable.numerics)

    def get_compiled_model_path(self) -> str:
        """Return the folder `compileModel` makes of this package."""
        if self._compiled is None:
            self._compiled = self.compileModel(str(self._path))
        return self._compiled

    def get_load_duration_in_nano_seconds(self) -> int:
        """How long loading took."""
        return self._load_nanoseconds

    def get_last_predict_duration_in_nano_seconds(self) -> int | None:
        """How long the last predict took, None before the first."""
        return self._predict_nanoseconds

    @staticmethod
    def compileModel(path: str) -> str:
        """Return a new .mlmodelc folder: here a copy of the package, its weights hard-linked where possible."""
        if not (Path(path) / "Manifest.json").is_file():
            raise RuntimeError(f"{path}: only packages of ML Programs can be compiled here")
        _suffer(_MLModelProxy.faults.get("compile"))
        folder = Path(tempfile.mkdtemp(prefix="portable_")) / (Path(path.rstrip("/")).stem + ".mlmodelc")
        shutil.copytree(path, folder, copy_function=_link_or_copy)
        return str(folder)

    @staticmethod
    def maximum_supported_specification_version() -> int:
        """The newest specification coremltools writes."""
        return 10

    @staticmethod
    def auto_set_specification_version(spec: Any) -> Any:
        """Leave the specification as it is."""
        return spec

    @staticmethod
    def get_available_compute_devices() -> list[Any]:
        """No Core ML device is here."""
        return []

    get_all_compute_devices = get_available_compute_devices
    get_compute_plan = staticmethod(plan.compute_plan)
    get_model_structure = staticmethod(plan.structure)

    def _input(self, feature: Feature, data: Mapping[str, Any]) -> NDArray[Any]:
        if feature.kind != "array":
            raise RuntimeError(f"input {feature.name!r} is of type {feature.kind}; the portable engine takes arrays")
        if feature.name not in data:
            raise RuntimeError(f"input {feature.name!r} is required but not provided")
        array = np.asarray(data[feature.name])
        if not feature.flexible and array.shape != feature.shape:
            raise RuntimeError(f"input {feature.name!r} has shape {array.shape}, the model expects {feature.shape}")
        return array.astype(np.int32 if feature.dtype.startswith("int") else np.float32)


def _suffer(fault: Fault | None) -> None:
    """Do what Core ML has been seen to do."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        time.sleep(3600)
    if fault == "refused":
        raise RuntimeError("ANECCompile() FAILED (11)")
    if fault == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _output(value: Any) -> Any:
    array = to_array(value)
    return array.reshape(1) if isinstance(array, np.ndarray) and array.ndim == 0 else array


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def install(
    *, precision: Precision = "fp32", device: str = "cpu", trial_faults: Mapping[str, Fault] | None = None
) -> None:
    """Make coremltools use the portable engine and believe it runs on macOS.

    Args:
        trial_faults: what goes wrong in child processes: "compile", "load CPU_AND_NE", "predict ALL" ... -> how.
    """
    _MLModelProxy.precision = precision
    _MLModelProxy.device = device
    said = json.dumps([precision, device, dict(trial_faults) if trial_faults is not None else {}])
    trial.TRIAL = (sys.executable, "-m", "glassine.runtime.engine.portable.proxy", said)
    module = ModuleType(_MODULE)
    vars(module)["_MLModelProxy"] = _MLModelProxy
    vars(module)["_MLModelAssetProxy"] = type("_MLModelAssetProxy", (), {})
    vars(module)["_MLComputePlanProxy"] = plan.PlanProxy
    vars(module)["_MLCPUComputeDeviceProxy"] = plan.CPU
    vars(module)["_MLGPUComputeDeviceProxy"] = plan.GPU
    vars(module)["_MLNeuralEngineComputeDeviceProxy"] = plan.NeuralEngine
    sys.modules[_MODULE] = module
    import coremltools.models

    # coremltools asks for the platform through these names, copied by value into many of its modules.
    answers = {"_is_macos": lambda: True, "_macos_version": lambda: MACOS_VERSION, "_IS_MACOS": True}
    classes = {name: value for name, value in vars(module).items() if name.endswith("Proxy")}
    for name, loaded in list(sys.modules.items()):
        if name == "coremltools" or name.startswith("coremltools."):
            for key, value in {**answers, **classes}.items():
                if key in vars(loaded):
                    setattr(loaded, key, value)
    vars(coremltools)["libcoremlpython"] = module


def installed() -> bool:
    """Whether `install` has been called in this process."""
    return isinstance(sys.modules.get(_MODULE), ModuleType) and (
        getattr(sys.modules[_MODULE], "_MLModelProxy", None) is _MLModelProxy
    )


def _be_trial(said: str, job: str) -> None:
    """Be a child process that tries a package: on the stand-in, with its faults."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    precision, device, faults = json.loads(said)
    install(precision=precision, device=device)
    _MLModelProxy.faults = faults
    trial.main(job)


if __name__ == "__main__":
    _be_trial(*sys.argv[1:])
