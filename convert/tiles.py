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
    where several threads ask, and the result would depend on their number.
    """
    out = np.empty((len(left), right.shape[1]), np.float32)
    width = max(16, _TILE // max(1, len(right)))
    for row in range(0, len(left), _ROWS):
        for column in range(0, right.shape[1], width):
            tile = out[row : row + _ROWS, column : column + width]
            np.matmul(left[row : row + _ROWS], right[:, column : column + width], out=tile)
    return out
