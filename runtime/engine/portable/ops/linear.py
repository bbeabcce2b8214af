"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.runtime.engine.portable.registry import Tensors, op


@op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*, D_in), weight (D_out, D_in) -> (*, D_out). From iOS 17 on, one of them may be of integers."""
    if x.dtype != weight.dtype:
        x, weight = _promoted(x, weight)
        bias = None if bias is None else bias.to(x.dtype)
    # Of a transposed x PyTorch would make a batched product, with a copy of the weight for every row.
    return F.linear(x.contiguous(), weight, bias)


@op("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """The last two axes multiply, the others broadcast; a vector has nothing to transpose."""
    if x.dtype != y.dtype:
        x, y = _promoted(x, y)
    if transpose_x and x.ndim > 1:
        x = x.mT
    if transpose_y and y.ndim > 1:
        y = y.mT
    return torch.matmul(x, y)


def _promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


@op("einsum")
def einsum(values: Tensors, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *values)
