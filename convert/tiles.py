"""Big matrices a piece at a time: what is computed of them stays in the processor's cache, on several threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 17  # elements
_ROWS = 64  # of a tile of a product
_TILE = 1 << 12  # its columns times the inner size: OpenBLAS stays in one thread up to 2**18 multiplications


def row_ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Some rows of a matrix at a time.

    Whoever adds a product to a matrix takes these: its last bit depends on where BLAS begins and ends.
    """
    step = max(1, _PIECE // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return left @ right, in tiles so small that BLAS computes each in the thread that asks.

    The threads that it would start and wait for, product by product, cost many times what a product of low rank does
    where several threads ask, and the result would depend on their number. Equal tiles are one call: between two calls
    threads wait for one another.
    """
    rows, inner, columns = *left.shape, right.shape[1]
    out = np.empty((rows, columns), np.float32)
    for top, bottom, height in _tiled(rows, _ROWS):
        for first, last, width in _tiled(columns, max(16, _TILE // max(1, inner))):
            down, across = (bottom - top) // height, (last - first) // width
            np.matmul(
                left[top:bottom].reshape(down, 1, height, inner),
                right[:, first:last].reshape(inner, across, width).transpose(1, 0, 2),
                out=out[top:bottom, first:last].reshape(down, height, across, width).transpose(0, 2, 1, 3),
            )
    return out


def _tiled(total: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Where equal tiles begin and end, and how long each is: those of `step`, and one of what is left."""
    whole = total - total % step
    if whole:
        yield 0, whole, step
    if whole < total:
        yield whole, total, total - whole
