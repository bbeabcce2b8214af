"""MIL, the language of Core ML's programs, as far as the networks of this folder speak it.

A network calls one function of this module for each operation; the call appends it to the program that is being
written (`with program:`) and returns the variable of its result, whose shape and dtype are known at once. Names,
arguments, defaults, constants and the order of it all are those of coremltools' own builder and exporter, so that a
program comes out byte for byte as theirs would (tests/models/test_mil.py holds one against the other). They take 0.3
ms an operation, and a second to be imported; this takes a seventh, and next to nothing.

An operation is defined by the type of its result:

    @operation(axis=-1)                      # arguments with defaults become constants of the program
    def softmax(x, axis): return x.dtype, x.shape
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from typing import Any

import numpy as np

IOS16, IOS18 = 7, 9  # specification versions: macOS 13, macOS 15

Type = tuple[str, tuple[int, ...]]  # dtype (NumPy's name, or "string") and shape
DTYPES = {"fp16": "float16", "fp32": "float32", "int32": "int32", "bool": "bool"}  # MIL's names of them
_NARROWED = {"int64": np.int32, "float64": np.float32}  # what Python's numbers become


class Var:
    """A value of a program: an input, or what an operation gives. `val`: the value, of constants alone (else None)."""

    __slots__ = ("dtype", "name", "op", "shape", "val")

    def __init__(self, name: str, type_: Type, op: Operation | None = None, val: Any = None):
        self.name, (self.dtype, self.shape), self.op, self.val = name, type_, op, val

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __repr__(self) -> str:
        return f"{self.name}: {self.dtype}{self.shape}"


class Operation:
    """One operation of a program; each of its `inputs` is a variable or a list of them.

    message: its bytes in model.mlmodel, once they have been written; of constants never.
    """

    __slots__ = ("inputs", "message", "name", "op_type", "outputs")

    def __init__(self, op_type: str, name: str, inputs: dict[str, Any]):
        self.op_type, self.name, self.inputs = op_type, name, inputs
        self.outputs: list[Var] = []
        self.message: bytes | None = None

    @property
    def reads(self) -> list[Var]:
        """All variables that it reads."""
        return [var for value in self.inputs.values() for var in (value if isinstance(value, list) else (value,))]


_READERS = 100
_MOST_AXES = 5
_WRITTEN: ContextVar[Program] = ContextVar("the program that is being written")


class Program:
    """Operations in the order of the data, from `inputs` to `outputs`; `with` it, every operation is appended to it.

    version: of the specification, IOS16 or IOS18.
    """

    def __init__(self, inputs: dict[str, Var], version: int = IOS16):
        self.inputs, self.version = inputs, version
        self.outputs: list[Var] = []
        self.operations: list[Operation] = []
        self._taken: Counter[str] = Counter()
        self._literals: dict[tuple[str, tuple[int, ...], bytes], Var] = {}
        self._readers: Counter[tuple[str, tuple[int, ...], bytes]] = Counter()
        self._tokens: list[Token[Program]] = []

    def __enter__(self) -> Program:
        self._tokens.append(_WRITTEN.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _WRITTEN.reset(self._tokens.pop())

    def append(self, op_type: str, name: str, inputs: dict[str, Any], types: Sequence[Type]) -> list[Var]:
        """Append an operation and return its results."""
        if any(len(shape) > _MOST_AXES for _, shape in types):
            raise ValueError(f"{op_type} {name}: a result of more than {_MOST_AXES} axes, {types}; Core ML has no more")
        operation = Operation(op_type, name, inputs)
        names = [name] if len(types) == 1 else [f"{name}_{i}" for i in range(len(types))]
        operation.outputs = [Var(name, type_, operation) for name, type_ in zip(names, types, strict=True)]
        self.operations.append(operation)
        return operation.outputs

    def constant(self, value: Any, name: str) -> Var:
        """Append a constant: an array, a number, text, or a list of numbers."""
        if not isinstance(value, (str, np.ndarray)):
            value = np.array(value)
        if isinstance(value, str):
            type_: Type = ("string", ())
        else:
            dtype = value.dtype.name
            if dtype in _NARROWED:
                value = value.astype(_NARROWED[dtype])
            type_ = (value.dtype.name, value.shape)
        (var,) = self.append("const", name, {}, [type_])
        var.val = value
        return var

    def literal(self, value: Any, name: str) -> Var:
        """Return a constant for an argument that is no variable; equal ones (axes, pads, zero biases) share one.

        They would be more than half of a program otherwise. One constant serves `_READERS` arguments.
        """
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            return self.constant(value, self.free_name(name))  # it stands for something: its values say nothing
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if self._readers[key] % _READERS == 0:
            self._literals[key] = self.constant(value, self.free_name(name))
        self._readers[key] += 1
        return self._literals[key]

    def free_name(self, name: str) -> str:
        """Return `name` with the next number that is free behind it."""
        number = self._taken[name]
        self._taken[name] = number + 1
        return f"{name}_{number}"


def const(*, val: Any, name: str | None = None) -> Var:
    """A constant of its own, which equal ones do not share."""
    program = _WRITTEN.get()
    return program.constant(val, program.free_name("const") if name is None else name)


def operation(
    *, newest: dict[str, Any] | None = None, **defaults: Any
) -> Callable[[Callable[..., Type | list[Type]]], Callable[..., Any]]:
    """Make an operation of a function that gives the type (or types) of its result, from its arguments as variables.

    defaults: arguments that are constants of the program even where nobody gives them; newest: more, since iOS 18.
    """

    def make(types_of: Callable[..., Type | list[Type]]) -> Callable[..., Any]:
        op_type = types_of.__name__
        all_defaults = {IOS16: defaults, IOS18: defaults | (newest if newest is not None else {})}

        @functools.wraps(types_of)
        def append(*, name: str | None = None, **given: Any) -> Any:
            program = _WRITTEN.get()
            if name is None:
                name = program.free_name(op_type)
            inputs: dict[str, Any] = {}
            for key, value in given.items():
                if isinstance(value, Var):
                    inputs[key] = value
                elif key == "values":
                    inputs[key] = list(value)
                elif value is not None:
                    inputs[key] = program.literal(value, f"{name}_{key}")
            for key, value in all_defaults[program.version].items():
                if key not in inputs:
                    inputs[key] = program.literal(value, f"{name}_{key}")
            types = types_of(**inputs)
            if isinstance(types, list):
                return program.append(op_type, name, inputs, types)
            return program.append(op_type, name, inputs, (types,))[0]

        append.is_operation = True  # type: ignore[attr-defined]
        return append

    return make


def _refuse(said: str, *vars_: Var) -> ValueError:
    return ValueError(f"{said}: {', '.join(map(repr, vars_))}")


# Element by element.


def _unary(name: str, **defaults: Any) -> Callable[..., Any]:
    def types_of(x: Var, **rest: Var) -> Type:
        if rest.keys() != defaults.keys():
            raise TypeError(f"{name}() has the arguments x, {', '.join(defaults)}; got x, {', '.join(rest)}")
        return x.dtype, x.shape

    types_of.__name__ = name
    return operation(**defaults)(types_of)


abs = _unary("abs")
cos = _unary("cos")
gelu = _unary("gelu", mode="EXACT")
relu = _unary("relu")
sigmoid = _unary("sigmoid")
silu = _unary("silu")
sin = _unary("sin")
softmax = _unary("softmax", axis=-1)
sqrt = _unary("sqrt")
square = _unary("square")
tanh = _unary("tanh")


@operation()
def rsqrt(x: Var, epsilon: Var) -> Type:
    """1 / sqrt(x + epsilon); epsilon has to be given, in x's dtype."""
    return x.dtype, x.shape


@operation()
def cast(x: Var, dtype: Var) -> Type:
    """Change the dtype: "fp16", "fp32", "int32", "bool"."""
    return DTYPES[str(dtype.val)], x.shape


def _binary(name: str, result: str | None = None) -> Callable[..., Any]:
    def types_of(x: Var, y: Var) -> Type:
        if x.dtype != y.dtype:
            raise _refuse(f"{name} of two dtypes", x, y)
        return (x.dtype if result is None else result), _broadcast(x, x.shape, y, y.shape)

    types_of.__name__ = name
    return operation()(types_of)


def _broadcast(x: Var, a: tuple[int, ...], y: Var, b: tuple[int, ...]) -> tuple[int, ...]:
    if a == b or not b:
        return a
    rank = max(len(a), len(b))
    sizes = list(zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True))
    if any(m != n and 1 not in (m, n) for m, n in sizes):
        raise _refuse("shapes that do not fit each other", x, y)
    return tuple(max(m, n) for m, n in sizes)


add = _binary("add")
less_equal = _binary("less_equal", "bool")
maximum = _binary("maximum")
mul = _binary("mul")
real_div = _binary("real_div")
sub = _binary("sub")


# Sums of products.


@operation(strides=(1, 1), pad_type="valid", pad=(0, 0, 0, 0), dilations=(1, 1), groups=1)
def conv(
    x: Var, weight: Var, strides: Var, pad_type: Var, pad: Var, dilations: Var, groups: Var, bias: Var | None = None
) -> Type:
    """Convolve (B, C, H, W) with weight (C', C/groups, kh, kw); pad_type: "valid", "same", or "custom" with `pad`."""
    batch, channels, *size = x.shape
    if channels != weight.shape[1] * int(groups.val) or x.dtype != weight.dtype:
        raise _refuse("conv of what do not fit", x, weight)
    spans = [(kernel - 1) * int(by) + 1 for kernel, by in zip(weight.shape[2:], dilations.val, strict=True)]
    return x.dtype, (batch, weight.shape[0], *_slid(size, spans, strides, pad_type, pad))


def _slid(
    size: Sequence[int], spans: Sequence[int], strides: Var, pad_type: Var, pad: Var, up: bool = False
) -> list[int]:
    """How many places a window of `spans` has on each axis; `up`: one that hangs over the end counts."""
    steps, pads = np.asarray(strides.val).tolist(), np.asarray(pad.val).tolist()
    if pad_type.val == "same":
        return [-(-n // step) for n, step in zip(size, steps, strict=True)]
    if pad_type.val == "valid":
        pads = [0] * len(pads)
    return [
        (n + sum(pads[2 * i : 2 * i + 2]) - spans[i] + (steps[i] - 1 if up else 0)) // steps[i] + 1
        for i, n in enumerate(size)
    ]


@operation(pad=(0, 0, 0, 0), ceil_mode=False, exclude_padding_from_average=False)
def avg_pool(
    x: Var,
    kernel_sizes: Var,
    strides: Var,
    pad_type: Var,
    pad: Var,
    ceil_mode: Var,
    exclude_padding_from_average: Var,
) -> Type:
    """Average (B, C, H, W) over windows."""
    kernel = np.asarray(kernel_sizes.val).tolist()
    return x.dtype, (*x.shape[:2], *_slid(x.shape[2:], kernel, strides, pad_type, pad, bool(ceil_mode.val)))


@operation()
def linear(x: Var, weight: Var, bias: Var) -> Type:
    """Map the last axis by weight (out, in); the bias has to be given, be it zeros."""
    if x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise _refuse("linear of what do not fit", x, weight)
    return x.dtype, (*x.shape[:-1], weight.shape[0])


@operation(transpose_x=False, transpose_y=False)
def matmul(x: Var, y: Var, transpose_x: Var, transpose_y: Var) -> Type:
    """Multiply the matrices of the last two axes."""
    rows, inner = x.shape[:-3:-1] if transpose_x.val else x.shape[-2:]
    other, columns = y.shape[:-3:-1] if transpose_y.val else y.shape[-2:]
    if inner != other or x.dtype != y.dtype:
        raise _refuse("matmul of what do not fit", x, y)
    return x.dtype, (*_broadcast(x, x.shape[:-2], y, y.shape[:-2]), rows, columns)


@operation()
def einsum(values: list[Var], equation: Var) -> Type:
    """Sum the products of two arrays over the letters that the result does not have."""
    given, result = str(equation.val).split("->")
    sizes: dict[str, int] = {}
    for letters, var in zip(given.split(","), values, strict=True):
        for letter, size in zip(letters, var.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise _refuse(f"einsum {equation.val} of what do not fit", *values)
    return values[0].dtype, tuple(sizes[letter] for letter in result)


@operation()
def scaled_dot_product_attention(query: Var, key: Var, value: Var, attn_mask: Var | None = None) -> Type:
    """Attend from (..., S, d) to (..., T, d), fused; since iOS 18."""
    if query.shape[-1] != key.shape[-1] or key.shape[:-1] != value.shape[:-1]:
        raise _refuse("attention over what do not fit", query, key, value)
    return query.dtype, (*query.shape[:-1], value.shape[-1])


# Normalisation.


@operation(epsilon=1e-5)
def layer_norm(x: Var, axes: Var, epsilon: Var, gamma: Var | None = None, beta: Var | None = None) -> Type:
    """Bring these axes together to mean 0 and variance 1, then x*gamma + beta."""
    return x.dtype, x.shape


@operation(epsilon=1e-5)
def batch_norm(x: Var, mean: Var, variance: Var, gamma: Var, beta: Var, epsilon: Var) -> Type:
    """Bring the channels of (B, C, H, W) to mean 0 and variance 1, given theirs, then x*gamma + beta."""
    return x.dtype, x.shape


# Reductions: axes go, or stay with size 1.


def _reduced(x: Var, axes: Any, keep_dims: Var) -> tuple[int, ...]:
    gone = {axis % x.rank for axis in np.atleast_1d(axes).tolist()}
    kept = [(1 if axis in gone else size) for axis, size in enumerate(x.shape) if keep_dims.val or axis not in gone]
    return tuple(kept)


def _reduction(name: str) -> Callable[..., Any]:
    def types_of(x: Var, axes: Var, keep_dims: Var) -> Type:
        return x.dtype, _reduced(x, axes.val, keep_dims)

    types_of.__name__ = name
    return operation(keep_dims=False)(types_of)


reduce_max = _reduction("reduce_max")
reduce_mean = _reduction("reduce_mean")
reduce_sum = _reduction("reduce_sum")


@operation(axis=-1, keep_dims=False, newest={"output_dtype": "int32"})
def reduce_argmax(x: Var, axis: Var, keep_dims: Var, output_dtype: Var | None = None) -> Type:
    """The index of the largest element along an axis, int32."""
    return "int32", _reduced(x, axis.val, keep_dims)


# Shapes and places.


@operation()
def reshape(x: Var, shape: Var) -> Type:
    """The same elements in another shape, all of whose sizes are given."""
    sizes = tuple(np.asarray(shape.val).tolist())
    if math.prod(sizes) != math.prod(x.shape):
        raise _refuse(f"reshape to {sizes}, which has not as many elements", x)
    return x.dtype, sizes


@operation()
def transpose(x: Var, perm: Var) -> Type:
    """The axes in another order."""
    return x.dtype, tuple(x.shape[axis] for axis in np.asarray(perm.val).tolist())


@operation()
def expand_dims(x: Var, axes: Var) -> Type:
    """New axes of size 1, at these places of the result."""
    places = np.asarray(axes.val).tolist()
    rank = x.rank + len(places)
    new, old = {axis % rank for axis in places}, iter(x.shape)
    return x.dtype, tuple(1 if axis in new else next(old) for axis in range(rank))


@operation()
def squeeze(x: Var, axes: Var) -> Type:
    """Without these axes, which have size 1."""
    gone = {axis % x.rank for axis in np.asarray(axes.val).tolist()}
    if any(x.shape[axis] != 1 for axis in gone):
        raise _refuse(f"squeeze of the axes {gone}, not all of size 1", x)
    return x.dtype, tuple(size for axis, size in enumerate(x.shape) if axis not in gone)


@operation(interleave=False)
def concat(values: list[Var], axis: Var, interleave: Var) -> Type:
    """One behind the other along an axis."""
    first = values[0]
    at = int(axis.val) % first.rank
    around = {(var.dtype, var.shape[:at], var.shape[at + 1 :]) for var in values}
    if len(around) != 1:
        raise _refuse("concat of what do not fit", *values)
    return first.dtype, (*first.shape[:at], sum(var.shape[at] for var in values), *first.shape[at + 1 :])


@operation()
def split(x: Var, axis: Var, num_splits: Var | None = None, split_sizes: Var | None = None) -> list[Type]:
    """Pieces along an axis: so many equal ones, or of these sizes."""
    at = int(axis.val) % x.rank
    if split_sizes is not None:
        sizes = np.asarray(split_sizes.val).tolist()
    else:
        assert num_splits is not None
        count = int(num_splits.val)
        sizes = [x.shape[at] // count] * count
    if sum(sizes) != x.shape[at]:
        raise _refuse(f"split into {sizes}", x)
    return [(x.dtype, (*x.shape[:at], size, *x.shape[at + 1 :])) for size in sizes]


@operation()
def slice_by_index(x: Var, begin: Var, end: Var) -> Type:
    """The elements [begin, end) of every axis."""
    begins, ends = np.asarray(begin.val).tolist(), np.asarray(end.val).tolist()
    return x.dtype, tuple(stop - start for start, stop in zip(begins, ends, strict=True))


@operation(mode="constant", constant_val=0.0)
def pad(x: Var, pad: Var, mode: Var, constant_val: Var) -> Type:
    """So many elements before and after, for each of the last axes."""
    more = np.asarray(pad.val).reshape(-1, 2).sum(axis=1).tolist()
    more = [0] * (x.rank - len(more)) + more
    return x.dtype, tuple(size + by for size, by in zip(x.shape, more, strict=True))


@operation(axis=0, batch_dims=0, newest={"validate_indices": False})
def gather(x: Var, indices: Var, axis: Var, batch_dims: Var, validate_indices: Var | None = None) -> Type:
    """The elements at `indices` of one axis."""
    at = int(axis.val) % x.rank
    return x.dtype, (*x.shape[:at], *indices.shape, *x.shape[at + 1 :])


@operation()
def upsample_nearest_neighbor(x: Var, scale_factor_height: Var, scale_factor_width: Var) -> Type:
    """Every pixel of (B, C, H, W) several times."""
    height, width = (float(scale.val) for scale in (scale_factor_height, scale_factor_width))
    return x.dtype, (*x.shape[:2], int(x.shape[2] * height), int(x.shape[3] * width))


@operation()
def pixel_unshuffle(x: Var, downscale_factor: Var) -> Type:
    """The pixels of each square cell of (B, C, H, W) as channels."""
    by = int(downscale_factor.val)
    batch, channels, height, width = x.shape
    return x.dtype, (batch, channels * by * by, height // by, width // by)
