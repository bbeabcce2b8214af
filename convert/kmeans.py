"""Palettes: the 2^b numbers that stand for a weight's values with the least squared error (k-means on a line).

On a line the clusters are intervals, and the best ones are found exactly by dynamic programming (`optimal_palette`).
For large weights, and for many groups at once, the histogram is made coarser first, to cells of which a cluster has a
few; Lloyd's iterations on the full one take the rest of the way (`good_palettes`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glassine.convert.histogram import Floats, Histograms, Ints

_CELLS = {16: 16, 64: 8, 256: 6}  # a cluster, of the coarse histogram
_WIDEST = 4  # times as many cells a cluster may have; where one has more than half of that, all may have more
_ROUNDS = 10
_AT_A_TIME = 1 << 14  # cells in one step of the search: what it works on stays in the processor's cache
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


def good_palettes(weights: Histograms, k: int) -> Floats:
    """Return for each group k ascending numbers whose squared error is within 1 % of the least: (G, k).

    A group of fewer values has each of them; the rest repeat the last.
    """
    each = np.minimum(weights.first[:-1, None] + np.arange(k), weights.first[1:, None] - 1)
    palettes: Floats = weights.values[each]
    many = weights.sizes > k
    if not many.any():
        return palettes
    mass, mean = _cells(weights, _CELLS.get(k, 8) * k)
    palettes[many] = _centres(mass[many], mean[many], k)
    ends = np.zeros(0, np.int64)
    for _ in range(_ROUNDS):  # Lloyd: every number moves to the mean of the values nearest to it
        now = weights.ends(palettes)
        if np.array_equal(now, ends):
            break
        ends = now
        palettes = weights.means(ends, palettes)
    return palettes


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


def _cells(weights: Histograms, n: int) -> tuple[Floats, Floats]:
    """Make the histograms coarser: n intervals, narrow where a cluster will be; return (mass, mean), both (G, n).

    The best clusters lie as the cube root of the density (Panter and Dite 1951); the fourth root, which this is, gives
    the tails more cells, and takes square roots alone. No value gets much more than a cell, however lonely it is.
    """
    values, counts, first, last = weights.values, weights.counts, weights.first[:-1], weights.first[1:] - 1
    widths = np.empty_like(values)
    widths[1:-1] = (values[2:] - values[:-2]) / 2
    widths[first] = values[np.minimum(first + 1, last)] - values[first]
    widths[last] = values[last] - values[np.maximum(last - 1, first)]
    share = np.sqrt(widths * np.sqrt(widths * counts))
    share[weights.spread(weights.sizes <= n)] = 1.0
    for _ in range(2):
        share = np.minimum(share * weights.spread(n / np.add.reduceat(share, first)), 1.0)
    share *= weights.spread(n / np.add.reduceat(share, first))
    before = np.cumsum(share) - share
    cell = (before - weights.spread(before[first]) + 1e-6).astype(np.int64)  # rounding takes no value a cell back
    cell = np.minimum(cell, n - 1) + weights.spread(np.arange(len(weights)) * n)
    size = len(weights) * n
    mass = np.asarray(np.bincount(cell, counts, size), np.float64).reshape(-1, n)
    moment = np.asarray(np.bincount(cell, counts * values, size), np.float64).reshape(-1, n)
    return mass, moment / np.maximum(mass, 1)


def _centres(mass: Floats, mean: Floats, k: int) -> Floats:
    """Return the means of the best k clusters of cells: (G, n) -> (G, k)."""
    n = mass.shape[1]
    step = max(1, _AT_A_TIME // n)
    parts = [slice(start, start + step) for start in range(0, len(mass), step)]
    ends = np.concatenate([_clusters(mass[part], mean[part], k, min(n, _WIDEST * n // k)) for part in parts])
    begin = np.zeros((len(mass), 1))
    sums = [np.concatenate([begin, np.cumsum(each, axis=1)], axis=1) for each in (mass, mass * mean)]
    weight, moment = (np.diff(np.take_along_axis(each, ends, axis=1), axis=1) for each in sums)
    # A cluster of empty cells repeats the number before it; the first cell is never empty.
    return np.maximum.accumulate(np.where(weight > 0, moment / np.maximum(weight, 1), -np.inf), axis=1)


def _clusters(mass: Floats, mean: Floats, k: int, widest: int) -> Ints:
    """Return where the best k clusters of cells end: (G, n) -> (G, k + 1), the first is 0.

    D_m(j) = min over i of D_{m-1}(i) + cost(i, j), as in `optimal_palette`, for i from j - `widest` on, and for all
    groups and all j at once from which the other clusters reach both ends.
    """
    groups, n = mass.shape
    costs = _costs(mass, mean, widest)
    least = np.full((k + 1, widest + n + 1, groups), np.inf, np.float32)  # [m, widest + j, g]
    least[0, widest] = 0
    tried = np.empty((n + 1, groups), np.float32)
    for m in range(1, k + 1):
        low, high = max(m, n - (k - m) * widest), min(n - (k - m), m * widest) + 1
        best, errors = least[m, widest + low : widest + high], tried[low:high]
        for cells in range(1, widest + 1):
            before = least[m - 1, widest + low - cells : widest + high - cells]
            np.minimum(best, np.add(before, costs[cells - 1, low:high], out=errors), out=best)
    ends = np.full((groups, k + 1), n)
    each, back = np.arange(groups)[:, None], np.arange(1, widest + 1)
    for m in range(k, 0, -1):
        j = ends[:, m, None]
        sums = least[m - 1, widest + j - back, each] + costs[back - 1, j, each]
        ends[:, m - 1] = j[:, 0] - back[sums.argmin(axis=1)]
    limited = (2 * np.diff(ends, axis=1) > widest).any(axis=1)
    if widest < n and limited.any():
        ends[limited] = _clusters(mass[limited], mean[limited], k, min(n, 4 * widest))
    return ends


def _costs(mass: Floats, mean: Floats, widest: int) -> NDArray[np.float32]:
    """Return [i - 1, j, g]: the squared error of the i cells of group g before j around their mean; infinite for i > j.

    By taking one more cell at a time into the mean (Welford), which loses no digits where values are close.
    """
    groups, n = mass.shape
    costs = np.full((widest, n + 1, groups), np.inf, np.float32)
    costs[0, 1:] = 0
    mass, mean = np.ascontiguousarray(mass.T), np.ascontiguousarray(mean.T)
    weight, centre, cost = mass, mean, np.zeros_like(mass)
    for i in range(1, widest):
        weight, centre, cost = weight[1:], centre[1:], cost[1:]
        more, away = mass[: n - i], mean[: n - i] - centre
        share = more / np.maximum(weight + more, 1)
        cost = cost + weight * share * away**2
        centre, weight = centre + share * away, weight + more
        costs[i, i + 1 :] = cost
    return costs
