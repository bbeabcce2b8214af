"""Resizing, cropping and resampling of the last two axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import Ints, op


def _grid(mode: str, before: int, after: int, *, like: Tensor) -> Tensor:
    """Return the `after` positions on an axis of `before` cells that a sampling mode reads, unclamped."""
    index = torch.arange(after, device=like.device, dtype=torch.float32)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if after == 1:
            return index + ((before - 1) / 2 if mode == "ALIGN_CORNERS" else 0)
        return index * ((before - 1) / (after - 1))
    if mode == "DEFAULT":
        return index * (before / after)
    if mode == "OFFSET_CORNERS":
        return (index + 0.5) * (max(1, before - 1) / after)
    if mode == "UNALIGN_CORNERS":
        return (index + 0.5) * (before / after) - 0.5
    raise EngineError(f"sampling mode {mode!r} is unknown; expected one of resize_bilinear's")


def _lerp(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Read x at fractional positions of one axis, clamped to it."""
    positions = positions.clamp(0, x.shape[axis] - 1)
    low = positions.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    weight = (positions - low).reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    return x.index_select(axis, low) * (1 - weight) + x.index_select(axis, high) * weight


def _nearest(x: Tensor, axis: int, size: int) -> Tensor:
    """The cell whose share of the axis the output cell's start falls into."""
    if size % x.shape[axis] == 0:
        return x.repeat_interleave(size // x.shape[axis], axis)
    index = torch.arange(size, device=x.device) * x.shape[axis] // size
    return x.index_select(axis, index)


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    """Repeat rows and columns to floor(size * factor) of them."""
    if x.ndim == 4 and scale_factor_height == scale_factor_width and scale_factor_height == int(scale_factor_height):
        return F.interpolate(x, scale_factor=scale_factor_height, mode="nearest")
    x = _nearest(x, -2, int(x.shape[-2] * scale_factor_height))
    return _nearest(x, -1, int(x.shape[-1] * scale_factor_width))


@op("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _nearest(_nearest(x, -2, target_size_height), -1, target_size_width)


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = _lerp(x, axis, _grid(sampling_mode, x.shape[axis], size, like=x))
    return x


@op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """Half-pixel centres unless corners are aligned or they are switched off."""
    height, width = int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)
    centred = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centred else "DEFAULT"
    return resize_bilinear(x, height, width, mode)


@op("resize")
def resize(
    x: Tensor,
    shape: Ints,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Resize the last `resized_dims` axes to the last entries of `shape`; 0 keeps a size."""
    dtype = x.dtype
    for axis, size in zip(range(-resized_dims, 0), shape[len(shape) - resized_dims :], strict=True):
        target = size or x.shape[axis]
        if interpolation_mode == "LINEAR":
            x = _lerp(x.float(), axis, _grid(sampling_mode, x.shape[axis], target, like=x))
        else:
            # The nearest cell, of two equally near ones the first.
            nearest = (_grid(sampling_mode, x.shape[axis], target, like=x) - 0.5).ceil().long()
            x = x.index_select(axis, nearest.clamp(0, x.shape[axis] - 1))
    return x.to(dtype)


@op("crop")
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    """Drop cells at the two ends of the last two axes."""
    for axis, (before, after) in ((-2, crop_height), (-1, crop_width)):
        x = x.narrow(axis, before, x.shape[axis] - before - after)
    return x


@op("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    coordinates_mode: str,
    align_corners: bool,
    padding_value: float = 0.0,
) -> Tensor:
    """Read x (B, C, H, W) at coordinates (B, h, w, 2) given as (x, y)."""
    sizes = torch.tensor([x.shape[3], x.shape[2]], device=x.device, dtype=torch.float32)
    points = coordinates.float()
    if coordinates_mode == "normalized_zero_to_one":
        points = points * 2 - 1
    elif coordinates_mode == "unnormalized":
        # F.grid_sample knows normalized coordinates only.
        points = points * 2 / (sizes - 1) - 1 if align_corners else (points * 2 + 1) / sizes - 1
    elif coordinates_mode != "normalized_minus_one_to_one":
        raise EngineError(f"resample: coordinates_mode {coordinates_mode!r} is unknown")
    padding = {"constant": "zeros", "border": "border", "reflection": "reflection", "symmetric": "reflection"}
    if padding_mode not in padding:
        raise EngineError(f"resample: padding_mode {padding_mode!r}, expected one of {sorted(padding)}")
    if padding_mode in ("reflection", "symmetric"):
        # grid_sample reflects about cell centres if corners are aligned, about edges if not: ask for the right one.
        aligned = padding_mode == "reflection"
        if aligned != align_corners:
            cells = (points + 1) / 2 * (sizes - 1) if align_corners else ((points + 1) * sizes - 1) / 2
            points = cells * 2 / (sizes - 1) - 1 if aligned else (cells * 2 + 1) / sizes - 1
        align_corners = aligned
    shifted = x - padding_value if padding_mode == "constant" else x
    y = F.grid_sample(shifted, points, sampling_mode, padding[padding_mode], align_corners)
    return y + padding_value if padding_mode == "constant" else y


@op("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Resample x at transformed coordinates; one matrix (a0 a1 a2 b0 b1 b2) for all images or one for each."""
    matrices = transform_matrix.reshape(-1, 2, 3).expand(x.shape[0], 2, 3)
    points = F.affine_grid(matrices, [x.shape[0], x.shape[1], output_height, output_width], align_corners)
    return resample(x, points, sampling_mode, padding_mode, coordinates_mode, align_corners, padding_value)
