"""Operations that move elements without changing them."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import Bools, Ints, op


@op("expand_dims")
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze")
def squeeze(x: Tensor, axes: Ints = ()) -> Tensor:
    return x.squeeze(axes) if axes else x.squeeze()


@op("reshape")
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """-1 takes what is left, 0 keeps the size x has on that axis."""
    return x.reshape([x.shape[axis] if size == 0 and x.numel() else size for axis, size in enumerate(shape)])


@op("transpose")
def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


@op("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints = (),
    begin_mask: Bools = (),
    end_mask: Bools = (),
    squeeze_mask: Bools = (),
) -> Tensor:
    """NumPy's x[begin:end:stride] per axis; a mask drops that bound, `squeeze_mask` takes one index."""
    rank = x.ndim
    for axis in reversed(range(rank)):
        first = begin[axis]
        if squeeze_mask and squeeze_mask[axis]:
            x = x.select(axis, first)
            continue
        step = stride[axis] if stride else 1
        start = None if begin_mask and begin_mask[axis] else first
        stop = None if end_mask and end_mask[axis] else end[axis]
        x = _slice(x, axis, slice(start, stop, step))
    return x


def _slice(x: Tensor, axis: int, span: slice) -> Tensor:
    start, stop, step = span.indices(x.shape[axis])
    if step > 0:
        if (start, stop, step) == (0, x.shape[axis], 1):
            return x
        taken = x.narrow(axis, start, max(stop - start, 0))
        return taken if step == 1 else taken[(slice(None),) * axis + (slice(None, None, step),)]
    return x.index_select(axis, torch.arange(start, stop, step, device=x.device))


@op("slice_by_size")
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """`size` -1 takes everything after `begin`."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        start = first + x.shape[axis] if first < 0 else first
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x
