"""Convolutions over 1, 2 or 3 spatial axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import Ints, op

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def spatial_padding(pad_type: str, pad: Ints, sizes: Ints, windows: Ints, strides: Ints) -> list[tuple[int, int]]:
    """Return (before, after) per spatial axis; `windows` are the dilated kernel sizes.

    "same" gives ceil(size / stride) outputs with the odd cell after, "same_lower" before.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        return list(zip(pad[0::2], pad[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise EngineError(f"pad_type {pad_type!r}, expected valid, custom, same or same_lower")
    totals = [
        max((-(-size // stride) - 1) * stride + window - size, 0)
        for size, window, stride in zip(sizes, windows, strides, strict=True)
    ]
    halves = [(total // 2, total - total // 2) for total in totals]
    return halves if pad_type == "same" else [(after, before) for before, after in halves]


def pad_spatial(x: Tensor, padding: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the trailing axes of x; F.pad counts them from the last."""
    return F.pad(x, [n for pair in reversed(padding) for n in pair], value=value)


@op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    strides: Ints = (),
    pad_type: str = "valid",
    pad: Ints = (),
    dilations: Ints = (),
    groups: int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """x (n, C_in, *D), weight (C_out, C_in / groups, *K) -> (n, C_out, *D_out)."""
    spatial = x.ndim - 2
    strides = strides or (1,) * spatial
    if groups == 1 and pad_type == "valid" and max(*weight.shape[2:], *strides) == 1:
        return _pointwise(x, weight.flatten(1), bias)
    dilations = dilations or (1,) * spatial
    windows = tuple((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True))
    padding = spatial_padding(pad_type, pad, tuple(x.shape[2:]), windows, strides)
    if any(before != after for before, after in padding):
        x = pad_spatial(x, padding)
        padding = [(0, 0)] * spatial
    return _CONV[x.ndim](x, weight, bias, strides, [before for before, _ in padding], dilations, groups)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution as one matrix product a row: twice as fast as PyTorch's on a CPU (Apple's attention is made of
    them), and indifferent to how x lies in memory.
    """
    tokens = x.flatten(2)  # (n, C_in, S)
    if tokens.shape[2] == 1:
        y = F.linear(tokens.squeeze(2), weight, bias)
        return y.reshape(*y.shape, *[1] * (x.ndim - 2))
    y = x.new_empty(x.shape[0], weight.shape[0], tokens.shape[2])
    for row, out in zip(tokens, y, strict=True):
        if bias is None:
            torch.mm(weight, row, out=out)
        else:
            torch.addmm(bias.unsqueeze(1), weight, row, out=out)
    return y.reshape(x.shape[0], -1, *x.shape[2:])


@op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints = (),
    output_shape: Ints = (),
    pad_type: str = "valid",
    strides: Ints = (),
    dilations: Ints = (),
    groups: int = 1,
) -> Tensor:
    """x (n, C_in, *D), weight (C_in, C_out / groups, *K) -> (n, C_out, *D_out): everything, cropped by the padding."""
    spatial = x.ndim - 2
    strides = strides or (1,) * spatial
    dilations = dilations or (1,) * spatial
    full = _CONV_TRANSPOSE[x.ndim](x, weight, bias, strides, 0, 0, groups, dilations)
    windows = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    if pad_type in ("same", "same_lower"):
        totals = [max(window - stride, 0) for window, stride in zip(windows, strides, strict=True)]
        crops = [(total // 2, total - total // 2) for total in totals]
        crops = crops if pad_type == "same" else [(after, before) for before, after in crops]
        sizes = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    else:
        crops = spatial_padding(pad_type, pad, tuple(x.shape[2:]), tuple(windows), strides)
        sizes = [size - before - after for size, (before, after) in zip(full.shape[2:], crops, strict=True)]
    if output_shape:
        sizes = list(output_shape[2:])
    return _crop(full, [before for before, _ in crops], sizes, bias)


def _crop(full: Tensor, starts: list[int], sizes: list[int], bias: Tensor | None) -> Tensor:
    # A stride larger than the window, or an output_shape, can ask for cells beyond the full result: they hold the bias.
    missing = [
        (0, max(start + size - have, 0)) for start, size, have in zip(starts, sizes, full.shape[2:], strict=True)
    ]
    if any(after for _, after in missing):
        offset = 0.0 if bias is None else bias.reshape(1, -1, *[1] * len(sizes))
        full = pad_spatial(full - offset, missing) + offset
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        full = full.narrow(axis + 2, start, size)
    return full
