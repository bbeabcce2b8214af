"""The first operation that goes wrong: a program and its reference run in step, compared result by result.

    package, reference, the same inputs -> operation 1 of both, operation 2 of both ... -> the first that differs

The reference is another package with the same operations, such as a fresh conversion (what differs is a constant), or
the same package in float32 (what differs is rounding, or an overflow of float16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.contract import Precision
from glassine.runtime.engine.portable.executor import Executable
from glassine.runtime.engine.portable.numerics import Numerics, open_device
from glassine.runtime.engine.portable.program import Constant, Function, Operation, read_package


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The first operation that goes wrong.

    kind: "differs" from the reference; "overflows" float16; is "not finite". name: of its result, as the network names
    it. index: how many operations ran before it, of `total`. psnr: dB against the reference, its largest value over
    the root mean square error; NaN where that makes no sense. constants: those it reads that are not the reference's.
    """

    kind: Literal["differs", "overflows", "not finite"]
    name: str
    type: str
    index: int
    total: int
    psnr: float
    detail: str
    constants: tuple[str, ...] = ()


def locate(
    package: Path,
    reference: Path,
    arrays: Mapping[str, NDArray[np.generic]],
    *,
    threshold: float,
    precision: Precision = "fp32",
    function: str | None = None,
    reference_function: str | None = None,
) -> Fault | None:
    """Return the first operation of a package whose result is further from the reference's than `threshold`.

    Args:
        package, reference: with the same operations; the reference runs in float32.
        arrays: one for every input, of its shape.
        threshold: dB, below which a result differs; math.inf: at the first bit.
        precision: in which the package runs.
        function, reference_function: of packages that have several.

    Raises:
        EngineError: their operations are not the same, or cannot be run.
    """
    tried, right = read_package(package), read_package(reference)
    ours, theirs = tried.function(function), right.function(reference_function)
    total = _check_same(package, reference, ours, theirs)
    device = open_device("cpu")
    program = Executable(tried, ours, Numerics(device, rounds=precision == "fp16"), fused=False)
    judge = Executable(right, theirs, Numerics(device, rounds=False), fused=False)
    constants = None if package == reference else (_producers(ours), _producers(theirs))
    steps = program.trace(program.feed(dict(arrays)))
    for index, (operation, expected) in enumerate(judge.trace(judge.feed(dict(arrays)))):
        here = partial(Fault, name=operation.outputs[0].name, type=operation.type, index=index, total=total)
        try:
            _, results = next(steps)
        except EngineError as error:
            if "overflows float16" not in str(error):
                raise
            return here(kind="overflows", psnr=math.nan, detail=str(error))
        changed = () if constants is None else _changed_constants(operation, *constants)
        compared = (_compare(actual, wanted, threshold) for actual, wanted in zip(results, expected, strict=True))
        found = next((one for one in compared if one is not None), None)
        if found is None and changed:
            found = "differs", math.inf, "these inputs do not show it, its constants do"
        if found is not None:
            kind, psnr, detail = found
            return here(kind=kind, psnr=psnr, detail=detail, constants=changed)
    return None


def _compare(actual: Any, wanted: Any, threshold: float) -> tuple[Literal["differs", "not finite"], float, str] | None:
    """What is wrong with one result; None: nothing."""
    if not (isinstance(actual, Tensor) and isinstance(wanted, Tensor)):
        return None  # nothing reads it, or it is a list whose elements are compared when they are read
    if actual.shape != wanted.shape:
        return "differs", math.nan, f"has shape {tuple(actual.shape)}, the reference {tuple(wanted.shape)}"
    if torch.equal(actual, wanted):
        return None
    if not wanted.is_floating_point():
        return "differs", math.nan, f"{int((actual != wanted).sum())} of {wanted.numel()} whole numbers differ"
    errors = actual - wanted
    if not bool(torch.isfinite(errors).all()):  # where it is needed alone: attention has results of gigabytes
        strange = torch.isfinite(wanted) & ~torch.isfinite(actual)
        if bool(strange.any()):
            return "not finite", math.nan, f"{int(strange.sum())} of {wanted.numel()} numbers are NaN or infinite"
        both = torch.isfinite(errors)
        errors, wanted = errors[both], wanted[both]
    if not errors.numel():
        return None
    error = float(torch.linalg.vector_norm(errors, dtype=torch.float64)) / errors.numel() ** 0.5
    top, most = (float(torch.linalg.vector_norm(each, math.inf)) for each in (wanted, errors))
    psnr = math.inf if error == 0 else (20 * math.log10(top / error) if top > 0 else -math.inf)
    if psnr >= threshold:
        return None
    return "differs", psnr, f"by up to {most:.3g}, where the largest number is {top:.3g}"


def _check_same(package: Path, reference: Path, ours: Function, theirs: Function) -> int:
    """How many operations both have; refuses programs that cannot be run in step."""
    pair = [_operations(function) for function in (ours, theirs)]
    for index, (one, other) in enumerate(zip(*pair, strict=False)):
        if _identity(one) != _identity(other):
            raise EngineError(
                f"{package}: operation {index} is {' '.join(_identity(one))}, in {reference} it is "
                f"{' '.join(_identity(other))}; only packages with the same operations can be compared"
            )
    if len(pair[0]) != len(pair[1]):
        raise EngineError(
            f"{package}: {len(pair[0])} operations, {reference} has {len(pair[1])}; they must be the same"
        )
    return len(pair[0])


def _operations(function: Function) -> list[Operation]:
    return [op for op in function.body.operations if op.type != "const" and not op.type.startswith("constexpr_")]


def _identity(operation: Operation) -> tuple[str, ...]:
    return operation.type, *(variable.name for variable in operation.outputs)


def _producers(function: Function) -> dict[str, Operation]:
    return {op.outputs[0].name: op for op in function.body.operations if op.outputs}


def _changed_constants(
    operation: Operation, ours: Mapping[str, Operation], theirs: Mapping[str, Operation]
) -> tuple[str, ...]:
    """The constants an operation reads that have other values in the other program."""
    names = [item for bound in operation.inputs.values() for item in bound if isinstance(item, str)]
    shared = [name for name in names if name in ours and name in theirs]
    return tuple(name for name in shared if not _same_constant(ours[name], theirs[name]))


def _same_constant(one: Operation, other: Operation) -> bool:
    def values(operation: Operation) -> dict[str, Constant]:
        bound = {key: item[0] for key, item in operation.inputs.items()}
        return {**operation.attributes, **{key: item for key, item in bound.items() if isinstance(item, Constant)}}

    if one.type != "const" and not one.type.startswith("constexpr_"):
        return True
    mine, theirs = values(one), values(other)
    if mine.keys() != theirs.keys():
        return False
    return all(mine[key].array().tobytes() == theirs[key].array().tobytes() for key in mine if key != "name")
