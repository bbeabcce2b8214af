"""The contract every engine keeps: what goes in, what comes out, and the one place where inputs are checked."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, MissingDependency, PackageError

COMPILED = ".mlmodelc"  # the ending of what Core ML has compiled
EngineName = Literal["auto", "coreml", "portable"]
ComputeUnits = Literal["all", "cpu_and_ne", "cpu_and_gpu", "cpu_only"]
Precision = Literal["fp32", "fp16"]
Predict = Callable[..., Mapping[str, NDArray[np.generic]]]  # `Engine.predict`, or what stands in for it


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, static shape and dtype ("float32", "float16", "int32") of one input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Realised:
    """What really runs: the engine, the device or compute units it got, and the seconds that loading took.

    notices: what the user should know of it, such as compute units that failed and were passed over.
    """

    engine: str
    device: str
    precision: str
    load_seconds: float
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run packages.

    engine: "coreml" (macOS), "portable" (PyTorch, anywhere) or "auto" = Core ML on a Mac, portable elsewhere.
    compute_units: for Core ML; None is not said, and "all" wherever nothing else is known. device: for the portable
    engine ("cpu", "cuda", "mps"); None is not said, and "cpu".
    precision: for the portable engine; "fp16" rounds after every operation as the Neural Engine does.
    load_timeout: seconds that Core ML may take to load a package on one choice of compute units, before the next is
    tried. tell: is given what Core ML is doing, in words, when a package is loaded for the first time: it can take
    minutes. low_memory: a pipeline keeps only the parts loaded that one stage of a picture needs. given_up: says that
    nobody waits for the package any more that is being loaded; then Core ML is not waited for either.
    """

    engine: EngineName = "auto"
    compute_units: ComputeUnits | None = None
    device: str | None = None
    precision: Precision = "fp32"
    load_timeout: float = 900.0
    low_memory: bool = False
    tell: Callable[[str], None] | None = field(default=None, compare=False)
    given_up: Callable[[], bool] = field(default=lambda: False, compare=False)


class Engine(Protocol):
    """One loaded package.

    `predict` takes one array per input and returns a new dict of float32 (or int32) arrays, one per output. The
    engine may reuse its output buffers: a caller who keeps a result beyond the next call copies it.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    realised: Realised

    def predict(self, **arrays: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Run the package on one array per input."""
        ...

    def close(self) -> None:
        """Give up what the engine holds."""
        ...


def check_inputs(
    package: str, specs: Mapping[str, TensorSpec], arrays: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """Return `arrays` as contiguous arrays an engine can take, or say what is wrong with them.

    Floats become float32 (fp16 inputs are rounded by the program itself), integers int32.

    Raises:
        EngineError: an input is missing, unknown, of another shape, or a float where an integer is expected.
    """
    missing = sorted(set(specs) - set(arrays))
    unknown = sorted(set(arrays) - set(specs))
    if missing or unknown:
        raise EngineError(
            f"{package}: expected the inputs {sorted(specs)}, got {sorted(arrays)}"
            + (f"; missing {missing}" if missing else "")
            + (f"; unknown {unknown}" if unknown else "")
        )
    checked: dict[str, NDArray[np.generic]] = {}
    for name, spec in specs.items():
        array = np.asarray(arrays[name])
        if array.shape != spec.shape:
            raise EngineError(
                f'{package}: input "{name}" has shape {array.shape}, expected {spec.shape}; '
                "convert with the size, batch or token count you need"
            )
        wants_int = spec.dtype.startswith(("int", "uint"))
        if wants_int and not np.issubdtype(array.dtype, np.integer):
            raise EngineError(f'{package}: input "{name}" has dtype {array.dtype}, expected integers ({spec.dtype})')
        checked[name] = np.ascontiguousarray(array, dtype=np.int32 if wants_int else np.float32)
    return checked


def engine_name(options: EngineOptions) -> Literal["coreml", "portable"]:
    """The engine that `options` ask for, on this system."""
    if options.engine == "auto":
        return "coreml" if sys.platform == "darwin" else "portable"
    return options.engine


def open_engine(package: Path | str, options: EngineOptions | None = None, *, function: str | None = None) -> Engine:
    """Load one .mlpackage, or on a Mac one .mlmodelc, on the engine that `options` ask for.

    Args:
        function: of a package that has several; None is its default one.

    Raises:
        PackageError: there is no package at this path.
        EngineError: Core ML was asked for and this is not a Mac, or the package cannot be loaded.
        MissingDependency: the portable engine needs PyTorch and it is not installed.
    """
    options = options or EngineOptions()
    package = Path(package)
    compiled = package.suffix == COMPILED and (package / "coremldata.bin").is_file()
    if not (compiled or (package / "Manifest.json").is_file()):
        raise PackageError(f"{package}: not a model package (no Manifest.json); convert one with 'glassine convert'")
    if engine_name(options) == "coreml":
        from glassine.runtime.engine.coreml import CoreMLEngine

        return CoreMLEngine(package, options, function=function)
    if compiled:
        raise EngineError(
            f"{package}: compiled for Core ML, which is macOS's; elsewhere take the model's .mlpackage, "
            "or convert the checkpoint with 'glassine convert'"
        )
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency("the portable engine needs PyTorch; install it with: pip install 'glassine[portable]'")
    from glassine.runtime.engine.portable.executor import PortableEngine

    device = "cpu" if options.device is None else options.device
    return PortableEngine(package, device=device, precision=options.precision, function=function)
