"""The first operation that goes wrong: a program beside its reference, operation by operation.

    package, reference          -> what each operation reads, compared  -> the first that reads other constants
    package in fp16 and in fp32 -> run in step, compared by its results -> the first that differs

Equal operations on equal constants give equal results: of two packages nothing is run where all constants are equal,
else the reference up to the first operation that reads others, and that one of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.executor import Executable, reads
from glassine.runtime.engine.portable.numerics import Numerics, open_device
from glassine.runtime.engine.portable.program import Block, Constant, Function, Operation, Variable, read_package

Arrays = Mapping[str, NDArray[np.generic]]
Wrong = tuple[Literal["differs", "not finite"], float, str]  # kind, dB and detail of a fault
_PIECE = 1 << 20  # numbers that are compared at a time: attention has results of gigabytes


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


def locate_change(
    package: Path,
    reference: Path,
    arrays: Arrays,
    *,
    threshold: float,
    function: str | None = None,
    reference_function: str | None = None,
) -> Fault | None:
    """Return the first operation of a package that reads other constants than the reference's, and what comes of it.

    Args:
        package, reference: with the same operations; both run in float32, as far as is needed.
        arrays: one for every input, of its shape.
        threshold: dB, below which its result is said to differ; math.inf: at the first bit.
        function, reference_function: of packages that have several.

    Raises:
        EngineError: their operations are not the same, or cannot be run.
    """
    tried, judge = read_package(package), read_package(reference)
    ours, theirs = tried.function(function), judge.function(reference_function)
    pairs = _pairs(package, reference, ours, theirs)
    constants = _constants(ours), _constants(theirs)
    found = ((index, names) for index, pair in enumerate(pairs) if (names := _differences(*pair, *constants)))
    index, names = next(found, (0, ()))
    if not names:
        return None
    operation, judged = pairs[index]
    numerics = Numerics(open_device("cpu"), rounds=False)
    known = Executable(judge, _until(theirs, judged), numerics, fused=False)
    values = known(known.feed(arrays))
    alone = Executable(tried, _alone(ours, operation), numerics, fused=False)
    made = alone({variable.name: values[variable.name] for variable in _read(ours, operation)})
    results, expected = ([side[variable.name] for variable in operation.outputs] for side in (made, values))
    wrong = _first_wrong(results, expected, threshold)
    unseen: Wrong = ("differs", math.inf, "these inputs do not show it, its constants do")
    kind, psnr, detail = unseen if wrong is None else wrong
    return Fault(kind=kind, name=operation.outputs[0].name, type=operation.type, index=index, total=len(pairs),
                 psnr=psnr, detail=detail, constants=names)  # fmt: skip


def locate_rounding(package: Path, arrays: Arrays, *, threshold: float, function: str | None = None) -> Fault | None:
    """Return the first operation of a package whose result in float16 is further from float32's than `threshold` dB.

    Args:
        As `locate_change`.

    Raises:
        EngineError: an operation cannot be run.
    """
    program = read_package(package)
    entry = program.function(function)
    numerics = Numerics(open_device("cpu"), rounds=False)
    judge = Executable(program, entry, numerics, fused=False)
    tried = Executable(program, entry, replace(numerics, rounds=True), fused=False, records=judge.records)
    total = len(_operations(entry))
    steps = tried.trace(tried.feed(arrays))
    results: Sequence[Any] = ()
    for index, (operation, expected) in enumerate(judge.trace(judge.feed(arrays))):
        here = partial(Fault, name=operation.outputs[0].name, type=operation.type, index=index, total=total)
        try:
            _, results = next(steps)
        except EngineError as error:
            if "overflows float16" not in str(error):
                raise
            return here(kind="overflows", psnr=math.nan, detail=str(error))
        found = _first_wrong(results, expected, threshold)
        if found is not None:
            kind, psnr, detail = found
            return here(kind=kind, psnr=psnr, detail=detail)
        results = expected = ()  # noqa: PLW2901 - attention's are gigabytes: not held while the next operation runs
    return None


def _until(function: Function, last: Operation) -> Function:
    """The function up to this operation, which returns what that reads and makes."""
    operations = function.body.operations[: function.body.operations.index(last) + 1]
    outputs = dict.fromkeys(variable.name for variable in (*_read(function, last), *last.outputs))
    return replace(function, body=Block(function.body.inputs, operations, tuple(outputs)))


def _alone(function: Function, operation: Operation) -> Function:
    """The function with this operation alone, whose inputs are what it reads."""
    constants = (op for op in function.body.operations if _is_constant(op))
    outputs = tuple(variable.name for variable in operation.outputs)
    return replace(function, body=Block(tuple(_read(function, operation)), (*constants, operation), outputs))


def _read(function: Function, operation: Operation) -> list[Variable]:
    """What an operation reads that is computed, or given by the caller."""
    names = reads(operation)
    given = (*function.body.inputs, *(variable for op in _operations(function) for variable in op.outputs))
    return [variable for variable in given if variable.name in names]


def _first_wrong(results: Sequence[Any], expected: Sequence[Any], threshold: float) -> Wrong | None:
    """What is wrong with the first of an operation's results that is; None: nothing."""
    compared = (_compare(actual, wanted, threshold) for actual, wanted in zip(results, expected, strict=True))
    return next((one for one in compared if one is not None), None)


def _compare(actual: Any, wanted: Any, threshold: float) -> Wrong | None:
    """What is wrong with one result; None: nothing."""
    if not (isinstance(actual, Tensor) and isinstance(wanted, Tensor)):
        return None  # nothing reads it, or it is a list whose elements are compared when they are read
    if actual.shape != wanted.shape:
        return "differs", math.nan, f"has shape {tuple(actual.shape)}, the reference {tuple(wanted.shape)}"
    if not wanted.is_floating_point():
        wrong = int((actual != wanted).sum())
        return ("differs", math.nan, f"{wrong} of {wanted.numel()} whole numbers differ") if wrong else None
    strange, count, square, most, top = 0, 0, 0.0, 0.0, 0.0
    for mine, good in zip(*(torch.split(value.reshape(-1), _PIECE) for value in (actual, wanted)), strict=True):
        errors = mine - good
        if not math.isfinite(_norm(errors, 2)):
            strange += int((torch.isfinite(good) & ~torch.isfinite(mine)).sum())
            both = torch.isfinite(errors)
            errors, good = errors[both], good[both]  # noqa: PLW2901 - the rest is about these alone
        count, square = count + errors.numel(), square + _norm(errors, 2) ** 2
        most, top = max(most, _norm(errors, math.inf)), max(top, _norm(good, math.inf))
    if strange:
        return "not finite", math.nan, f"{strange} of {wanted.numel()} numbers are NaN or infinite"
    if not square:
        return None
    psnr = 20 * math.log10(top / math.sqrt(square / count)) if top > 0 else -math.inf
    if psnr >= threshold:
        return None
    return "differs", psnr, f"by up to {most:.3g}, where the largest number is {top:.3g}"


def _norm(values: Tensor, order: float) -> float:
    return float(torch.linalg.vector_norm(values, order, dtype=torch.float64)) if values.numel() else 0.0


def _pairs(package: Path, reference: Path, ours: Function, theirs: Function) -> list[tuple[Operation, Operation]]:
    """The operations of both, side by side; refuses programs that are not the same."""
    mine, others = _operations(ours), _operations(theirs)
    for index, (one, other) in enumerate(zip(mine, others, strict=False)):
        if (one.type, one.outputs) != (other.type, other.outputs):
            raise EngineError(
                f"{package}: operation {index} is {_named(one)}, in {reference} it is {_named(other)}; "
                "only packages with the same operations can be compared"
            )
        if one.blocks or other.blocks:
            raise EngineError(f"{package}: {_named(one)} holds operations of its own, which cannot be compared")
    if len(mine) != len(others):
        raise EngineError(f"{package}: {len(mine)} operations, {reference} has {len(others)}; they must be the same")
    return list(zip(mine, others, strict=True))


def _named(operation: Operation) -> str:
    return f"{operation.type} {', '.join(variable.name for variable in operation.outputs)}"


def _operations(function: Function) -> list[Operation]:
    return [operation for operation in function.body.operations if not _is_constant(operation)]


def _is_constant(operation: Operation) -> bool:
    return operation.type == "const" or operation.type.startswith("constexpr_")


def _constants(function: Function) -> dict[str, Operation]:
    """Name -> what makes the constant of this name."""
    made = (operation for operation in function.body.operations if _is_constant(operation))
    return {variable.name: operation for operation in made for variable in operation.outputs}


def _differences(
    one: Operation, other: Operation, ours: Mapping[str, Operation], theirs: Mapping[str, Operation]
) -> tuple[str, ...]:
    """What an operation reads that the other does not: the names of constants, or of its parameters."""
    if one.inputs.keys() != other.inputs.keys():
        return tuple(sorted(one.inputs.keys() ^ other.inputs.keys()))
    found: dict[str, None] = {}
    for parameter, bound in one.inputs.items():
        if len(bound) != len(other.inputs[parameter]):
            found[parameter] = None
        for mine, yours in zip(bound, other.inputs[parameter], strict=False):
            if isinstance(mine, str) and mine == yours:
                if (mine in ours) != (mine in theirs) or (mine in ours and not _same(ours[mine], theirs[mine])):
                    found[mine] = None
            elif isinstance(mine, str) or isinstance(yours, str) or not _equal(mine, yours):
                found[parameter] = None
    return tuple(found)


def _same(one: Operation, other: Operation) -> bool:
    """Whether two operations that make constants make the same one."""

    def values(operation: Operation) -> dict[str, Constant]:
        bound = {key: item[0] for key, item in operation.inputs.items()}
        return {**operation.attributes, **{key: item for key, item in bound.items() if isinstance(item, Constant)}}

    mine, theirs = values(one), values(other)
    if one.type != other.type or mine.keys() != theirs.keys():
        return False
    return all(_equal(mine[key], theirs[key]) for key in mine if key != "name")


def _equal(one: Constant, other: Constant) -> bool:
    """Whether two constants are equal, bit by bit."""
    if one.type != other.type:
        return False
    mine, theirs = one.array(), other.array()
    if mine.dtype.kind == "U":
        return np.array_equal(mine, theirs)
    bits = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (mine, theirs)]
    return np.array_equal(bits[0], bits[1])
