"""Runs one function of a program: compiled once into a flat list of closures over numbered slots.

    program -> constants bound to kernels -> one closure per operation -> arrays

A value is dropped as soon as the last operation that reads it has run; constants are read from the mapped weight
file once, when the program is compiled, straight into the dtype they are computed in.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassine.errors import EngineError, GlassineError, PackageError
from glassine.runtime.engine.contract import Precision, Realised, TensorSpec, check_inputs
from glassine.runtime.engine.portable import ops as _ops  # noqa: F401 - registers the kernels
from glassine.runtime.engine.portable.constants import Constants
from glassine.runtime.engine.portable.fusion import fuse
from glassine.runtime.engine.portable.numerics import Numerics, open_device
from glassine.runtime.engine.portable.ops.constexpr import DECOMPRESS
from glassine.runtime.engine.portable.program import Block, Constant, Function, Operation, Program, read_package
from glassine.runtime.engine.portable.registry import KERNELS, Kernel, Node, from_value
from glassine.runtime.engine.portable.weights import WeightFile

Environment = list[Any]
Step = Callable[[Environment], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled block: where its arguments go, what it does, where its results are."""

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def run(self, environment: Environment) -> None:
        """Run every step on the slots of `environment`."""
        for step in self.steps:
            step(environment)

    def call(self, environment: Environment, *arguments: Any) -> tuple[Any, ...]:
        """Run as a block inside an operation."""
        for slot, value in zip(self.inputs, arguments, strict=True):
            environment[slot] = value
        self.run(environment)
        return tuple(environment[slot] for slot in self.outputs)


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument the program computes, or partly computes: each of `refs` is (slot, False) or (constant, True)."""

    parameter: str
    form: str
    refs: tuple[tuple[Any, bool], ...]

    @property
    def variadic(self) -> bool:
        """Whether the kernel takes a list."""
        return self.form in ("Tensors", "Values")

    def value(self, environment: Environment) -> Any:
        """Return what the kernel gets."""
        values = [ref if is_constant else environment[ref] for ref, is_constant in self.refs]
        return values if self.variadic else from_value(self.form, values[0])


class Executable:
    """One compiled function: tensors in by name, values out by name."""

    def __init__(
        self,
        program: Program,
        function: Function,
        numerics: Numerics,
        *,
        fused: bool = True,
        records: dict[Any, Tensor] | None = None,
    ) -> None:
        """Compile; with `fused`, float32 programs run rewritten (`fusion.py`).

        records: those of another executable of the same program, on the same device, to hold them once.

        Raises:
            EngineError: an operation the engine does not have, or a constant of a wrong form.
        """
        self.function = function
        self.numerics = numerics
        require_kernels(program, function)
        compiler = _Compiler(program, function, numerics, records if records is not None else {})
        self.records = compiler.constants.records
        body = fuse(function.body) if fused and not numerics.rounds else function.body
        self._plan = compiler.compile(body)
        self._results = tuple(
            (operation, tuple(compiler.slots[variable.name] for variable in operation.outputs))
            for operation in body.operations
            if operation.type != "const" and not operation.type.startswith("constexpr_")
        )
        self._initial = compiler.initial
        self._names = tuple(variable.name for variable in function.body.inputs)
        self._types = {variable.name: variable.type for variable in function.body.inputs}

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run on `feeds`: one tensor (or state) per input of the function's body."""
        environment = self._fed(feeds)
        with torch.inference_mode(), self.numerics.exact():
            self._plan.run(environment)
        return {
            name: environment[slot] for name, slot in zip(self.function.body.outputs, self._plan.outputs, strict=True)
        }

    def trace(self, feeds: Mapping[str, Any]) -> Iterator[tuple[Operation, tuple[Any, ...]]]:
        """Run like a call, and yield every operation with its results (None where nothing reads one).

        Raises:
            EngineError: as a call does; it was the operation after the last one yielded.
        """
        environment = self._fed(feeds)
        for step, (operation, slots) in zip(self._plan.steps, self._results, strict=True):
            with torch.inference_mode(), self.numerics.exact():
                step(environment)
            yield operation, tuple(environment[slot] for slot in slots)

    def _fed(self, feeds: Mapping[str, Any]) -> Environment:
        """The slots at the start."""
        environment = list(self._initial)
        for slot, name in zip(self._plan.inputs, self._names, strict=True):
            value = feeds[name]
            if self.numerics.rounds and isinstance(value, Tensor) and self._types[name].dtype == "float16":
                value = self.numerics.round(value, operation=f"input {name!r}")
            environment[slot] = value
        return environment

    def feed(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
        """Return `arrays` as tensors of the dtypes the function declares, on its device."""
        return {name: self.numerics.tensor(array, self._types[name].dtype) for name, array in arrays.items()}


def require_kernels(program: Program, function: Function) -> None:
    """Check that every operation of the function can be run.

    Raises:
        EngineError: some cannot; the message names each with its count.
    """
    missing = Counter(
        operation.type
        for operation in function.body.walk()
        if operation.type not in KERNELS.keys() | DECOMPRESS.keys() | {"const"}
    )
    if missing:
        counts = ", ".join(f"{type_} x{count}" for type_, count in sorted(missing.items()))
        raise EngineError(
            f"{program.package}: the portable engine does not have these operations: {counts}; "
            "run the package with Core ML, or add them under runtime/engine/portable/ops"
        )


class _Compiler:
    """Turns operations into steps. Slots are shared by nested blocks, which see the names around them."""

    def __init__(self, program: Program, function: Function, numerics: Numerics, records: dict[Any, Tensor]) -> None:
        self.function = function
        self.numerics = numerics
        self.constants = Constants(program, numerics, records)
        self.slots: dict[str, int] = {}
        self.initial: Environment = []

    def compile(self, block: Block) -> Plan:
        inputs = tuple(self._slot(variable.name) for variable in block.inputs)
        last_use = _last_uses(block)
        steps: list[Step] = []
        for index, operation in enumerate(block.operations):
            if operation.type == "const" or operation.type.startswith("constexpr_"):
                self.constants.bind(operation)
                continue
            dead = tuple(self.slots[name] for name in last_use.get(index, ()) if name in self.slots)
            step = self._step(operation)
            outputs = tuple(self._slot(variable.name) for variable in operation.outputs)
            unused = tuple(
                slot
                for slot, variable in zip(outputs, operation.outputs, strict=True)
                if variable.name in last_use.get(index, ())
            )
            steps.append(_finish(step, outputs, dead + unused))
        outputs = tuple(self._output(name) for name in block.outputs)
        return Plan(inputs, tuple(steps), outputs)

    def _slot(self, name: str) -> int:
        if name not in self.slots:
            self.slots[name] = len(self.initial)
            self.initial.append(None)
        return self.slots[name]

    def _output(self, name: str) -> int:
        # A function may return a constant: it stays in its slot from the start.
        if name not in self.slots and name in self.constants:
            self.initial[self._slot(name)] = self.constants.value(name, "Value")
        return self.slots[name]

    def _step(self, operation: Operation) -> Callable[[Environment], Any]:
        kernel = KERNELS[operation.type]
        node = Node(
            type=operation.type,
            name=operation.name,
            outputs=tuple(variable.type for variable in operation.outputs),
            opset=self.function.opset,
            numerics=self.numerics,
        )
        plans = tuple(self.compile(block) for block in operation.blocks)
        fixed: dict[str, Any] = {"node": node} if kernel.wants_node else {}
        moving: list[Argument] = []
        for parameter, bound in operation.inputs.items():
            argument = self._argument(kernel, node, parameter, bound)
            if all(is_constant for _, is_constant in argument.refs):
                fixed[parameter] = argument.value([])
            else:
                moving.append(argument)
        return _call(kernel, node, fixed, tuple(moving), plans)

    def _argument(self, kernel: Kernel, node: Node, parameter: str, bound: Sequence[str | Constant]) -> Argument:
        if parameter not in kernel.forms:
            raise EngineError(
                f"{node.label}: the portable engine does not know its parameter {parameter!r}; "
                f"it knows {sorted(kernel.forms)}"
            )
        form = kernel.forms[parameter]
        try:
            single = {"Tensors": "Tensor", "Values": "Value"}.get(form, form)
            refs = tuple(self._reference(item, single) for item in bound)
        except (ValueError, TypeError, OverflowError) as error:
            raise PackageError(f"{node.label}: its parameter {parameter!r} is no {form}: {error}") from error
        if not refs:
            raise PackageError(f"{node.label}: its parameter {parameter!r} is bound to nothing")
        return Argument(parameter, form, refs)

    def _reference(self, item: str | Constant, form: str) -> tuple[Any, bool]:
        if isinstance(item, Constant):
            return self.constants.convert(item, form), True
        if item in self.constants:
            return self.constants.value(item, form), True
        return self.slots[item], False


def _call(
    kernel: Kernel, node: Node, fixed: dict[str, Any], moving: tuple[Argument, ...], plans: tuple[Plan, ...]
) -> Callable[[Environment], Any]:
    """Return the closure that gathers the moving arguments, runs the kernel and rounds what is float16."""
    run = partial(kernel.run, **fixed)

    def gather(environment: Environment) -> dict[str, Any]:
        arguments = {argument.parameter: argument.value(environment) for argument in moving}
        if plans:
            arguments["blocks"] = [partial(plan.call, environment) for plan in plans]
        return arguments

    # Nearly every operation only reads tensors out of slots.
    simple = not plans and all(argument.form == "Tensor" for argument in moving)
    pairs = tuple((argument.parameter, argument.refs[0][0]) for argument in moving) if simple else ()

    def call(environment: Environment) -> Any:
        arguments = {name: environment[slot] for name, slot in pairs} if simple else gather(environment)
        try:
            return run(**arguments)
        except GlassineError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            shapes = {
                name: tuple(value.shape) for name, value in {**fixed, **arguments}.items() if isinstance(value, Tensor)
            }
            raise EngineError(f"{node.label} failed on shapes {shapes}: {error}") from error

    halves = tuple(index for index, type_ in enumerate(node.outputs) if type_.dtype == "float16")
    if not (node.numerics.rounds and halves) or plans:
        return call

    def call_and_round(environment: Environment) -> Any:
        result = call(environment)
        if not isinstance(result, tuple):
            return _round(result, node)
        return tuple(_round(value, node) if index in halves else value for index, value in enumerate(result))

    return call_and_round


def _round(value: Any, node: Node) -> Any:
    return node.numerics.round(value, operation=node.label) if isinstance(value, Tensor) else value


def _finish(step: Callable[[Environment], Any], outputs: tuple[int, ...], dead: tuple[int, ...]) -> Step:
    """Return the closure that stores what `step` returns and drops what nobody reads any more."""
    if len(outputs) == 1:
        (output,) = outputs

        def store(environment: Environment) -> None:
            result = step(environment)
            # Operations with a variable number of results return tuples, of one too; lists are values.
            environment[output] = result[0] if isinstance(result, tuple) else result
            for slot in dead:
                environment[slot] = None

        return store

    def store_all(environment: Environment) -> None:
        results = step(environment)
        if outputs:
            for slot, value in zip(outputs, results, strict=True):
                environment[slot] = value
        for slot in dead:
            environment[slot] = None

    return store_all


def _last_uses(block: Block) -> dict[int, list[str]]:
    """For each operation, the variables of this block that nothing after it reads (its own unused outputs too)."""
    last: dict[str, int] = {}
    own = {variable.name for variable in block.inputs}
    for index, operation in enumerate(block.operations):
        own |= {variable.name for variable in operation.outputs}
        for name in reads(operation):
            last[name] = index
        for variable in operation.outputs:
            last.setdefault(variable.name, index)
    for name in block.outputs:
        last.pop(name, None)
    uses: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in own:
            uses.setdefault(index, []).append(name)
    return uses


def reads(operation: Operation) -> set[str]:
    """The names that an operation, or one inside of it, reads."""
    names = {item for bound in operation.inputs.values() for item in bound if isinstance(item, str)}
    for block in operation.blocks:
        names |= set(block.outputs)
        for inner in block.operations:
            names |= reads(inner)
    return names


class PortableEngine:
    """Runs one package on PyTorch; see `numerics` for what `precision` means.

    `predict` takes and returns NumPy arrays: float32 (or int32), contiguous.
    """

    def __init__(
        self, package: Path | str, *, device: str = "cpu", precision: Precision = "fp32", function: str | None = None
    ) -> None:
        """Read and compile the package.

        Raises:
            PackageError: the package is damaged.
            EngineError: an operation or device the engine does not have.
        """
        started = time.perf_counter()
        self._program = read_package(package)
        entry = self._program.function(function)
        _require_arrays(self._program, entry)
        numerics = Numerics(open_device(device), rounds=precision == "fp16")
        self._executable = Executable(self._program, entry, numerics)
        self.inputs: Mapping[str, TensorSpec] = _specs(entry.inputs)
        self.outputs: Mapping[str, TensorSpec] = _specs(entry.outputs)
        self.realised = Realised(
            engine="portable",
            device=device,
            precision=precision,
            load_seconds=time.perf_counter() - started,
        )

    def predict(self, **arrays: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Run the package on one array per input.

        Raises:
            EngineError: wrong inputs, or (fp16 precision) an operation overflowed.
        """
        checked = check_inputs(str(self._program.package), self.inputs, arrays)
        try:
            results = self._executable(self._executable.feed(checked))
        except EngineError as error:
            raise EngineError(f"{self._program.package}: {error}") from error
        return {name: to_array(results[name]) for name in self.outputs}

    def reread(self, offsets: Collection[int]) -> None:
        """Take the records at these offsets from the package's weight file again, in which they were changed.

        Raises:
            PackageError: the file does not hold them any more.
        """
        fresh = {id(file): WeightFile(file.path) for file in self._program.weights.values()}
        for (file, offset, type_), tensor in self._executable.records.items():
            if offset in offsets:
                array = fresh[file].read(offset, type_.dtype, tuple(tensor.shape), name=f"the record at {offset}")
                tensor.copy_(self._executable.numerics.tensor(array, type_.dtype))
                fresh[file].release()

    def close(self) -> None:
        """Drop the weights; the engine cannot be used afterwards."""
        self.__dict__.pop("_executable", None)


def to_array(value: Any) -> Any:
    """Return a tensor as a new contiguous array, float32, or int32 for integers and booleans; other values as they are.

    Always a copy: the tensor may be a view of an input or of a weight.
    """
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float32 if value.is_floating_point() else torch.int32
    return np.array(value.to("cpu", dtype).numpy(), order="C")


def _require_arrays(program: Program, function: Function) -> None:
    others = [feature for feature in (*function.inputs, *function.outputs, *function.states) if feature.kind != "array"]
    if others:
        kinds = ", ".join(f"{feature.name!r} is of type {feature.kind}" for feature in others)
        raise EngineError(f"{program.package}: an engine takes and returns arrays, but {kinds}; convert it with arrays")


def _specs(features: Sequence[Any]) -> dict[str, TensorSpec]:
    return {feature.name: TensorSpec(feature.name, feature.shape, feature.dtype) for feature in features}
