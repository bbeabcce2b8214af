"""Affine quantization of activations (iOS 17)."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import Node, op


@op("quantize")
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    node: Node,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point) in int8 or uint8."""
    steps = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        steps = steps + _along(zero_point, input, axis)
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[output_dtype]
    return steps.clamp(low, high).to(node.numerics.dtype(output_dtype))


@op("dequantize")
def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """scale * (input - zero_point)."""
    steps = input.float()
    if zero_point is not None:
        steps = steps - _along(zero_point, input, axis).float()
    return steps * _along(scale, input, axis)


def _along(value: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if value.ndim == 0 or axis is None:
        return value
    return value.reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
