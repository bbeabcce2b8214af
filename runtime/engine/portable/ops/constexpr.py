"""Compressed constants: `constexpr_*` operations of iOS 16 and iOS 18, in NumPy (they run once, when compiling)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.runtime.engine.portable.weights import unpack_bits

Array = NDArray[Any]


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """Return scale * (quantized_data - zero_point); vectors run along `axis`."""

    def along_axis(value: Array) -> Array:
        shape = [1] * quantized_data.ndim
        if value.ndim == 1:
            shape[int(axis)] = -1
        return value.reshape(shape)

    shifted = quantized_data.astype(np.float32) - along_axis(zero_point).astype(np.float32)
    return np.asarray(shifted * along_axis(scale).astype(np.float32))


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Return scale * (data - offset), with one scale and offset per block; blocks divide `data` evenly."""
    if any(size % blocks for size, blocks in zip(data.shape, scale.shape, strict=True)):
        raise ValueError(f"scale {scale.shape} does not divide data {data.shape}")
    # (blocks0, size0/blocks0, blocks1, ...): broadcasting instead of repeating the scales.
    split = [n for size, blocks in zip(data.shape, scale.shape, strict=True) for n in (blocks, size // blocks)]
    spread = [n for blocks in scale.shape for n in (blocks, 1)]
    values = data.astype(np.float32).reshape(split)
    if offset is not None:
        values -= offset.astype(np.float32).reshape(spread)
    values *= scale.astype(np.float32).reshape(spread)
    return values.reshape(data.shape)


def cast(source_val: Array, output_dtype: Array) -> Array:
    """Return float16 data as float32."""
    if str(output_dtype) != "fp32":
        raise ValueError(f"output_dtype {output_dtype}, expected fp32")
    return source_val.astype(np.float32)


def lut_to_dense(indices: Array, lut: Array, shape: Array | None = None, vector_axis: Array | None = None) -> Array:
    """Look every index up: one flat table with packed indices (iOS 16, with `shape`), or a table per block (iOS 18)."""
    if shape is not None:
        dense = tuple(int(n) for n in shape)
        bits = int(lut.size).bit_length() - 1
        return np.asarray(lut[unpack_bits(indices, bits, math.prod(dense))].reshape(dense))
    groups, (entries, vector) = lut.shape[:-2], lut.shape[-2:]
    if len(groups) != indices.ndim or any(n % g for n, g in zip(indices.shape, groups, strict=True)):
        raise ValueError(f"lut {lut.shape} does not fit indices {indices.shape}")
    if math.prod(groups) == 1:
        values = lut.reshape(entries, vector)[indices]
    else:
        # The number of the table each element uses, broadcast from one arange per axis.
        table = np.zeros((1,) * indices.ndim, np.int64)
        for axis, (size, count) in enumerate(zip(indices.shape, groups, strict=True)):
            along = (np.arange(size) // (size // count)).reshape([-1 if a == axis else 1 for a in range(indices.ndim)])
            table = table * count + along
        values = lut.reshape(-1, vector)[table * entries + indices]
    if vector == 1:
        return np.asarray(values[..., 0])
    if vector_axis is None:
        raise ValueError(f"vectors of {vector} without a vector_axis")
    axis = int(vector_axis) % indices.ndim
    moved = np.moveaxis(values, -1, axis + 1)
    return np.asarray(moved.reshape([n * vector if a == axis else n for a, n in enumerate(indices.shape)]))


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Put `nonzero_data` where the mask is set; the mask is packed bits with `shape` (iOS 16) or an array (iOS 18)."""
    if shape is not None:
        dense = tuple(int(n) for n in shape)
        mask = unpack_bits(mask, 1, math.prod(dense)).reshape(dense)
    values = np.zeros(mask.shape, nonzero_data.dtype)
    values[mask != 0] = nonzero_data
    return values


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """Return (mask, values) of a sparse palettized tensor; vectors widen the mask along `vector_axis`."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = np.repeat(mask, lut.shape[-1], axis=int(vector_axis))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Return (mask, values) of a sparse quantized tensor."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


DECOMPRESS: dict[str, Callable[..., Array | tuple[Array, Array]]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
