"""Where the operations of a package run: Core ML's own plan on a Mac, a rule table's prediction elsewhere.

    package -> rules: what the Neural Engine does not take, and why  -> prediction
    package -> Core ML compiles it -> MLComputePlan, operation by operation -> plan, with the rules' reasons

The rules are what Core ML's compiler says in its errors and what others have measured; Apple documents none of them.
A plan that contradicts them is shown as it is: then the reason is not known.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glassine.errors import EngineError
from glassine.runtime.engine.contract import ComputeUnits
from glassine.runtime.engine.portable.program import Function, Operation, Program, Variable, read_package
from glassine.runtime.engine.portable.summary import flops_of

Unit = Literal["neural_engine", "gpu", "cpu"]
UNITS: tuple[Unit, ...] = ("neural_engine", "gpu", "cpu")

MAX_RANK = 5
MAX_SIDE = 16384  # depth, height and width
MAX_CHANNELS = 65536  # batch and channels
MAX_WEIGHTS = 2**31 - 1  # bytes of a package's weight file
_HOST = {
    "control flow": ("cond", "while_loop"),
    "a list": ("make_list", "list_gather", "list_length", "list_read", "list_scatter", "list_write"),
    "a gather": ("gather", "gather_along_axis", "gather_nd"),
    "a scatter": ("scatter", "scatter_along_axis", "scatter_nd"),
    "sorting": ("argsort", "topk", "non_maximum_suppression"),
    "a shape or a selection that depends on values": ("non_zero", "shape", "range_1d", "fill"),
    "random numbers": ("random_bernoulli", "random_categorical", "random_normal", "random_uniform"),
}
_HOST_OPERATIONS = {operation: kind for kind, operations in _HOST.items() for operation in operations}
_FLOATS = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Placed:
    """One operation: its result's name, what it is, where it runs, its share of the whole cost, 0 to 1.

    reason: why the Neural Engine does not take it, as far as the rules know; "" if it does, or was not asked for.
    """

    name: str
    type: str
    unit: Unit
    cost: float
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a package's operations run, constants left out, in the program's order.

    source: "plan", what Core ML says, or "prediction", what the rules say. Costs of a plan are Core ML's estimate; of
    a prediction they count floating-point operations, or elements where an operation has none.
    """

    source: Literal["plan", "prediction"]
    operations: tuple[Placed, ...]

    def share(self, unit: Unit) -> float:
        """The share of the cost on one unit, 0 to 1."""
        return math.fsum(each.cost for each in self.operations if each.unit == unit)

    def count(self, unit: Unit) -> int:
        """How many operations run on one unit."""
        return sum(each.unit == unit for each in self.operations)


def placement(package: Path, units: ComputeUnits, function: str | None = None) -> Placement:
    """Say where the operations of a package run: Core ML's plan on a Mac (and its stand-in), else the prediction.

    Args:
        package: an .mlpackage. units: those that Core ML may use. function: of a package with several.

    Raises:
        PackageError, EngineError: the package is damaged, or Core ML cannot compile it.
    """
    program = read_package(package)
    if sys.platform == "darwin" or "coremltools.libcoremlpython" in sys.modules:
        return plan(program, units, function)
    return predict(program, units, function)


def predict(program: Program, units: ComputeUnits, function: str | None = None) -> Placement:
    """Predict from the rules alone where operations run; what the Neural Engine refuses goes to the next unit."""
    entry = program.function(function)
    reasons = _reasons(program, entry) if _has_neural_engine(units) else {}
    rest: Unit = "gpu" if units in ("all", "cpu_and_gpu") else "cpu"
    work = {_name(operation): operation for operation in _work(entry)}
    costs = _costs(entry, work)
    first: Unit = "neural_engine" if _has_neural_engine(units) else rest
    placed = [
        Placed(name, operation.type, rest if name in reasons else first, costs[name], reasons.get(name, ""))
        for name, operation in work.items()
    ]
    return Placement("prediction", tuple(placed))


def plan(program: Program, units: ComputeUnits, function: str | None = None) -> Placement:
    """Ask Core ML where it will run each operation.

    Raises:
        EngineError: it cannot compile the package, or has no plan for it.
    """
    from coremltools import ComputeUnit
    from coremltools.models.compute_plan import MLComputePlan
    from coremltools.models.utils import compile_model

    entry = program.function(function)
    with tempfile.TemporaryDirectory(prefix="glassine_plan_", ignore_cleanup_errors=True) as place:
        try:
            compiled = compile_model(str(program.package), str(Path(place) / f"{program.package.stem}.mlmodelc"))
            asked = MLComputePlan.load_from_path(compiled, ComputeUnit[units.upper()])
            functions = asked.model_structure.program.functions
        except Exception as error:  # coremltools raises plain Exceptions and RuntimeErrors with Core ML's text
            raise EngineError(f"{program.package}: Core ML has no plan for it ({error})") from error
        if entry.name not in functions:
            raise EngineError(
                f"{program.package}: Core ML's plan has no function {entry.name}, only {sorted(functions)}"
            )
        reasons = _reasons(program, entry)
        placed = []
        for operation in _planned(functions[entry.name].block):
            usage = asked.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is None:  # constants
                continue
            name, unit = operation.outputs[0].name, _unit_of(usage.preferred_compute_device)
            left = _has_neural_engine(units) and unit != "neural_engine"
            cost = asked.get_estimated_cost_for_mlprogram_operation(operation)
            why = reasons.get(name, "not known") if left else ""
            placed.append(Placed(name, operation.operator_name, unit, 0.0 if cost is None else cost.weight, why))
    total = math.fsum(one.cost for one in placed)  # of all functions it may be 1, of this one less
    return Placement("plan", tuple(replace(one, cost=one.cost / total if total else 0.0) for one in placed))


def _planned(block: Any) -> Iterator[Any]:
    """The operations of Core ML's structure, those of nested blocks after the one that holds them."""
    for operation in block.operations:
        if operation.outputs:
            yield operation
        for inner in operation.blocks:
            yield from _planned(inner)


def _unit_of(device: Any) -> Unit:
    kinds: dict[str, Unit] = {"MLNeuralEngineComputeDevice": "neural_engine", "MLGPUComputeDevice": "gpu"}
    return kinds.get(type(device).__name__, "cpu")


def _has_neural_engine(units: ComputeUnits) -> bool:
    return units in ("all", "cpu_and_ne")


def _work(entry: Function) -> list[Operation]:
    return [
        operation
        for operation in entry.body.walk()
        if operation.outputs and operation.type != "const" and not operation.type.startswith("constexpr_")
    ]


def _name(operation: Operation) -> str:
    return operation.outputs[0].name


def _costs(entry: Function, work: dict[str, Operation]) -> dict[str, float]:
    """Name -> share of the cost."""
    flops = flops_of(entry)
    counts = {}
    for name, operation in work.items():
        elements = sum(math.prod(dim for dim in one.type.shape if dim is not None) for one in operation.outputs)
        counted = flops.get(name)
        counts[name] = counted if counted is not None else elements
    total = sum(counts.values())
    return {name: count / total if total else 0.0 for name, count in counts.items()}


def _reasons(program: Program, entry: Function) -> dict[str, str]:
    """Name of an operation -> why the Neural Engine does not take it; those that it takes are left out."""
    sizes = {name: file.size for name, file in program.weights.items()}
    big = [
        f"{name} has {size:,} bytes, at most {MAX_WEIGHTS:,} fit" for name, size in sizes.items() if size > MAX_WEIGHTS
    ]
    variables = {one.name: one for one in entry.body.inputs}
    work = _work(entry)
    # Constants are no tensors that travel: a convolution's strides are whole numbers too.
    variables |= {one.name: one for operation in work for one in operation.outputs}
    found = {}
    for operation in work:
        reason = big[0] if big else _reason(operation, variables)
        if reason:
            found[_name(operation)] = reason
    return found


def _reason(operation: Operation, variables: dict[str, Variable]) -> str:
    """The first rule that one operation breaks; "" if none."""
    if operation.type in _HOST_OPERATIONS:
        return f"{_HOST_OPERATIONS[operation.type]} ({operation.type})"
    read = [variables[item] for bound in operation.inputs.values() for item in bound
            if isinstance(item, str) and item in variables]  # fmt: skip
    for variable in (*operation.outputs, *read):
        reason = _type_reason(variable)
        if reason:
            return f"{reason}: {variable.name}"
    return ""


def _type_reason(variable: Variable) -> str:
    kind, dtype, shape = variable.type.kind, variable.type.dtype, variable.type.shape
    if kind != "tensor":
        return ""
    if dtype in _FLOATS:
        return f"computes in {dtype}"
    if dtype.startswith(("int", "uint")) and shape:  # parameters such as axes are no tensors
        return f"computes in {dtype}"
    if None in shape:
        return "a shape that is known only when running"
    if len(shape) > MAX_RANK:
        return f"rank {len(shape)}, at most {MAX_RANK} fit"
    first_side = min(2, len(shape) - 2)
    for axis, dim in enumerate(shape):
        limit = MAX_SIDE if axis >= first_side else MAX_CHANNELS
        if dim is not None and dim > limit:
            return f"a side of {dim}, at most {limit} fit"
    return ""
