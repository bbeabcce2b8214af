"""One tensor, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import Node, op


@op("abs")
def abs_(x: Tensor) -> Tensor:
    return torch.abs(x)


@op("acos")
def acos(x: Tensor) -> Tensor:
    return torch.acos(x)


@op("asin")
def asin(x: Tensor) -> Tensor:
    return torch.asin(x)


@op("atan")
def atan(x: Tensor) -> Tensor:
    return torch.atan(x)


@op("atanh")
def atanh(x: Tensor) -> Tensor:
    return torch.atanh(x)


@op("cast")
def cast(x: Tensor, dtype: str, node: Node) -> Tensor:
    """Floats become integers by dropping the fraction."""
    return x.to(node.numerics.dtype(dtype))


@op("ceil")
def ceil(x: Tensor) -> Tensor:
    return torch.ceil(x)


@op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@op("cos")
def cos(x: Tensor) -> Tensor:
    return torch.cos(x)


@op("cosh")
def cosh(x: Tensor) -> Tensor:
    return torch.cosh(x)


@op("erf")
def erf(x: Tensor) -> Tensor:
    return torch.erf(x)


@op("exp")
def exp(x: Tensor) -> Tensor:
    return torch.exp(x)


@op("exp2")
def exp2(x: Tensor) -> Tensor:
    return torch.exp2(x)


@op("floor")
def floor(x: Tensor) -> Tensor:
    return torch.floor(x)


@op("identity")
def identity(x: Tensor) -> Tensor:
    return x


@op("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1.0 / (x + epsilon)


@op("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@op("logical_not")
def logical_not(x: Tensor) -> Tensor:
    return torch.logical_not(x)


@op("round")
def round_(x: Tensor) -> Tensor:
    """Halves go to the even neighbour."""
    return torch.round(x)


@op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@op("sign")
def sign(x: Tensor) -> Tensor:
    return torch.sign(x)


@op("sin")
def sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@op("sinh")
def sinh(x: Tensor) -> Tensor:
    return torch.sinh(x)


@op("sqrt")
def sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x)


@op("square")
def square(x: Tensor) -> Tensor:
    return x * x


@op("tan")
def tan(x: Tensor) -> Tensor:
    return torch.tan(x)


@op("tanh")
def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@op("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)
