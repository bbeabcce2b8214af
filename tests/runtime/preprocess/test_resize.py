"""Sizes by the stated rules, and maps that stay what they are when they are scaled."""

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from glassine.errors import RequestError
from glassine.runtime.preprocess import resize

sides = st.integers(1, 300)
targets = st.tuples(st.integers(1, 24), st.integers(1, 24)).map(lambda t: (8 * t[0], 8 * t[1]))


@pytest.mark.parametrize(
    ("size", "fit", "resolution"),
    [
        ((1000, 700), "crop", 512),
        ((1000, 700), "stretch", 512),
        ((1000, 700), "fit", 358),  # 512 / 1000 * 700 = 358.4
        ((300, 900), "crop", 512),
        ((300, 900), "fit", 171),  # 512 / 900 * 300 = 170.7
    ],
)
def test_pixel_perfect_by_hand(size, fit, resolution):
    assert resize.pixel_perfect(size, (512, 512), fit) == resolution


@settings(max_examples=60, deadline=None)
@given(sides, sides, targets)
def test_at_the_pixel_perfect_resolution_little_is_left_to_scale(width, height, target):
    resolution = resize.pixel_perfect((width, height), target, "crop")
    assume(resolution / min(width, height) * max(width, height) * resolution < 1e5)
    seen = resize.to_resolution(np.zeros((height, width, 3), np.uint8), resolution)
    left = max(target[0] / seen.shape[1], target[1] / seen.shape[0])
    assert abs(left - 1) <= 1.01 / min(seen.shape[:2])  # both sides were rounded to pixels


def test_to_resolution_averages_down_and_is_bicubic_up(photograph):
    down = resize.to_resolution(photograph[:, :450], 100)
    assert np.abs(down - photograph[:, :450].reshape(100, 3, 150, 3, 3).mean(axis=(1, 3))).max() <= 0.5 + 1e-6
    assert np.array_equal(resize.to_resolution(photograph, 300), photograph)
    up = resize.to_resolution(photograph, 600)
    assert np.array_equal(up, cv2.resize(photograph, (902, 600), interpolation=cv2.INTER_CUBIC))


def test_a_ribbon_is_refused():
    ribbon = np.zeros((40000, 1, 3), np.uint8)
    with pytest.raises(RequestError, match=r"1x40000 would become 512x20480000 .* cut it to the part"):
        resize.to_resolution(ribbon, 512)
    with pytest.raises(RequestError, match="1x40000 would become 512x20480000"):
        resize.place(ribbon, (512, 512), "crop")
    assert resize.place(ribbon, (512, 512), "fit").shape == (512, 512, 3)


@settings(max_examples=60, deadline=None)
@given(sides, sides)
def test_padding_repeats_the_edges_to_the_next_multiple_of_64(height, width):
    pixels = np.random.default_rng(height + 997 * width).integers(0, 256, (height, width, 3), np.uint8)
    padded = resize.padded(pixels)
    assert padded.shape[0] % 64 == padded.shape[1] % 64 == 0
    assert padded.shape[0] - height < 64
    assert padded.shape[1] - width < 64
    y, x = np.mgrid[: padded.shape[0], : padded.shape[1]]
    assert np.array_equal(padded, pixels[np.minimum(y, height - 1), np.minimum(x, width - 1)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), targets, st.sampled_from(["crop", "fit", "stretch"]))
def test_every_fit_gives_the_models_size(height, width, target, fit):
    pixels = np.random.default_rng(height + 997 * width).integers(0, 256, (height, width, 3), np.uint8)
    placed = resize.place(pixels, target, fit)
    assert placed.shape == (target[1], target[0], 3)
    mask = resize.place_mask(pixels[..., 0] > 127, target, fit)
    assert mask.shape == (target[1], target[0])


def test_crop_keeps_the_middle(photograph):
    placed = resize.place(photograph, (200, 296), "crop")  # 296 / 300 = 0.9867; 451 -> 445; (445 - 200) // 2 = 122
    whole = cv2.resize(photograph, (445, 296), interpolation=cv2.INTER_AREA)
    assert np.array_equal(placed, whole[:, 122:322])


def test_fit_fills_with_the_median_of_the_border(photograph):
    placed = resize.place(photograph, (448, 448), "fit")  # 448 / 451 * 300 = 298.004
    border = np.concatenate([photograph[0], photograph[-1], photograph[:, 0], photograph[:, -1]])
    margin = np.median(border, axis=0).astype(np.uint8)
    assert (placed[:75] == margin).all()
    assert (placed[75 + 298 :] == margin).all()
    assert np.array_equal(placed[75:373], cv2.resize(photograph, (448, 298), interpolation=cv2.INTER_AREA))


def test_stretch_scales_each_side(photograph):
    placed = resize.place(photograph, (512, 512), "stretch")
    assert np.array_equal(placed, cv2.resize(photograph, (512, 512), interpolation=cv2.INTER_CUBIC))


def test_few_colours_stay_those_colours():
    flat = np.zeros((50, 60, 3), np.uint8)
    flat[10:30, 20:50], flat[35:, :15] = (4, 200, 3), (120, 120, 120)
    for target in ((32, 32), (128, 128)):
        placed = resize.place(flat, target, "stretch")
        assert {tuple(c) for c in placed.reshape(-1, 3)} == {(0, 0, 0), (4, 200, 3), (120, 120, 120)}


def test_black_and_white_stays_black_and_white():
    y, x = np.mgrid[:100, :100]
    disc = np.where((y - 50) ** 2 + (x - 50) ** 2 < 900, 255, 0)[..., None].repeat(3, -1).astype(np.uint8)
    for side in (64, 160):
        placed = resize.place(disc, (side, side), "stretch")
        assert set(np.unique(placed)) == {0, 255}
        assert abs((placed > 0).mean() - (disc > 0).mean()) < 0.01


@pytest.mark.parametrize("side", [64, 160, 256])
def test_lines_one_pixel_wide_stay_so(side):
    drawn = np.zeros((128, 128, 3), np.uint8)
    cv2.circle(drawn, (64, 64), 40, (255, 255, 255), 1)
    cv2.line(drawn, (5, 120), (120, 100), (255, 255, 255), 1)
    placed = resize.place(drawn, (side, side), "stretch")[..., 0]
    assert set(np.unique(placed)) == {0, 255}
    squares = ndimage.minimum_filter(placed, size=(2, 2))
    assert (squares > 0).sum() <= 2  # measured 0: no 2x2 block is white
    length = (placed > 0).sum() / (side / 128)
    assert 0.85 < length / (drawn[..., 0] > 0).sum() < 1.2
    ideal = cv2.resize(drawn[..., 0], (side, side), interpolation=cv2.INTER_LINEAR) > 0
    near = ndimage.binary_dilation(ideal, iterations=1)
    assert near[placed > 0].all()


def test_thick_lines_are_not_thinned():
    drawn = np.zeros((128, 128, 3), np.uint8)
    cv2.circle(drawn, (64, 64), 40, (255, 255, 255), 7)
    placed = resize.place(drawn, (256, 256), "stretch")[..., 0]
    assert abs((placed > 0).mean() - (drawn > 0).mean()) < 0.01


def zhang_suen(white):
    """The paper's two sub-iterations, pixel by pixel."""
    on = np.pad(white, 1).astype(int)
    while True:
        removed = 0
        for first in (True, False):
            doomed = []
            for y, x in np.argwhere(on):
                p2, p3, p4, p5, p6, p7, p8, p9 = p = (
                    on[y - 1, x], on[y - 1, x + 1], on[y, x + 1], on[y + 1, x + 1],
                    on[y + 1, x], on[y + 1, x - 1], on[y, x - 1], on[y - 1, x - 1],
                )  # fmt: skip
                rises = sum(1 for a, b in zip(p, (*p[1:], p2), strict=True) if (a, b) == (0, 1))
                products = (p2 * p4 * p6, p4 * p6 * p8) if first else (p2 * p4 * p8, p2 * p6 * p8)
                if 2 <= p2 + p3 + p4 + p5 + p6 + p7 + p8 + p9 <= 6 and rises == 1 and products == (0, 0):
                    doomed.append((y, x))
            for y, x in doomed:
                on[y, x] = 0
            removed += len(doomed)
        if not removed:
            return on[1:-1, 1:-1] > 0


def test_thinning_is_zhangs_and_suens(photograph):
    white = photograph[100:170, 200:300, 0] > 140
    assert 0.2 < white.mean() < 0.8
    thin = resize.thinned(white.astype(np.uint8) * np.uint8(255))
    assert np.array_equal(thin > 0, zhang_suen(white))


def test_thinning_keeps_what_is_connected(photograph):
    eight = np.ones((3, 3))
    white = ndimage.binary_opening(photograph[..., 0] > 140, eight)  # nothing as small as the 2x2 squares it takes away
    thin = resize.thinned(white.astype(np.uint8) * np.uint8(255)) > 0
    assert ndimage.label(thin, eight)[1] == ndimage.label(white, eight)[1] > 10
    assert thin.sum() < white.sum() / 4


def test_a_masks_margins_are_repainted():
    mask = np.zeros((40, 80), bool)
    mask[10:20, 10:20] = True
    placed = resize.place_mask(mask, (80, 80), "fit")
    assert placed[:20].all()
    assert placed[60:].all()
    assert np.array_equal(placed[20:60], mask)
    assert not resize.place_mask(mask, (80, 80), "crop")[:, -1].any()
