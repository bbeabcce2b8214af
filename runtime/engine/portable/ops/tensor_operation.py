"""Operations that build, join, pad and search tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import Ints, Node, Tensors, op


@op("concat")
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Join along `axis`; interleaved, the tensors take turns. Scalars count as tensors of one element."""
    values = [value.reshape(1) if value.ndim == 0 else value for value in values]
    if interleave:
        axis %= values[0].ndim
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


@op("stack")
def stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


@op("split")
def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints = ()) -> tuple[Tensor, ...]:
    """Equal parts, or parts of `split_sizes`."""
    if split_sizes:
        return torch.split(x, list(split_sizes), axis)
    if num_splits is None:
        raise EngineError("split: neither num_splits nor split_sizes is given")
    return torch.split(x, x.shape[axis] // num_splits, axis)


@op("pad")
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: Tensor | None = None) -> Tensor:
    """`pad` holds (before, after) of the last axes, in their order."""
    pairs = list(zip(pad[0::2], pad[1::2], strict=True))
    if mode == "constant":
        value = 0.0 if constant_val is None else constant_val.item()
        return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)
    if mode not in ("reflect", "replicate"):
        raise EngineError(f"pad: mode {mode!r}, expected constant, reflect or replicate")
    for axis, (before, after) in zip(range(x.ndim - len(pairs), x.ndim), pairs, strict=True):
        if before or after:
            positions = torch.arange(-before, x.shape[axis] + after, device=x.device)
            last = x.shape[axis] - 1
            mirrored = last - (last - positions.abs()).abs()
            x = x.index_select(axis, mirrored if mode == "reflect" else positions.clamp(0, last))
    return x


@op("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).int()


@op("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Keep a band around the diagonal of the last two axes; negative keeps that whole triangle."""
    distance = torch.arange(x.shape[-1], device=x.device) - torch.arange(x.shape[-2], device=x.device).unsqueeze(1)
    kept = ((distance >= -lower) | (lower < 0)) & ((distance <= upper) | (upper < 0))
    return torch.where(kept, x, torch.zeros_like(x))


@op("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    y = x.flip(axis) if reverse else x
    total = y.cumsum(axis, dtype=x.dtype)
    total = total - y if exclusive else total
    return total.flip(axis) if reverse else total


@op("fill")
def fill(shape: Ints, value: Tensor) -> Tensor:
    return value.expand(shape) if value.ndim == 0 else value.reshape(()).expand(shape)


@op("fill_like")
def fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.reshape(()).expand(ref_tensor.shape)


@op("flatten2d")
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("non_zero")
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero().int()


@op("one_hot")
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    node: Node,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """`on_value` where the new axis equals the index; indices out of range (negative ones too) hit nothing."""
    hit = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size, device=indices.device)
    dtype = node.numerics.dtype(node.outputs[0].dtype)
    on, off = (
        torch.tensor(default, dtype=dtype, device=indices.device) if value is None else value.to(dtype)
        for value, default in ((on_value, 1), (off_value, 0))
    )
    return torch.where(hit, on, off).movedim(-1, axis)


@op("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype, device=start.device)


@op("shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32, device=x.device)


@op("tile")
def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat(reps)


@op("topk")
def topk(
    x: Tensor,
    node: Node,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The k largest (or smallest) elements along `axis`, sorted; equal ones in their order; -1 takes all."""
    values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    count = x.shape[axis] if k == -1 else k
    values, indices = values.narrow(axis, 0, count), indices.narrow(axis, 0, count)
    return (values, indices.to(node.numerics.dtype(output_indices_dtype))) if return_indices else (values,)
