"""Palettes against coremltools' own exact k-means, and against a search through every partition."""

import itertools

import numpy as np
import pytest
from coremltools._deps.kmeans1d import cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from glassine.convert import kmeans
from glassine.convert.histogram import RANKS, VALUES, Histograms
from glassine.convert.kmeans import good_palettes, optimal_palette


def error(values, counts, palette):
    return float(counts @ np.abs(values[:, None] - palette).min(axis=1) ** 2)


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


def student(rng, shape):
    return 0.03 * rng.standard_t(6, shape)


def lonely(rng, shape):
    """Some values a thousand times as large as the rest."""
    return np.where(rng.random(shape) < 0.002, 1.0, 0.001) * rng.standard_normal(shape)


def scales(rng, shape):
    """Groups, and runs in them, of very different scales."""
    runs = np.exp(rng.standard_normal((*shape[:-1], shape[-1] // 64))).repeat(64, axis=-1)
    return 10.0 ** np.linspace(-4, 2, shape[0])[:, None] * runs * rng.standard_normal(shape)


KINDS = {
    "student": student,
    "lonely": lonely,
    "scales": scales,
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "pruned": lambda rng, shape: 0.03 * rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    "rounded": lambda rng, shape: np.round(60 * rng.standard_normal(shape)) / 60,
}


@pytest.mark.parametrize("k", [16, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_good_palettes_are_within_one_percent_of_the_best(kind, k):
    """Several groups at once, each against coremltools' exact answer; and the same groups alone."""
    groups = KINDS[kind](np.random.default_rng(k), (3, 10_240)).astype(np.float16)
    counted = Histograms.of_groups(groups.view(np.uint16))
    palettes = good_palettes(counted, k)
    assert (np.diff(palettes) >= 0).all()
    for group, palette, start, stop in zip(groups, palettes, counted.first, counted.first[1:], strict=False):
        values, counts = counted.values[start:stop], counted.counts[start:stop]
        clusters, centroids = cluster(values, k, weights=counts)
        best = float(counts @ (values - np.array(centroids)[clusters]) ** 2)
        ours = error(values, counts, palette)
        assert best * (1 - 1e-9) <= ours
        assert ours <= 1.01 * best  # measured at most 1.004 (k = 256), 1.003 (64), 1.0011 (16)
        alone = Histograms.of_one(group.view(np.uint16))
        assert np.array_equal(good_palettes(alone, k)[0], palette)
        assert alone.error(palette[None]) == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize(("size", "k"), [(1_000_000, 16), (1_000_000, 64), (100_000, 256)])
def test_a_palette_of_a_large_weight_is_good(size, k):
    weight = student(np.random.default_rng(k), size).astype(np.float16)
    counted = Histograms.of_one(weight.view(np.uint16))
    clusters, centroids = cluster(counted.values, k, weights=counted.counts)
    best = float(counted.counts @ (counted.values - np.array(centroids)[clusters]) ** 2)
    ours = counted.error(good_palettes(counted, k))
    assert best * (1 - 1e-9) <= ours <= 1.005 * best  # measured 1.0025 (k = 256), 1.0024 (64), 1.0002 (16)


def test_clusters_wider_than_expected_are_found():
    """Fifteen values far out, and a thousand in the middle that must share the last number."""
    values = np.concatenate([np.linspace(0, 1e-3, 1000), 10.0 + np.arange(15)]).astype(np.float16)
    counted = Histograms.of_one(np.tile(values, 20).view(np.uint16))
    assert len(counted.values) > 2 * 16 * kmeans._CELLS[16]
    assert np.array_equal(good_palettes(counted, 16)[0, 1:], 10.0 + np.arange(15))


def test_histograms_count_every_value():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 1 << 16, (5, 3000)).astype(np.uint16)
    groups[~np.isfinite(groups.view(np.float16))] = 0x8000  # -0, which is 0
    counted = Histograms.of_groups(groups)
    assert len(counted) == 5
    for group, start, stop in zip(groups, counted.first, counted.first[1:], strict=False):
        values, counts = np.unique(group.view(np.float16).astype(np.float64), return_counts=True)
        assert np.array_equal(counted.values[start:stop], values)
        assert np.array_equal(counted.counts[start:stop], counts)
        alone = Histograms.of_one(group)
        assert np.array_equal(alone.values, values)
        assert np.array_equal(alone.counts, counts)
    assert counted.power() == pytest.approx(np.square(groups.view(np.float16), dtype=np.float64).sum())


def test_every_finite_value_has_its_rank():
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(half)
    assert len(VALUES) == 2 * 31 * 1024 - 1  # two signs, 31 exponents, 1024 fractions; one zero
    assert np.array_equal(VALUES[RANKS[finite]], half[finite].astype(np.float64))


def test_counts_weigh():
    values, counts = np.array([0.0, 1.0, 10.0]), np.array([3.0, 1.0, 1.0])
    assert optimal_palette(values, counts, 2).tolist() == [0.25, 10.0]


def test_fewer_values_than_numbers():
    assert optimal_palette(np.array([-1.0, 2.0]), np.array([5.0, 1.0]), 16).tolist() == [-1.0, 2.0]
    groups = np.array([[-1, 2, 2, -1], [5, 5, 5, 5], [1, 2, 3, 4]], np.float16)
    palettes = good_palettes(Histograms.of_groups(groups.view(np.uint16)), 16)
    assert palettes.tolist() == [[-1.0] + [2.0] * 15, [5.0] * 16, [1.0, 2.0, 3.0] + [4.0] * 13]
