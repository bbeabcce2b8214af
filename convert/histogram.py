"""How often each fp16 value occurs in a weight, or in each group of its channels: what palettes are made from.

There are 63487 finite fp16 values (0 and -0 are one). A value is known here by its rank among them, so that sorting
and counting are done with integers of 16 bits.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bits = NDArray[np.uint16]
Scalar = TypeVar("Scalar", bound=np.generic)

_ALL = np.arange(1 << 16, dtype=np.uint16)
_FINITE = np.isfinite(_ALL.view(np.float16))
VALUES: Floats  # every finite fp16 value, ascending
VALUES, _inverse = np.unique(_ALL[_FINITE].view(np.float16).astype(np.float64), return_inverse=True)
RANKS: Bits = np.zeros(1 << 16, np.uint16)  # the bits of a finite fp16 number -> where its value stands in VALUES
RANKS[_FINITE] = _inverse

_PIECE = 1 << 18  # elements counted at a time: they stay in the processor's cache


class Histograms:
    """The values that occur in each of G groups, ascending, and how often: one group after the other in flat arrays.

    values, counts: (N,) float64. first: (G + 1,), where each group begins.
    """

    def __init__(self, ranks: Ints, counts: Floats, first: Ints) -> None:
        self.values: Floats = VALUES[ranks]
        self.counts = counts
        self.first = first
        self.sizes = np.diff(first)
        self._keys = ranks + self.spread(np.arange(len(self)) << 16)  # ascending through all groups
        self._mass = np.concatenate([[0.0], np.cumsum(counts)])
        self._moment = np.concatenate([[0.0], np.cumsum(counts * self.values)])

    def __len__(self) -> int:
        return len(self.first) - 1

    @classmethod
    def of_groups(cls, groups: Bits) -> Histograms:
        """Count the values of each row.

        Args:
            groups: (G, m) the bits of finite fp16 numbers.
        """
        ranks = np.sort(RANKS.take(groups), axis=1, kind="stable")  # by radix, as they have 16 bits
        begins = np.ones(ranks.shape, np.bool_)
        np.not_equal(ranks[:, 1:], ranks[:, :-1], out=begins[:, 1:])
        at = np.flatnonzero(begins)
        counts = np.diff(at, append=ranks.size).astype(np.float64)
        first = np.searchsorted(at, np.arange(len(groups) + 1) * ranks.shape[1])
        return cls(ranks.reshape(-1)[at].astype(np.int64), counts, first)

    @classmethod
    def of_one(cls, bits: Bits) -> Histograms:
        """Count the values of one group of any size: (m,) the bits of finite fp16 numbers."""
        by_bits = np.zeros(1 << 16, np.int64)
        for start in range(0, len(bits), _PIECE):
            by_bits += np.bincount(bits[start : start + _PIECE], minlength=1 << 16)
        by_rank = np.asarray(np.bincount(RANKS, by_bits.astype(np.float64), len(VALUES)), np.float64)
        ranks = np.flatnonzero(by_rank)
        return cls(ranks, by_rank[ranks], np.array([0, len(ranks)]))

    def spread(self, by_group: NDArray[Scalar]) -> NDArray[Scalar]:
        """Give each value its group's element of `by_group`: (G,) -> (N,)."""
        return np.repeat(by_group, self.sizes)

    def ends(self, palettes: Floats) -> Ints:
        """Return which values are nearest to which number of their group's palette.

        Args:
            palettes: (G, k), ascending. A value as near to two numbers belongs to the first.

        Returns:
            (G, k + 1): the values of number i of a group are those from [i] to [i + 1].
        """
        borders = borders_of(palettes) + (np.arange(len(self)) << 16)[:, None]
        inner = np.searchsorted(self._keys, borders)
        return np.concatenate([self.first[:-1, None], inner, self.first[1:, None]], axis=1)

    def means(self, ends: Ints, otherwise: Floats) -> Floats:
        """Return the means of the values between `ends`, and what `otherwise` has where there are none: (G, k)."""
        mass = np.diff(self._mass[ends], axis=1)
        return np.asarray(np.where(mass > 0, np.diff(self._moment[ends], axis=1) / np.maximum(mass, 1), otherwise))

    def power(self) -> float:
        """Return the sum of the squares of all values."""
        return float(self.counts @ self.values**2)

    def error(self, palettes: Floats) -> float:
        """Return the squared error when every value becomes the nearest number of its group's palette."""
        numbers = np.repeat(palettes.reshape(-1), np.diff(self.ends(palettes), axis=1).reshape(-1))
        return float(self.counts @ (self.values - numbers) ** 2)


def borders_of(palettes: Floats) -> Ints:
    """Return for (G, k) ascending numbers the ranks from which on each next number is the nearest: (G, k - 1)."""
    return np.searchsorted(VALUES, (palettes[:, 1:] + palettes[:, :-1]) / 2, side="right")
