"""The table of operations: MIL type -> Python function, whose signature says how each argument arrives.

    @op("conv")
    def conv(x: Tensor, weight: Tensor, strides: Ints = (1, 1), pad_type: str = "valid", ...) -> Tensor

The annotation decides the form: `Tensor` a torch tensor, `Ints` a tuple of int, `int`/`float`/`bool`/`str` a scalar,
`Value` whatever the program has there (tensor, list, dictionary), `Tensors` and `Values` lists of them (for variadic
parameters). A parameter called `node` receives the operation itself: output types, numerics, opset. Constants are
converted once, when the program is compiled; arguments computed by the program are converted at every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassine.runtime.engine.portable.numerics import Numerics
from glassine.runtime.engine.portable.program import ValueType

Ints = tuple[int, ...]
Bools = tuple[bool, ...]
Tensors = list[Tensor]
Value = Any
Values = list[Any]


@dataclass(frozen=True, slots=True)
class Node:
    """What an operation may know about itself."""

    type: str
    name: str
    outputs: tuple[ValueType, ...]
    opset: str
    numerics: Numerics

    @property
    def label(self) -> str:
        """How errors name it."""
        return f"operation {self.name!r} ({self.type})"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation: `run` and, per parameter, the form its argument takes."""

    run: Callable[..., Any]
    forms: dict[str, str]
    wants_node: bool


KERNELS: dict[str, Kernel] = {}


_Run = TypeVar("_Run", bound=Callable[..., Any])


def op(*types: str) -> Callable[[_Run], _Run]:
    """Register a function as the kernel of these MIL operations. A type can be registered once."""

    def register(run: _Run) -> _Run:
        parameters = inspect.signature(run).parameters
        forms = {
            name: str(parameter.annotation).removesuffix(" | None")
            for name, parameter in parameters.items()
            if name != "node"
        }
        unknown = set(forms.values()) - set(_FROM_ARRAY) - {"Tensor", "Tensors", "Value", "Values"}
        if unknown:
            raise TypeError(f"{run.__name__}: no form {sorted(unknown)}; expected one of the registry's")
        for type_ in types:
            if type_ in KERNELS:
                raise ValueError(f"the operation {type_!r} is registered twice")
            KERNELS[type_] = Kernel(run, forms, "node" in parameters)
        return run

    return register


_FROM_ARRAY: dict[str, Callable[[NDArray[Any]], Any]] = {
    "Ints": lambda array: tuple(int(v) for v in np.atleast_1d(array)),
    "Bools": lambda array: tuple(bool(v) for v in np.atleast_1d(array)),
    "int": lambda array: int(array.reshape(())),
    "float": lambda array: float(array.reshape(())),
    "bool": lambda array: bool(array.reshape(())),
    "str": lambda array: str(array.reshape(())),
    "Array": lambda array: array,
}
Array = NDArray[Any]


def from_constant(form: str, array: NDArray[Any], dtype: str, numerics: Numerics) -> Any:
    """Convert a constant to the form its kernel wants; strings that are no `str` stay arrays."""
    if form in _FROM_ARRAY:
        return _FROM_ARRAY[form](array)
    if form == "Value" and dtype == "string":
        return array
    return numerics.tensor(array, dtype)


def from_value(form: str, value: Any) -> Any:
    """Convert a value computed by the program to the form its kernel wants."""
    if form in _FROM_ARRAY and isinstance(value, Tensor):
        return _FROM_ARRAY[form](value.detach().to("cpu").numpy())
    return value


def is_float(value: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers."""
    return value.dtype == torch.float32
