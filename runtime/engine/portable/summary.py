"""What a program costs: operations, parameters, floating-point operations, bytes. For `glassine inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glassine.runtime.engine.portable.program import Block, Constant, Function, Operation, Program

Shape = tuple[int, ...]
_ITEM = {"float16": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1}  # bytes; 4 if not here
_WEIGHTS = {"weight", "bias", "gamma", "beta"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One function of a package.

    operations: count by type, constants left out. parameters: elements of the weights, as if decompressed.
    flops: of convolutions, matrix products and attention, a multiply-add counted as two; `unsized` such operations
    have shapes known only when running and are not in it. weight_bytes: what the weights take in the package, by the
    dtype they are stored in ("uint6" for a 6-bit palette's indices). computed: operations by the dtype of their
    first result. activations: the most bytes that results take at once, in the program's order and its dtypes, each
    from the operation that makes it to the last that reads it; an estimate, as engines fuse and reorder.
    """

    operations: Mapping[str, int]
    parameters: int
    flops: int
    unsized: int
    weight_bytes: Mapping[str, int]
    computed: Mapping[str, int]
    activations: int

    @property
    def precision(self) -> str:
        """The float type computed in: "float16", "float32" or "mixed"."""
        floats = {dtype for dtype in self.computed if dtype.startswith("float")}
        return floats.pop() if len(floats) == 1 else "mixed"


def summarise(program: Program, function: str | None = None) -> Summary:
    """Count one function (the default one) of a program; nothing is read of the weights but their sizes."""
    entry = program.function(function)
    operations = list(entry.body.walk())
    work = [op for op in operations if op.type != "const" and not op.type.startswith("constexpr_")]
    shapes = _shapes(entry, operations)
    flops = [_flops(op, shapes) for op in work if op.type in _FLOPS]
    parameters, stored = _weights(operations)
    return Summary(
        operations=dict(Counter(op.type for op in work).most_common()),
        parameters=parameters,
        flops=sum(count for count in flops if count is not None),
        unsized=flops.count(None),
        weight_bytes=stored,
        computed=dict(Counter(op.outputs[0].type.dtype for op in work if op.outputs).most_common()),
        activations=_activations(entry.body, shapes),
    )


def _activations(block: Block, shapes: Mapping[str, Shape | None]) -> int:
    """The most bytes of results alive at once; those of unknown shape, and of blocks inside, are left out."""
    constant = {v.name for op in block.operations if op.type == "const" or op.type.startswith("constexpr_")
                for v in op.outputs}  # fmt: skip
    sizes = {
        variable.name: math.prod(shape) * _ITEM.get(variable.type.dtype, 4)
        for variable in (*block.inputs, *(variable for op in block.operations for variable in op.outputs))
        if variable.name not in constant and (shape := shapes[variable.name]) is not None
    }
    last = {variable.name: -1 for variable in block.inputs}
    for index, op in enumerate(block.operations):
        read = (item for bound in op.inputs.values() for item in bound if isinstance(item, str))
        last.update(dict.fromkeys((*read, *(variable.name for variable in op.outputs)), index))
    last.update(dict.fromkeys(block.outputs, len(block.operations)))
    ends: dict[int, int] = {}
    for name, size in sizes.items():
        ends[last[name]] = ends.get(last[name], 0) + size
    alive = most = sum(sizes[variable.name] for variable in block.inputs if variable.name in sizes)
    for index, op in enumerate(block.operations):
        alive += sum(sizes.get(variable.name, 0) for variable in op.outputs)
        most = max(most, alive)
        alive -= ends.get(index, 0)
    return most


def flops_of(entry: Function) -> dict[str, int]:
    """Name of a result -> floating-point operations, of the operations that have any and known shapes."""
    operations = list(entry.body.walk())
    shapes = _shapes(entry, operations)
    counted = {op.outputs[0].name: _flops(op, shapes) for op in operations if op.type in _FLOPS}
    return {name: count for name, count in counted.items() if count is not None}


def _shapes(entry: Function, operations: list[Operation]) -> dict[str, Shape | None]:
    variables = [*entry.body.inputs, *(variable for op in operations for variable in op.outputs)]
    shapes: dict[str, Shape | None] = {}
    for variable in variables:
        known = tuple(dim for dim in variable.type.shape if dim is not None)
        shapes[variable.name] = known if len(known) == len(variable.type.shape) else None
    return shapes


def _weights(operations: list[Operation]) -> tuple[int, Mapping[str, int]]:
    """Count the elements of every float constant that is a weight, and the bytes of all constants they come from."""
    uses: dict[str, set[str]] = {}
    for op in operations:
        for parameter, bound in op.inputs.items():
            for item in bound:
                if isinstance(item, str):
                    uses.setdefault(item, set()).add(parameter)
    elements: dict[object, int] = {}
    stored: dict[object, tuple[str, int]] = {}
    for op in operations:
        name = op.outputs[0].name if op.outputs else ""
        if op.type == "const":
            constant = op.attributes["val"]
            if _is_weight(constant, uses.get(name, set())):
                elements[_identity(constant)] = math.prod(constant.shape)
                stored[_identity(constant)] = (constant.type.dtype, constant.stored_bytes)
        elif op.type.startswith("constexpr_"):
            elements[name] = math.prod(dim or 0 for dim in op.outputs[-1].type.shape)
            held = {**op.attributes, **{key: bound[0] for key, bound in op.inputs.items()}}
            for key, value in held.items():
                if isinstance(value, Constant) and value.shape and key != "shape":
                    stored[_identity(value)] = (_stored_dtype(op, key, value), value.stored_bytes)
    sizes: Counter[str] = Counter()
    for dtype, size in stored.values():
        sizes[dtype] += size
    # One constexpr may feed another (sparse, then palettized): only the last is a weight.
    inner = {item for op in operations if op.type.startswith("constexpr_") for b in op.inputs.values() for item in b}
    return sum(count for key, count in elements.items() if key not in inner), dict(sizes.most_common())


def _is_weight(constant: Constant, parameters: set[str]) -> bool:
    if not constant.type.dtype.startswith("float") or not constant.shape:
        return False
    if parameters and parameters <= {"mean", "variance"}:
        return False  # statistics of a batch norm, constants of the graph rather than of the training
    return constant.file is not None or bool(parameters & _WEIGHTS)


def _identity(constant: Constant) -> object:
    return (id(constant.file), constant.offset) if constant.file is not None else id(constant)


def _stored_dtype(op: Operation, key: str, value: Constant) -> str:
    if op.type == "constexpr_lut_to_dense" and key == "indices" and "lut" in op.attributes:
        return f"uint{(math.prod(op.attributes['lut'].shape) - 1).bit_length()}"  # packed in bytes (iOS 16)
    return value.type.dtype


def _flops(op: Operation, shapes: Mapping[str, Shape | None]) -> int | None:
    def shape_of(item: str | Constant) -> Shape | None:
        return item.shape if isinstance(item, Constant) else shapes.get(item)

    inputs = {key: [shape_of(item) for item in bound] for key, bound in op.inputs.items()}
    output = shapes[op.outputs[0].name]
    tensors = [shape for bound in inputs.values() for shape in bound]
    if output is None or None in tensors:
        return None
    known = {key: [shape for shape in bound if shape is not None] for key, bound in inputs.items()}
    return 2 * _FLOPS[op.type](op, known, output)


def _conv(op: Operation, inputs: Mapping[str, list[Shape]], output: Shape) -> int:
    return math.prod(output) * math.prod(inputs["weight"][0][1:])


def _conv_transpose(op: Operation, inputs: Mapping[str, list[Shape]], output: Shape) -> int:
    return math.prod(inputs["x"][0]) * math.prod(inputs["weight"][0][1:])


def _linear(op: Operation, inputs: Mapping[str, list[Shape]], output: Shape) -> int:
    return math.prod(output) * inputs["weight"][0][-1]


def _matmul(op: Operation, inputs: Mapping[str, list[Shape]], output: Shape) -> int:
    x, y = inputs["x"][0], inputs["y"][0]
    # Shared axis: all of x's and y's last two axes, less those the result kept.
    rows_cols = math.prod(x[-2:]) * math.prod(y[-2:])
    inner = math.isqrt(rows_cols // max(math.prod(output[-2:]), 1)) if len(x) > 1 and len(y) > 1 else x[-1]
    return math.prod(output) * inner


def _einsum(op: Operation, inputs: Mapping[str, list[Shape]], output: Shape) -> int:
    # Batched products of (.., C, H, W1) and (.., W1, H, W2): every result sums over W1.
    return math.prod(output) * inputs["values"][1][-3]


def _attention(op: Operation, inputs: Mapping[str, list[Shape]], output: Shape) -> int:
    query, key, value = (inputs[name][0] for name in ("query", "key", "value"))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FLOPS: dict[str, Callable[[Operation, Mapping[str, list[Shape]], Shape], int]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
