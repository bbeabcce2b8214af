"""From words and masks to the integers the loop reads, and the picture that shows them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from glassine.errors import RequestError
from glassine.runtime.change_map import (
    RULES,
    combine,
    distance,
    is_description,
    n_table,
    parse,
    soften,
    to_cells,
)
from glassine.runtime.map_picture import render
from glassine.runtime.schedule import STABLE_DIFFUSION, last_steps, make_sigmas

RNG = np.random.default_rng(4)
KARRAS, LINSPACE = (make_sigmas(STABLE_DIFFUSION, 20, spacing) for spacing in ("karras", "linspace"))
TONES = np.array([[0, 0.10, 0.25, 0.50, 0.75, 0.90, 1]])


def test_a_cell_changes_as_its_most_changeable_pixel() -> None:
    change = RNG.random((24, 40)).astype(np.float32)
    expected = np.array([[change[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].max() for x in range(5)] for y in range(3)])
    assert np.array_equal(to_cells(change), expected)
    mean = np.array([[change[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() for x in range(5)] for y in range(3)])
    assert np.allclose(to_cells(change, "mean"), mean, rtol=1e-6)  # measured 1e-7: order of summation


def test_a_stroke_of_one_pixel_is_not_lost() -> None:
    stroke = np.zeros((64, 64), dtype=np.float32)
    stroke[:, 33] = 1
    expected = np.zeros((8, 8))
    expected[:, 4] = 1
    assert np.array_equal(to_cells(stroke), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.zeros((8, 12)), r"shape \(8, 12\); expected \(height, width\) in multiples of 8"),
        (np.zeros((8, 8, 3)), r"shape \(8, 8, 3\)"),
        (np.full((8, 8), 255.0), "from 255 to 255; expected 0"),
        (np.full((8, 8), -0.1), "from -0.1 to -0.1"),
        (np.full((8, 8), np.nan), "from nan to nan"),
    ],
)
def test_maps_that_cannot_be_used(change: np.ndarray, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        to_cells(change)


# The published behaviours: evaluations that influence a cell, by tone, over 20 steps.
@pytest.mark.parametrize(
    ("rule", "sigmas", "expected"),
    [
        ("scale", KARRAS, [0, 2, 5, 10, 15, 18, 20]),
        ("scale", LINSPACE, [0, 2, 5, 10, 15, 18, 20]),
        ("cap", KARRAS, [0, 2, 5, 10, 15, 18, 20]),
        ("authors", KARRAS, [1, 3, 6, 11, 16, 19, 20]),
        ("authors", LINSPACE, [1, 3, 6, 11, 16, 19, 20]),
        ("time", LINSPACE, [0, 2, 5, 10, 15, 18, 20]),
        ("time", KARRAS, [0, 6, 8, 11, 14, 17, 20]),
    ],
)
def test_rules(rule: str, sigmas: np.ndarray, expected: list[int]) -> None:
    table = n_table(TONES, sigmas, rule, total=20)
    assert table.shape == (1, 1, 1, 7)
    assert table.ravel().tolist() == expected


def test_strength_scales_or_caps() -> None:
    """Strength 0.5 of 20 steps leaves 10: half-way grey is half of them, or still 10 of the 20."""
    half = last_steps(KARRAS, 0.5)
    assert n_table(TONES, half, "scale", total=20).ravel().tolist() == [0, 1, 3, 5, 8, 9, 10]
    assert n_table(TONES, half, "cap", total=20).ravel().tolist() == [0, 2, 5, 10, 10, 10, 10]
    nothing = last_steps(KARRAS, 0.0)
    for rule in RULES:
        assert n_table(TONES, nothing, rule, total=20).max() == 0


@pytest.mark.parametrize("steps", [1, 3, 10, 20, 30, 50, 150, 300])
def test_tones_of_whole_steps_are_exact_in_float32(steps: int) -> None:
    """j / S is j steps, though j / S * S is often a little more or less than j."""
    tones = (np.arange(steps + 1) / steps).astype(np.float32)[None]
    sigmas = make_sigmas(STABLE_DIFFUSION, steps, "karras")
    assert n_table(tones, sigmas).ravel().tolist() == list(range(steps + 1))
    authors = [min(steps, j + 1) for j in range(steps + 1)]
    assert n_table(tones, sigmas, "authors").ravel().tolist() == authors


def test_there_are_as_many_levels_as_steps_and_one() -> None:
    tones = np.linspace(0, 1, 10_001)[None]
    assert len(np.unique(n_table(tones, KARRAS))) == 21


def test_unknown_rule() -> None:
    with pytest.raises(RequestError, match='change rule "comfy" is not known; expected one of scale, cap'):
        n_table(TONES, KARRAS, "comfy")


def test_distance_is_exact() -> None:
    for _ in range(40):
        mask = RNG.random((RNG.integers(1, 60), RNG.integers(1, 60))) < RNG.choice([0.003, 0.05, 0.5])
        reach = int(RNG.integers(1, 70))
        if mask.any():
            expected = np.minimum(distance_transform_edt(~mask), reach + 1).astype(np.float32)
            assert np.array_equal(distance(mask, reach), expected)


def test_softness_goes_outward_only() -> None:
    mask = np.zeros((96, 120), dtype=bool)
    mask[40:42, 30:90] = True  # thinner than the softness: an inward blur would erase it
    soft = soften(mask, 16)
    assert np.all(soft[mask] == 1)
    ratio = np.clip(distance_transform_edt(~mask) / 16, 0, 1)
    assert np.abs(soft - (1 - (3 * ratio**2 - 2 * ratio**3))).max() < 5e-7  # measured 2e-7
    assert np.all(soft[distance_transform_edt(~mask) >= 16] == 0)
    assert np.array_equal(soften(mask, 0), mask.astype(np.float32))
    assert not soften(np.zeros((8, 8), dtype=bool), 4).any()
    with pytest.raises(RequestError, match="softness is -1 pixels"):
        soften(mask, -1)


def test_gradients() -> None:
    assert np.array_equal(parse("gradient:left-right", 5, 2), np.tile(np.linspace(0, 1, 5, dtype=np.float32), (2, 1)))
    assert np.array_equal(parse("gradient:right-left", 5, 2), parse("gradient:left-right", 5, 2)[:, ::-1])
    assert np.array_equal(parse("gradient:top-bottom", 2, 5), parse("gradient:left-right", 5, 2).T)
    assert np.array_equal(parse("gradient:bottom-top", 2, 5), parse("gradient:left-right", 5, 2).T[::-1])
    part = parse("gradient:left-right:from=0.8:to=0.2", 4, 1)
    assert np.allclose(part, [[0.8, 0.6, 0.4, 0.2]], atol=1e-7)


def test_boxes_and_ellipses() -> None:
    box = np.zeros((40, 60), dtype=np.float32)
    box[10:30, 6:36] = 1
    assert np.array_equal(parse("box:6,10,30,20", 60, 40), box)
    assert np.array_equal(parse("box:10%,25%,50%,50%", 60, 40), box)
    assert np.array_equal(parse("box:6,10,30,20:soft=7", 60, 40), soften(box == 1, 7))
    assert np.allclose(parse("box:6,10,30,20:soft=7:change=0.6", 60, 40), 0.6 * soften(box == 1, 7), atol=1e-7)
    y, x = np.mgrid[:40, :60] + 0.5
    inside = ((x - 21) / 15) ** 2 + ((y - 20) / 10) ** 2 <= 1
    assert np.array_equal(parse("ellipse:6,10,30,20", 60, 40), inside.astype(np.float32))
    # Partly outside of the picture.
    assert np.array_equal(parse("box:-10,-10,20,20", 60, 40), np.pad(np.ones((10, 10)), ((0, 30), (0, 50))))


def test_the_strongest_of_several_wins() -> None:
    words = ["box:0,0,50%,100%:change=0.4", "gradient:left-right", "flat:0.25"]
    expected = np.maximum.reduce([parse(word, 64, 8) for word in words])
    for order in itertools.permutations(words):
        assert np.array_equal(parse("+".join(order), 64, 8), expected)
    assert np.array_equal(combine([expected, parse(words[0], 64, 8)]), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("circle:1,2,3,4", 'map "circle:1,2,3,4" is not understood; expected gradient'),
        ("gradient:up", 'direction "up"; expected one of left-right'),
        ("box:1,2,3", "is not understood"),
        ("box:1,2,3,x", '"x" is not a number'),
        ("box:1,2,0,4", "width 0 and height 4 pixels; expected more than 0"),
        ("box:1,2,3,4:soft", "is not understood"),
        ("box:1,2,3,4:feather=3", "is not understood"),
        ("box:1,2,3,4:soft=-3", "softness is -3"),
        ("box:1,2,3,4:change=2", "change is 2; expected 0"),
        ("gradient:left-right:to=1.5", "to is 1.5; expected 0"),
        ("flat:nan", '"nan" is not a number'),
        ("flat:2", "2; expected 0"),
        ("flat:0.5+", "is not understood"),
    ],
)
def test_words_that_are_not_understood(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(").replace("+", r"\+")):
        parse(text, 64, 64)


def test_words_and_files_are_told_apart() -> None:
    assert is_description("box:1,2,3,4")
    assert is_description("flat:0.5+box:1,2,3,4")
    for path in ("map.png", "box", "C:\\maps\\box.png", "box.png", "boxes:1", "flat"):
        assert not is_description(path)


def test_the_picture_shows_n() -> None:
    n = np.zeros((1, 1, 8, 32), dtype=np.int64)
    n[..., 8:16], n[..., 16:24], n[..., 24:] = 1, 10, 20
    source = np.full((64, 256, 3), 128, dtype=np.uint8)
    picture = render(n, 20, source)
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (256, 3)
    kept, one, ten, all_of_them = (picture[32, 32 + 64 * k].astype(int) for k in range(4))
    assert kept.max() == kept.min()  # grey: nothing happens here
    assert one[2] - one[0] > 30  # blue
    assert all_of_them[0] - all_of_them[2] > 60  # yellow
    lightness = [colour @ [0.299, 0.587, 0.114] for colour in (one, ten, all_of_them)]
    assert lightness == sorted(lightness)  # reads without colour
    assert np.array_equal(picture[32, 64], [255, 255, 255])  # the border of what is kept
    # The scale holds the colour of every n, in order, and marks those that occur.
    bar = picture[64 + 17, 8:248].astype(int)
    changes = np.flatnonzero(np.abs(np.diff(bar, axis=0)).sum(axis=1) > 3)
    assert len(changes) >= 20
    marks = picture[64 + 7, 8:248].mean(axis=1) < 60
    assert marks.mean() == pytest.approx(4 / 21, abs=0.03)


def test_the_picture_of_a_map_that_does_nothing() -> None:
    n = np.zeros((1, 1, 8, 8), dtype=np.int64)
    for steps in (0, 20):
        picture = render(n, steps, np.full((64, 64, 3), 90, dtype=np.uint8))[:64].astype(int)
        assert np.ptp(picture) == 0
