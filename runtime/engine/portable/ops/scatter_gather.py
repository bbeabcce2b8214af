"""Reading and writing at computed positions.

Up to iOS 16 negative positions count from the end, and one out of range is an error here. From iOS 17 on
(`validate_indices` is given) negative ones are out of range too; that is an error if it is true, and undefined but
safe if it is false: here the nearest cell is read, and nothing written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import op


def positions(indices: Tensor, size: int, validate: bool | None) -> Tensor:
    """Return indices as int64 positions on an axis of `size`."""
    indices = indices.long()
    if validate is None:
        return torch.where(indices < 0, indices + size, indices)
    if validate and bool(((indices < 0) | (indices >= size)).any()):
        raise EngineError(f"an index is out of range: {indices.min()} to {indices.max()}, expected 0 to {size - 1}")
    return indices.clamp(0, size - 1)


@op("gather")
def gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool | None = None
) -> Tensor:
    """Take whole slices along `axis`; the axes of `indices` replace it. The first `batch_dims` axes go in step."""
    axis %= x.ndim
    index = positions(indices, x.shape[axis], validate_indices)
    if batch_dims == 0:
        taken = x.index_select(axis, index.reshape(-1))
        return taken.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))
    rows = x.flatten(0, batch_dims - 1) if batch_dims > 1 else x
    index = index.flatten(0, batch_dims - 1) if batch_dims > 1 else index
    old, axis = axis, axis - batch_dims + 1
    taken = torch.stack([row.index_select(axis - 1, i.reshape(-1)) for row, i in zip(rows, index, strict=True)])
    taken = taken.reshape(len(rows), *x.shape[batch_dims:old], *index.shape[1:], *x.shape[old + 1 :])
    return taken.reshape((*x.shape[:batch_dims], *taken.shape[1:]))


@op("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool | None = None) -> Tensor:
    """The last axis of `indices` is a position in x; after it, whole slices."""
    if batch_dims:
        rows, index = x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1)
        taken = torch.stack([gather_nd(row, i, 0, validate_indices) for row, i in zip(rows, index, strict=True)])
        return taken.reshape((*x.shape[:batch_dims], *taken.shape[1:]))
    return x[
        tuple(positions(part, size, validate_indices) for part, size in zip(indices.unbind(-1), x.shape, strict=False))
    ]


@op("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool | None = None) -> Tensor:
    """Take single elements along `axis`; `indices` has the rank of x."""
    return torch.take_along_dim(x, positions(indices, x.shape[axis], validate_indices), axis)


def targets(indices: Tensor, size: int, validate: bool | None) -> Tensor:
    """Return indices as int64 positions to write to, -1 for those out of range where that is no error."""
    indices = indices.long()
    if validate is False:
        return torch.where(indices < size, indices, -1)
    return positions(indices, size, validate)


@op("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> Tensor:
    """Write whole slices along `axis`."""
    axis %= data.ndim
    index = targets(indices, data.shape[axis], validate_indices)
    # The axes of `indices` stand at `axis` in `updates`: bring both to the front.
    target = data.movedim(axis, 0).clone()
    source = updates.movedim(tuple(range(axis, axis + index.ndim)), tuple(range(index.ndim)))
    return _combine(target, (index,), source, mode).movedim(0, axis)


@op("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> Tensor:
    """Write single elements along `axis`; `indices` has the rank of data."""
    index = list(torch.meshgrid([torch.arange(n, device=data.device) for n in indices.shape], indexing="ij"))
    index[axis] = targets(indices, data.shape[axis], validate_indices)
    return _combine(data.clone(), tuple(index), updates, mode)


@op("scatter_nd")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool | None = None
) -> Tensor:
    """The last axis of `indices` is a position in data; after it, whole slices."""
    index = tuple(
        targets(part, size, validate_indices) for part, size in zip(indices.unbind(-1), data.shape, strict=False)
    )
    return _combine(data.clone(), index, updates, mode)


def _combine(target: Tensor, index: tuple[Tensor, ...], source: Tensor, mode: str) -> Tensor:
    """Write into target[index] where no position is negative; modes other than update accumulate over repeats."""
    index = tuple(part.reshape(-1) for part in torch.broadcast_tensors(*index))  # type: ignore[no-untyped-call]
    kept = torch.stack([part >= 0 for part in index]).all(0)
    source = source.reshape(kept.numel(), *target.shape[len(index) :])[kept]
    index = tuple(part[kept] for part in index)
    if mode == "update":
        return target.index_put_(index, source)
    if mode in ("add", "sub"):
        return target.index_put_(index, -source if mode == "sub" else source, accumulate=True)
    pick = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}
    if mode not in pick:
        raise EngineError(f"scatter mode {mode!r}, expected update, add, sub, {', '.join(pick)}")
    # index_put_ accumulates sums alone: number the cells, and reduce over the numbers.
    numbers = torch.arange(target.numel(), device=target.device).reshape(target.shape)[index].reshape(-1)
    flat, values = target.reshape(-1), source.reshape(-1)
    if mode == "div" and not target.is_floating_point():
        raise EngineError("scatter: the mode div of integers is not in the portable engine")
    values = 1 / values if mode == "div" else values
    return flat.scatter_reduce(0, numbers, values.expand_as(numbers), pick[mode]).reshape(target.shape)
