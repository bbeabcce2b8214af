"""Products in tiles against float64, and the pieces of a matrix."""

from __future__ import annotations

import numpy as np
import pytest

from glassine.convert import tiles

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (65, 32, 129), (300, 4, 640), (130, 500, 33)])
def test_a_product_is_the_product(rows, inner, columns):
    left, right = (RNG.standard_normal(shape).astype(np.float32) for shape in ((rows, inner), (inner, columns)))
    exact = left.astype(np.float64) @ right
    error = np.abs(tiles.product(left, right) - exact) / (np.abs(left).astype(np.float64) @ np.abs(right))
    assert error.max() < 3e-7  # measured 1.4e-7


def test_a_product_over_nothing_is_zero():
    assert not tiles.product(np.ones((3, 0), np.float32), np.ones((0, 5), np.float32)).any()


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1 << 20), (10240, 1280), (7, 0)])
def test_pieces_cover_the_rows_once(rows, columns):
    ranges = list(tiles.row_ranges(rows, columns))
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert all((stop - start - 1) * columns < 1 << 17 for start, stop in ranges)
