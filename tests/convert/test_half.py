"""float16 <-> float32 against NumPy's own casts: every bit of every number."""

from __future__ import annotations

import numpy as np
import pytest

from glassine.convert.half import all_finite, cast, to_float16, to_float32

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]
RNG = np.random.default_rng(0)


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("scale", [1.0, 40**-0.5, 64**-0.5, 3.7, 1e-9])
def test_every_half_times_a_scale(scale):
    assert same_bits(to_float32(FINITE, scale), FINITE.astype(np.float32) * np.float32(scale))


def test_infinities_and_nans_stay_what_they_are():
    np.testing.assert_array_equal(to_float32(EVERY), EVERY.astype(np.float32))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(to_float16(EVERY.astype(np.float32)), EVERY)


def singles(kind: str) -> np.ndarray:
    """Numbers whose roundings are hard: ties between neighbours and what lies beside them, or any bits at all."""
    if kind == "ties":
        halves = np.unique(FINITE.astype(np.float64))
        exact = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2, [65519.996, -(2.0**-25), 2.0**-149, -0.0]])
        values = exact.astype(np.float32)
        up, down = np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))
        return np.concatenate([values, up, down])
    bits = RNG.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    if kind == "in range":  # no exponent that float16 has not
        bits = (bits & 0x80000000) | bits % ((127 + 16) << 23)
    return bits.view(np.float32)


@pytest.mark.parametrize("kind", ["ties", "in range", "any bits"])
def test_rounding_is_to_nearest_ties_to_even(kind):
    values = singles(kind)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    numbers = ~np.isnan(values)
    ours = to_float16(values)
    assert same_bits(ours[numbers], expected[numbers])
    assert np.isnan(ours[~numbers]).all()


def test_blocks_join_and_shapes_stay():
    values = (0.02 * RNG.standard_normal((3, 50_001))).astype(np.float32)
    assert same_bits(to_float16(values), values.astype(np.float16))
    assert same_bits(to_float32(values.astype(np.float16)), values.astype(np.float16).astype(np.float32))
    for empty in (np.empty((0, 4), np.float32), np.empty((0, 4), np.float16)):
        assert to_float16(empty.astype(np.float32)).shape == to_float32(empty.astype(np.float16)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_finite_is_finite(dtype):
    values = RNG.standard_normal(1000).astype(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (np.nan, np.inf, -np.inf):
        values[500] = bad
        assert not all_finite(values)


@pytest.mark.parametrize("scale", [1.0, 40**-0.5])
@pytest.mark.parametrize("to", ["float16", "float32"])
@pytest.mark.parametrize("source", [np.float16, np.float32, np.float64])
def test_casts_are_numpys(source, to, scale):
    values = (0.02 * RNG.standard_normal(70_000)).astype(source)
    exact = values if scale == 1.0 else values.astype(np.float32) * np.float32(scale)
    assert same_bits(cast(values, to, scale), exact.astype(to))
