"""Runs a package, or a model compiled before, with Core ML: coremltools' own compile_model and CompiledMLModel.

package -> compiled and tried in a child process (cache.py) -> CompiledMLModel on units that work -> float32 arrays
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError
from glassine.runtime.engine.cache import Cache, Ready, Wanted, cache_root, prepare
from glassine.runtime.engine.contract import ComputeUnits, EngineOptions, Realised, TensorSpec, check_inputs
from glassine.runtime.engine.interface import Interface, read_interface
from glassine.runtime.engine.trial import UNITS


class CoreMLEngine:
    """One package on Core ML.

    `predict` takes and returns NumPy arrays. Inputs go in as contiguous float32 (coremltools wraps those without a
    copy and casts float16 ones itself); outputs come back as float32 whatever the program declares.
    """

    def __init__(
        self, package: Path | str, options: EngineOptions | None = None, *, function: str | None = None
    ) -> None:
        """Load the package on the compute units of `options`, or on the next ones if those fail: `realised` says so.

        Raises:
            PackageError: the package is damaged.
            EngineError: this is not a Mac, or Core ML refuses the package; the message holds its reason.
        """
        options = options if options is not None else EngineOptions()
        started = time.perf_counter()
        self._package = Path(package)
        interface = read_interface(self._package, function)
        self.inputs: Mapping[str, TensorSpec] = interface.inputs
        self.outputs: Mapping[str, TensorSpec] = interface.outputs
        models = _coreml_models(self._package)
        self._scratch = Path(tempfile.mkdtemp(prefix="glassine_coreml_"))
        try:
            ready = prepare(_wanted(self._package, interface, options, function), self._scratch)
            self._model = self._load(models, ready.model, ready.units, function)
        except BaseException:
            self.close()
            raise
        self.realised = Realised(
            engine="coreml",
            device=ready.units,
            precision="as converted",
            load_seconds=time.perf_counter() - started,
            notices=ready.notices,
        )

    def predict(self, **arrays: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Run the package on one array per input.

        Raises:
            EngineError: wrong inputs, or Core ML failed; the message holds its reason.
        """
        checked = check_inputs(str(self._package), self.inputs, arrays)
        try:
            results = self._model.predict(checked)
        except RuntimeError as error:
            raise EngineError(f"{self._package}: Core ML failed to run it ({error})") from error
        return {
            name: np.ascontiguousarray(results[name], np.int32 if spec.dtype.startswith("int") else np.float32)
            for name, spec in self.outputs.items()
        }

    def _load(self, models: Any, compiled: Path, units: ComputeUnits, function: str | None) -> Any:
        try:
            return models.CompiledMLModel(str(compiled), models.model._ComputeUnit[UNITS[units]], function)
        except Exception as error:  # coremltools raises plain Exceptions and RuntimeErrors with Core ML's text
            raise EngineError(
                f"{self._package}: Core ML cannot load it on {units} ({error}); "
                "try other compute units, or --engine portable"
            ) from error

    def close(self) -> None:
        """Drop the model, and what was compiled for this run alone; the engine cannot be used afterwards."""
        self.__dict__.pop("_model", None)
        shutil.rmtree(self._scratch, ignore_errors=True)


def warm(package: Path, options: EngineOptions, function: str | None = None, *, retry: bool = False) -> Ready:
    """Compile a package and try it now, so that it loads quickly later.

    Args:
        retry: try units again that failed before.

    Raises:
        PackageError: the package is damaged.
        EngineError: this is not a Mac, no compute unit runs the package, or the cache cannot be written.
    """
    _coreml_models(package)
    wanted = _wanted(package, read_interface(package, function), options, function)
    try:
        return Cache(cache_root()).ready(dataclasses.replace(wanted, retry=retry))
    except OSError as error:
        raise EngineError(
            f"the compile cache {cache_root()} cannot be written ({error}); set GLASSINE_CACHE to a folder of yours"
        ) from error


def _wanted(package: Path, interface: Interface, options: EngineOptions, function: str | None) -> Wanted:
    return Wanted(
        package=package,
        units="all" if options.compute_units is None else options.compute_units,
        inputs=tuple(interface.inputs.values()),
        function=function,
        timeout=options.load_timeout,
        tell=options.tell if options.tell is not None else lambda words: None,
        given_up=options.given_up,
    )


def _coreml_models(package: Path) -> Any:
    """Return `coremltools.models` where it can reach Core ML (or its stand-in, in tests)."""
    if sys.platform != "darwin" and "coremltools.libcoremlpython" not in sys.modules:
        raise EngineError(f"{package}: Core ML runs on macOS only, this is {sys.platform}; use --engine portable")
    import coremltools.models

    return coremltools.models
