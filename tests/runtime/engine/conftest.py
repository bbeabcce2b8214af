"""Packages made with coremltools' own builder, and programs run in a fresh interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from glassine.runtime.engine.portable.executor import PortableEngine

HERE = Path(__file__).parent

DTYPES = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}
Arrays = dict[str, np.ndarray]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # ct.convert leaves a TemporaryDirectory to the garbage collector.
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"))


@pytest.fixture(scope="session", autouse=True)
def _fast_conversions() -> Iterator[None]:
    # ct.convert collects garbage every time; what is loaded by now need not be looked through again.
    gc.freeze()
    yield
    gc.unfreeze()


def make_package(
    path: Path, build: Callable[..., Any], inputs: Arrays, *, opset: ct.target = ct.target.iOS18, half: bool = False
) -> Path:
    """Write build(**inputs) as a package whose operations are exactly those `build` makes."""
    placeholders = {name: mb.placeholder(x.shape, dtype=DTYPES[str(x.dtype)]) for name, x in inputs.items()}
    program = Program()
    with Function(placeholders, opset_version=opset) as function:
        outputs = build(**function.inputs)
        outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
        function.set_outputs([mb.identity(x=x, name=f"out{number}") for number, x in enumerate(outputs)])
    program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=opset,
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.DEFAULT if half else ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., Path]:
    """package(build, opset=..., half=..., **inputs) -> path of a package."""
    made: list[Path] = []

    def make(
        build: Callable[..., Any], *, opset: ct.target = ct.target.iOS18, half: bool = False, **inputs: Any
    ) -> Path:
        made.append(tmp_path / f"{len(made)}.mlpackage")
        return make_package(made[-1], build, inputs, opset=opset, half=half)

    return make


@pytest.fixture
def run(package: Callable[..., Path]) -> Iterator[Callable[..., list[np.ndarray]]]:
    """run(build, opset=..., precision=..., **inputs) -> the outputs of the portable engine, in order."""
    engines: list[PortableEngine] = []

    def predict(build: Callable[..., Any], *, precision: str = "fp32", **arguments: Any) -> list[np.ndarray]:
        inputs = {key: value for key, value in arguments.items() if isinstance(value, np.ndarray)}
        engines.append(PortableEngine(package(build, **arguments), precision=precision))
        return [np.array(value) for value in engines[-1].predict(**inputs).values()]

    yield predict
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """python(program, *arguments) -> what a fresh interpreter prints."""

    def execute(program: str, *arguments: object) -> str:
        command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return execute
