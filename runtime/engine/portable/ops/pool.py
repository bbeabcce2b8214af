"""Pooling over 1, 2 or 3 spatial axes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.runtime.engine.portable.ops.conv import pad_spatial, spatial_padding
from glassine.runtime.engine.portable.registry import Ints, op

_MAX = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_AVG = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def _padding(
    x: Tensor, kernel_sizes: Ints, strides: Ints, pad_type: str, pad: Ints, ceil_mode: bool
) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the padding asked for, and the cells that `ceil_mode` adds after it to complete a last window."""
    sizes = tuple(x.shape[2:])
    padding = spatial_padding(pad_type, pad, sizes, kernel_sizes, strides)
    extra = []
    for size, window, stride, (before, after) in zip(sizes, kernel_sizes, strides, padding, strict=True):
        room = size + before + after - window
        count = (math.ceil(room / stride) if ceil_mode else room // stride) + 1
        # The last window must start on the input or its padding before.
        if ceil_mode and before + after > 0 and (count - 1) * stride >= size + before:
            count -= 1
        extra.append(max((count - 1) * stride + window - (size + before + after), 0))
    return padding, extra


def _extended(padding: list[tuple[int, int]], extra: list[int]) -> list[tuple[int, int]]:
    return [(before, after + more) for (before, after), more in zip(padding, extra, strict=True)]


@op("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints = (),
    pad_type: str = "valid",
    pad: Ints = (),
    ceil_mode: bool = False,
) -> Tensor:
    """The padding never wins."""
    strides = strides or (1,) * (x.ndim - 2)
    padding, extra = _padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return _MAX[x.ndim](pad_spatial(x, _extended(padding, extra), -math.inf), kernel_sizes, strides)


@op("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints = (),
    pad_type: str = "valid",
    pad: Ints = (),
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """The mean of each window; the cells `ceil_mode` adds never count, the padding unless excluded."""
    strides = strides or (1,) * (x.ndim - 2)
    padding, extra = _padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    everything = _extended(padding, extra)
    counted = torch.ones_like(x[:1, :1])
    if exclude_padding_from_average:
        counted = pad_spatial(counted, everything)
    else:
        counted = pad_spatial(pad_spatial(counted, padding, 1.0), [(0, more) for more in extra])
    total = _AVG[x.ndim](pad_spatial(x, everything), kernel_sizes, strides)
    return total / _AVG[x.ndim](counted, kernel_sizes, strides)


@op("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints = (),
    pad_type: str = "valid",
    pad: Ints = (),
    ceil_mode: bool = False,
) -> Tensor:
    """The norm of each window."""
    strides = strides or (1,) * (x.ndim - 2)
    padding, extra = _padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    squares = pad_spatial(x * x, _extended(padding, extra))
    return torch.sqrt(_AVG[x.ndim](squares, kernel_sizes, strides) * math.prod(kernel_sizes))
