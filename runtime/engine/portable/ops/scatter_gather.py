"""Reading and writing at computed positions. Negative positions count from the end."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import op


def positions(indices: Tensor, size: int) -> Tensor:
    """Return indices as int64, negative ones counted from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@op("gather")
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Take whole slices along `axis`; the axes of `indices` replace it. The first `batch_dims` axes go in step."""
    axis %= x.ndim
    index = positions(indices, x.shape[axis])
    if batch_dims == 0:
        taken = x.index_select(axis, index.reshape(-1))
        return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    rows = x.flatten(0, batch_dims - 1) if batch_dims > 1 else x
    index = index.flatten(0, batch_dims - 1) if batch_dims > 1 else index
    axis -= batch_dims - 1
    taken = torch.stack([gather(row, i, axis - 1) for row, i in zip(rows, index, strict=True)])
    return taken.reshape(*x.shape[:batch_dims], *taken.shape[1:])


@op("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last axis of `indices` is a position in x; after it, whole slices."""
    if batch_dims:
        rows, index = x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1)
        taken = torch.stack([gather_nd(row, i) for row, i in zip(rows, index, strict=True)])
        return taken.reshape(*x.shape[:batch_dims], *taken.shape[1:])
    return x[tuple(positions(part, size) for part, size in zip(indices.unbind(-1), x.shape, strict=False))]
