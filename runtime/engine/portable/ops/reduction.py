"""Reductions over axes (all axes where none are given)."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import Ints, Node, op


def _axes(x: Tensor, axes: Ints) -> tuple[int, ...]:
    return tuple(axis % x.ndim for axis in axes) or tuple(range(x.ndim))


@op("reduce_argmax")
def reduce_argmax(
    x: Tensor, node: Node, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    """The first index of the largest element."""
    return x.argmax(axis, keepdim=keep_dims).to(node.numerics.dtype(output_dtype))


@op("reduce_argmin")
def reduce_argmin(
    x: Tensor, node: Node, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    """The first index of the smallest element."""
    return x.argmin(axis, keepdim=keep_dims).to(node.numerics.dtype(output_dtype))


@op("reduce_mean")
def reduce_mean(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.mean(_axes(x, axes), keepdim=keep_dims)


@op("reduce_sum")
def reduce_sum(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.sum(_axes(x, axes), keepdim=keep_dims, dtype=x.dtype)


@op("reduce_max")
def reduce_max(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.amax(_axes(x, axes), keepdim=keep_dims)


@op("reduce_min")
def reduce_min(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.amin(_axes(x, axes), keepdim=keep_dims)


@op("reduce_prod")
def reduce_prod(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    for axis in sorted(_axes(x, axes), reverse=True):
        x = x.prod(axis, keepdim=keep_dims, dtype=x.dtype)
    return x


@op("reduce_l1_norm")
def reduce_l1_norm(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return reduce_sum(x.abs(), axes, keep_dims)


@op("reduce_l2_norm")
def reduce_l2_norm(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return torch.sqrt(reduce_sum(x * x, axes, keep_dims))


@op("reduce_log_sum")
def reduce_log_sum(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return torch.log(reduce_sum(x, axes, keep_dims))


@op("reduce_log_sum_exp")
def reduce_log_sum_exp(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return torch.logsumexp(x, _axes(x, axes), keepdim=keep_dims)


@op("reduce_sum_square")
def reduce_sum_square(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return reduce_sum(x * x, axes, keep_dims)
