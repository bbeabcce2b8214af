"""Operations that build, join, pad and search tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import Ints, Tensors, op


@op("concat")
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Join along `axis`; interleaved, the tensors take turns."""
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
