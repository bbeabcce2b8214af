"""Resizing of the last two axes."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import op


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    """Repeat rows and columns; a fractional factor gives floor(size * factor) of them."""
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        if factor == int(factor):
            x = x.repeat_interleave(int(factor), axis)
        else:
            positions = torch.arange(int(x.shape[axis] * factor), device=x.device)
            x = x.index_select(axis, (positions / factor).floor().long())
    return x
