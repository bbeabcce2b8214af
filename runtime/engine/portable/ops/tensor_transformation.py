"""Operations that move elements without changing them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.runtime.engine.portable.registry import Bools, Ints, Tensors, op


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
    """-1 takes what is left; 0 keeps the size x has on that axis, counted from the right (1 where x has none)."""
    if 0 in shape and x.numel():
        offset = x.ndim - len(shape)
        shape = tuple(size or (x.shape[axis + offset] if axis + offset >= 0 else 1) for axis, size in enumerate(shape))
    return x.reshape(shape)


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


@op("slice_update")
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints = (),
    begin_mask: Bools = (),
    end_mask: Bools = (),
    squeeze_mask: Bools = (),
) -> Tensor:
    """x with the slice that slice_by_index would read replaced."""
    numbers = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    cells = slice_by_index(numbers, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return x.reshape(-1).index_put((cells.reshape(-1),), update.reshape(-1)).reshape(x.shape)


@op("reshape_like")
def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors) -> Tensor:
    """The shape is put together of slices of the reference tensors' shapes."""
    shape: list[int] = []
    for reference, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += reference.shape[int(begin) :] if bool(masked) else reference.shape[int(begin) : int(end)]
    return x.reshape(shape)


@op("reverse")
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(tuple(range(x.ndim)) if axes is None else axes)


@op("reverse_sequence")
def reverse_sequence(x: Tensor, lengths: Ints, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Turn the first lengths[i] elements of row i around."""
    y = x.clone()
    axis = seq_axis % x.ndim - (seq_axis % x.ndim > batch_axis % x.ndim)
    for row, length in enumerate(lengths):
        target = y.select(batch_axis, row).narrow(axis, 0, length)
        target.copy_(x.select(batch_axis, row).narrow(axis, 0, length).flip(axis))
    return y


@op("sliding_windows")
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """All windows of `size` along `axis`, the position in the window right after it."""
    axis %= x.ndim
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


@op("depth_to_space")
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """(n, b*b*C, H, W) -> (n, C, H*b, W*b): the block is the slow part of the channels."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, block_size, block_size, c // block_size**2, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block_size**2, h * block_size, w * block_size)


@op("space_to_depth")
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """The inverse of depth_to_space."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block_size**2, h // block_size, w // block_size)


@op("pixel_shuffle")
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """(n, C*f*f, H, W) -> (n, C, H*f, W*f): the block is the fast part of the channels."""
    return torch.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle")
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return torch.pixel_unshuffle(x, downscale_factor)


@op("space_to_batch")
def space_to_batch(x: Tensor, block_shape: Ints, paddings: Tensor) -> Tensor:
    """Pad, then move the position within a block in front of the batch."""
    (top, bottom), (left, right) = paddings.tolist()
    x = F.pad(x, [left, right, top, bottom])
    n, c, h, w = x.shape
    high, wide = block_shape
    blocks = x.reshape(n, c, h // high, high, w // wide, wide)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(n * high * wide, c, h // high, w // wide)


@op("batch_to_space")
def batch_to_space(x: Tensor, block_shape: Ints, crops: Tensor) -> Tensor:
    """The inverse of space_to_batch."""
    n, c, h, w = x.shape
    high, wide = block_shape
    rows = n // (high * wide)
    y = x.reshape(high, wide, rows, c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(rows, c, h * high, w * wide)
    (top, bottom), (left, right) = crops.tolist()
    return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]
