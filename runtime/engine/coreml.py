"""Runs a package, or a model compiled before, with Core ML: coremltools' own compile_model and CompiledMLModel.

package -> compiled folder -> CompiledMLModel on the compute units asked for -> float32 arrays
"""

from __future__ import annotations

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
from glassine.runtime.engine.contract import COMPILED, ComputeUnits, Realised, TensorSpec, check_inputs
from glassine.runtime.engine.interface import read_interface

_UNITS: dict[str, str] = {
    "all": "ALL",
    "cpu_and_ne": "CPU_AND_NE",
    "cpu_and_gpu": "CPU_AND_GPU",
    "cpu_only": "CPU_ONLY",
}


class CoreMLEngine:
    """One package on Core ML.

    `predict` takes and returns NumPy arrays. Inputs go in as contiguous float32 (coremltools wraps those without a
    copy and casts float16 ones itself); outputs come back as float32 whatever the program declares.
    """

    def __init__(
        self, package: Path | str, *, compute_units: ComputeUnits = "all", function: str | None = None
    ) -> None:
        """Compile and load the package.

        Raises:
            PackageError: the package is damaged.
            EngineError: this is not a Mac, or Core ML refuses the package; the message holds its reason.
        """
        started = time.perf_counter()
        self._package = Path(package)
        interface = read_interface(self._package, function)
        self.inputs: Mapping[str, TensorSpec] = interface.inputs
        self.outputs: Mapping[str, TensorSpec] = interface.outputs
        models = _coreml_models(self._package)
        self._scratch = Path(tempfile.mkdtemp(prefix="glassine_coreml_"))
        try:
            units = models.model._ComputeUnit[_UNITS[compute_units]]
            compiled = compiled_model(self._package, self._scratch)
            self._model = models.CompiledMLModel(str(compiled), units, function)
        except Exception as error:  # coremltools raises plain Exceptions and RuntimeErrors with Core ML's text
            self.close()
            raise EngineError(
                f"{self._package}: Core ML cannot load it on {compute_units} ({error}); "
                "try other compute units, or --engine portable"
            ) from error
        self.realised = Realised(
            engine="coreml",
            device=compute_units,
            precision="as converted",
            load_seconds=time.perf_counter() - started,
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

    def close(self) -> None:
        """Drop the model and what was compiled for it; the engine cannot be used afterwards."""
        self.__dict__.pop("_model", None)
        shutil.rmtree(self._scratch, ignore_errors=True)


def compiled_model(package: Path, scratch: Path) -> Path:
    """Return the .mlmodelc of a package. The seam of the compile cache: today it is compiled at every load."""
    if package.suffix == COMPILED:
        return package
    from coremltools.models.utils import compile_model

    return Path(compile_model(str(package), str(scratch / f"{package.stem}.mlmodelc")))


def _coreml_models(package: Path) -> Any:
    """Return `coremltools.models` where it can reach Core ML (or its stand-in, in tests)."""
    if sys.platform != "darwin" and "coremltools.libcoremlpython" not in sys.modules:
        raise EngineError(f"{package}: Core ML runs on macOS only, this is {sys.platform}; use --engine portable")
    import coremltools.models

    return coremltools.models
