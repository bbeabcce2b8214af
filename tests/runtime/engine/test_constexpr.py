"""Compressed weights: every decompression against coremltools' own, and through a package."""

from __future__ import annotations

import itertools

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as ios16
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18
from coremltools.optimize import _utils as packing

from glassine.runtime.engine.portable.ops import constexpr

RNG = np.random.default_rng(0)
SHAPE = (8, 6, 4)
ONE = np.ones(SHAPE, np.float32)


def draw(shape: tuple[int, ...], high: int) -> np.ndarray:
    return RNG.integers(0, high, shape).astype(np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_flat_palettes(bits):
    lut = RNG.standard_normal(2**bits).astype(np.float16)
    packed = packing.pack_elements_into_bits(draw((np.prod(SHAPE),), 2**bits), bits)
    shape = np.array(SHAPE, np.uint32)
    expected = ios16.constexpr_lut_to_dense.decompress(lut, packed, SHAPE)
    np.testing.assert_array_equal(constexpr.lut_to_dense(packed, lut, shape), expected)


@pytest.mark.parametrize(
    ("bits", "groups", "vector", "axis"),
    [
        (bits, groups, vector, axis)
        for bits, groups, (vector, axis) in itertools.product(
            (1, 3, 4, 8), [(1, 1, 1), (4, 1, 1), (1, 3, 1), (2, 1, 4), (8, 6, 4)], [(1, None), (3, 0), (2, 2), (4, -2)]
        )
    ],
)
def test_grouped_and_vector_palettes(bits, groups, vector, axis):
    lut = RNG.standard_normal((*groups, 2**bits, vector)).astype(np.float16)
    indices = draw(SHAPE, 2**bits)
    vector_axis = None if axis is None else np.int32(axis)
    expected = ios18.constexpr_lut_to_dense.decompress(indices, lut, vector_axis)
    np.testing.assert_array_equal(constexpr.lut_to_dense(indices, lut, vector_axis=vector_axis), expected)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("source", [np.int8, np.uint8])
def test_affine(vectors, source):
    data = RNG.integers(0, 100, SHAPE).astype(source)
    scale = np.linspace(0.1, 1, 6, dtype=np.float32) if vectors else np.float32(0.25)
    zero = np.arange(6, dtype=source) if vectors else source(7)
    expected = ios16.constexpr_affine_dequantize.decompress(data, np.asarray(zero), np.asarray(scale), 1)
    actual = constexpr.affine_dequantize(data, np.asarray(zero), np.asarray(scale), np.int32(1))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("blocks", [(1, 1, 1), (8, 1, 1), (2, 3, 4), (4, 6, 2), SHAPE])
@pytest.mark.parametrize("offset", [False, True])
def test_blocks(blocks, offset):
    data = RNG.integers(-8, 8, SHAPE).astype(np.int8)
    scale = RNG.random(blocks).astype(np.float32)
    offsets = RNG.integers(-8, 8, blocks).astype(np.int8) if offset else None
    expected = ios18.constexpr_blockwise_shift_scale.decompress(data, scale, offsets)
    np.testing.assert_allclose(constexpr.blockwise_shift_scale(data, scale, offsets), expected, rtol=1e-6)


def test_sparse():
    mask = RNG.integers(0, 2, SHAPE).astype(np.uint8)
    values = RNG.standard_normal(int(mask.sum())).astype(np.float16)
    packed = np.packbits(mask, bitorder="little")
    expected = ios18.constexpr_sparse_to_dense.decompress(values, mask)
    np.testing.assert_array_equal(constexpr.sparse_to_dense(values, mask), expected)
    np.testing.assert_array_equal(constexpr.sparse_to_dense(values, packed, np.array(SHAPE, np.uint32)), expected)


@pytest.mark.parametrize(("vector", "axis"), [(1, None), (2, 1)])
def test_sparse_palettes(vector, axis):
    mask = RNG.integers(0, 2, SHAPE).astype(np.uint8)
    indices = draw((int(mask.sum()),), 16)
    lut = RNG.standard_normal((1, 1, 1, 16, vector)).astype(np.float16)
    expected = ios18.constexpr_lut_to_sparse.decompress(mask, indices, lut, axis)
    actual = constexpr.lut_to_sparse(mask, indices, lut, None if axis is None else np.int32(axis))
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_sparse_blocks():
    mask = RNG.integers(0, 2, SHAPE).astype(np.uint8)
    data = RNG.integers(-8, 8, int(mask.sum())).astype(np.int8)
    scale, offset = RNG.random((4, 1, 1)).astype(np.float32), RNG.integers(-8, 8, (4, 1, 1)).astype(np.int8)
    expected = ios18.constexpr_sparse_blockwise_shift_scale.decompress(mask, data, scale, offset)
    actual = constexpr.sparse_blockwise_shift_scale(mask, data, scale, offset)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "builtin", "bits"), [("uint1", types.np_uint1_dtype, 1), ("uint3", types.np_uint3_dtype, 3),
                                  ("uint4", types.np_uint4_dtype, 4), ("uint6", types.np_uint6_dtype, 6),
                                  ("uint8", np.dtype(np.uint8), 8)],
)  # fmt: skip
def test_palettes_through_a_package(run, name, builtin, bits):
    indices = draw(SHAPE, 2**bits)
    lut = RNG.standard_normal((2, 1, 1, 2**bits, 1)).astype(np.float32)
    expected = ios18.constexpr_lut_to_dense.decompress(indices, lut, None)

    def build(x):
        return mb.mul(x=x, y=mb.constexpr_lut_to_dense(indices=indices.astype(builtin), lut=lut))

    np.testing.assert_array_equal(run(build, x=ONE)[0], expected)


def test_flat_palettes_through_a_package(run):
    packed = packing.pack_elements_into_bits(draw((np.prod(SHAPE),), 64), 6)
    lut = RNG.standard_normal(64).astype(np.float32)
    expected = ios16.constexpr_lut_to_dense.decompress(lut, packed, SHAPE)

    def build(x):
        return mb.mul(x=x, y=mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.array(SHAPE, np.uint32)))

    np.testing.assert_array_equal(run(build, x=ONE, opset=ct.target.iOS16)[0], expected)


def test_int4_blocks_through_a_package(run):
    data = RNG.integers(-8, 8, SHAPE)
    scale = RNG.random((4, 1, 2)).astype(np.float32)
    expected = ios18.constexpr_blockwise_shift_scale.decompress(data.astype(np.int8), scale, None)

    def build(x):
        return mb.mul(x=x, y=mb.constexpr_blockwise_shift_scale(data=data.astype(types.np_int4_dtype), scale=scale))

    np.testing.assert_allclose(run(build, x=ONE)[0], expected, rtol=1e-6)


def test_one_decompression_feeds_another(run):
    mask = RNG.integers(0, 2, SHAPE).astype(types.np_uint1_dtype)
    indices = draw((int(mask.sum()),), 4).astype(types.np_uint2_dtype)
    lut = RNG.standard_normal((1, 1, 1, 4, 1)).astype(np.float32)
    _, values = ios18.constexpr_lut_to_sparse.decompress(mask, indices, lut, None)
    expected = ios18.constexpr_sparse_to_dense.decompress(values, mask)

    def build(x):
        kept, data = mb.constexpr_lut_to_sparse(indices_mask=mask, indices_nonzero_data=indices, lut=lut)
        return mb.mul(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=data, mask=kept))

    np.testing.assert_array_equal(run(build, x=ONE)[0], expected)
