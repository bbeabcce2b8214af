"""Palettes: the 2^b numbers that stand for a weight's values with the least squared error (k-means on a line).

fp16 has 65536 values, so a weight is a histogram: sorted values and how often each occurs. On a line the clusters are
intervals, and the best ones are found exactly by dynamic programming; for large weights the histogram is made coarser
first, and Lloyd's iterations on the full one take the rest of the way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_PER_CLUSTER = {16: 6, 64: 4, 256: 4}  # cells of the coarse histogram; the error stays within 0.8 % of the optimum
_ROUNDS = 200
_AT_ONCE = 512  # values of which all intervals are tried at once, for every number of clusters


def optimal_palette(values: Floats, counts: Floats, k: int) -> Floats:
    """Return the k numbers with the least squared error; fewer where there are fewer values.

    D_m(j), the least error of the first j values in m clusters, is min over i of D_{m-1}(i) + cost(i, j). The best i
    grows with j and with m (the cost is Monge), so it is searched between its neighbours', all j of one level of the
    bisection at a time.

    Args:
        values: (n,) distinct, ascending. counts: (n,) positive.

    Source: Wang and Song 2011, "Ckmeans.1d.dp"; Gronlund et al. 2017, arXiv 1701.07204.
    """
    n = len(values)
    if n <= k:
        return np.array(values)
    middle = float(np.average(values, weights=counts))
    sums = _Sums(values - middle, counts)
    least = np.concatenate([[np.inf], sums.cost(np.zeros(n, np.int64), np.arange(1, n + 1))])
    starts = [np.zeros(n + 2, np.int64)]  # of the last cluster, for every j; [n + 1] bounds the search
    costs = sums.all_costs() if n <= _AT_ONCE else None
    for m in range(2, k + 1):
        if costs is not None:
            errors = costs + least
            start = errors.argmin(axis=1)
            least = errors[np.arange(n + 1), start]
        else:
            start, least = _next_cluster(sums, least, starts[-1], m)
        starts.append(start)
    ends = [n]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return sums.means(np.array(ends[::-1])) + middle


def good_palette(values: Floats, counts: Floats, k: int) -> Floats:
    """Return k numbers whose squared error is within 1 % of the least, for large histograms.

    Args:
        values: (n,) distinct, ascending. counts: (n,) positive.
    """
    cells = _PER_CLUSTER.get(k, 10) * k
    if len(values) <= 2 * cells:
        return optimal_palette(values, counts, k)
    # As a quantizer with many levels has them: in proportion to the cube root of the density (Panter and Dite 1951).
    widths = np.gradient(values)
    wanted = np.cumsum((counts / widths) ** (1 / 3) * widths)
    cell = np.floor(wanted / wanted[-1] * cells * (1 - 1e-12)).astype(np.int64)
    first = np.concatenate([[0], np.flatnonzero(np.diff(cell)) + 1])
    weight = np.add.reduceat(counts, first)
    return _lloyd(values, counts, optimal_palette(np.add.reduceat(counts * values, first) / weight, weight, k))


def nearest(values: Floats, palette: Floats) -> NDArray[np.int64]:
    """Return for each value the index of the palette's nearest number (`palette` ascending)."""
    return np.searchsorted((palette[1:] + palette[:-1]) / 2, values)


class _Sums:
    """Running sums of a histogram, from which the error of any interval follows in a few operations."""

    def __init__(self, values: Floats, counts: Floats) -> None:
        self.w, self.x, self.xx = (np.concatenate([[0.0], np.cumsum(counts * values**power)]) for power in (0, 1, 2))

    def cost(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> Floats:
        """Return the squared error of the values i to j - 1 around their mean."""
        x = self.x[j] - self.x[i]
        return np.asarray(self.xx[j] - self.xx[i] - x * x / (self.w[j] - self.w[i]))

    def all_costs(self) -> Floats:
        """Return the errors of all intervals, (j, i), infinite where they are empty."""
        i, j = np.meshgrid(np.arange(len(self.w)), np.arange(len(self.w)))
        costs = np.full(i.shape, np.inf)
        costs[i < j] = self.cost(i[i < j], j[i < j])
        return costs

    def means(self, ends: NDArray[np.int64]) -> Floats:
        """Return the means of the intervals between `ends`."""
        return np.asarray(np.diff(self.x[ends]) / np.diff(self.w[ends]))


def _next_cluster(sums: _Sums, least: Floats, before: NDArray[np.int64], m: int) -> tuple[NDArray[np.int64], Floats]:
    """Return where the m-th cluster begins for every j, and the least error, from those of m - 1 clusters."""
    n = len(least) - 1
    start, result = np.zeros(n + 2, np.int64), np.full(n + 1, np.inf)
    start[n + 1] = n - 1
    step = 1 << n.bit_length()
    while step:
        j = np.arange(step, n + 1, 2 * step)
        j = j[j >= m]
        if len(j):
            low = np.maximum(np.maximum(start[j - step], before[j]), m - 1)
            lengths = np.minimum(start[np.minimum(j + step, n + 1)], j - 1) - low + 1
            begin = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            i = np.arange(int(lengths.sum())) - np.repeat(begin - low, lengths)
            error = least[i] + sums.cost(i, np.repeat(j, lengths))
            best = np.minimum.reduceat(error, begin)
            hits = np.flatnonzero(error == np.repeat(best, lengths))
            start[j] = i[hits[np.searchsorted(hits, begin)]]
            result[j] = best
        step //= 2
    return start, result


def _lloyd(values: Floats, counts: Floats, palette: Floats) -> Floats:
    """Move every number to the mean of the values nearest to it until no value changes sides."""
    sums = _Sums(values, counts)
    ends = np.zeros(0, np.int64)
    for _ in range(_ROUNDS):
        edges = (palette[1:] + palette[:-1]) / 2
        now = np.concatenate([[0], np.searchsorted(values, edges), [len(values)]])
        if np.array_equal(now, ends):
            break
        ends = now
        weight = np.diff(sums.w[ends])
        means = np.diff(sums.x[ends]) / np.where(weight > 0, weight, 1)
        palette = np.where(weight > 0, means, palette)
    return palette
