"""Palettes against coremltools' own exact k-means, and against a search through every partition."""

import itertools

import numpy as np
import pytest
from coremltools._deps.kmeans1d import cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from glassine.convert import kmeans
from glassine.convert.kmeans import good_palette, nearest, optimal_palette


def error(values, counts, palette):
    return float(counts @ (values - palette[nearest(values, palette)]) ** 2)


def histogram(rng, size, scale=0.03):
    weight = (scale * rng.standard_t(6, size)).astype(np.float16)
    values, counts = np.unique(weight.astype(np.float64), return_counts=True)
    return weight, values, counts.astype(np.float64)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(-50, 50), st.integers(1, 9), min_size=1, max_size=9),
    st.integers(2, 4),
    st.sampled_from([0, 512]),
)
def test_no_partition_is_better(counted, k, at_once):
    values = np.array(sorted(counted), np.float64)
    counts = np.array([counted[int(v)] for v in values], np.float64)
    before, kmeans._AT_ONCE = kmeans._AT_ONCE, at_once
    try:
        palette = optimal_palette(values, counts, k)
    finally:
        kmeans._AT_ONCE = before
    best = np.inf
    for cuts in itertools.combinations(range(1, len(values)), min(k, len(values)) - 1):
        parts = zip((0, *cuts), (*cuts, len(values)), strict=True)
        means = [(counts[a:b] @ values[a:b]) / counts[a:b].sum() for a, b in parts]
        best = min(best, error(values, counts, np.array(means)))
    assert len(palette) == min(k, len(values))
    assert error(values, counts, palette) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(("size", "k"), [(300, 16), (3000, 16), (3000, 64), (1200, 256)])
def test_the_optimum_is_coremltools(size, k):
    weight, values, counts = histogram(np.random.default_rng(size + k), size)
    clusters, centroids = cluster(weight.astype(np.float64), k)
    theirs = np.square(weight.astype(np.float64) - np.array(centroids)[clusters]).sum()
    assert error(values, counts, optimal_palette(values, counts, k)) == pytest.approx(
        theirs, rel=1e-9
    )  # measured 8e-13


def test_bisection_and_trying_all_at_once_agree(monkeypatch):
    _, values, counts = histogram(np.random.default_rng(0), 500)
    assert 300 < len(values) <= 512
    at_once = optimal_palette(values, counts, 16)
    monkeypatch.setattr(kmeans, "_AT_ONCE", 0)
    assert np.array_equal(optimal_palette(values, counts, 16), at_once)


@pytest.mark.parametrize(("k", "size"), [(16, 5000), (16, 100_000), (64, 20_000), (64, 100_000), (256, 9000)])
def test_a_good_palette_is_within_one_percent_of_the_best(k, size):
    _, values, counts = histogram(np.random.default_rng(k), size)
    ours, best = (error(values, counts, make(values, counts, k)) for make in (good_palette, optimal_palette))
    assert best <= ours * (1 + 1e-12)
    assert ours < 1.01 * best  # measured at most 1.006 (k = 256), 1.003 (64), 1.001 (16)


def test_counts_weigh():
    values, counts = np.array([0.0, 1.0, 10.0]), np.array([3.0, 1.0, 1.0])
    assert optimal_palette(values, counts, 2).tolist() == [0.25, 10.0]


@pytest.mark.parametrize("make", [optimal_palette, good_palette])
def test_fewer_values_than_numbers(make):
    assert make(np.array([-1.0, 2.0]), np.array([5.0, 1.0]), 16).tolist() == [-1.0, 2.0]
