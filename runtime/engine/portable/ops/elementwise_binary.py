"""Two tensors, element by element, with broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import op


@op("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@op("sub")
def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


@op("mul")
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@op("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Integers divide as integers do: towards zero."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@op("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


@op("mod")
def mod(x: Tensor, y: Tensor) -> Tensor:
    """x - floor(x / y) * y: the sign is y's."""
    return torch.remainder(x, y)


@op("pow")
def pow_(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y)


@op("maximum")
def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@op("minimum")
def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


@op("equal")
def equal(x: Tensor, y: Tensor) -> Tensor:
    return x == y


@op("not_equal")
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    return x != y


@op("greater")
def greater(x: Tensor, y: Tensor) -> Tensor:
    return x > y


@op("greater_equal")
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    return x >= y


@op("less")
def less(x: Tensor, y: Tensor) -> Tensor:
    return x < y


@op("less_equal")
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    return x <= y


@op("logical_and")
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_and(x, y)


@op("logical_or")
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_or(x, y)


@op("logical_xor")
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_xor(x, y)
