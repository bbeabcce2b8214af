"""The maps that need no network, against formulas written a second time: scipy, skimage, colorsys or plain loops."""

import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.color import rgb2lab

from glassine.errors import RequestError
from glassine.runtime.preprocess import colour, lines, texture
from glassine.runtime.preprocess.catalogue import KINDS


def gaussian(pixels, sigma, width):
    """OpenCV's Gaussian, by scipy: `width` taps, mirrored without the border pixel."""
    taps = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    values = pixels.astype(np.float64)
    for axis in (0, 1):
        values = ndimage.correlate1d(values, taps, axis=axis, mode="mirror")
    return values


def taps_of_float(sigma):
    return round(sigma * 8 + 1) | 1  # four sigmas to each side for floats, three for bytes


def test_canny_is_opencvs_on_the_colours(photograph):
    expected = cv2.Canny(photograph, 100, 200, apertureSize=3, L2gradient=False)
    ours = lines.canny(photograph, low=100, high=200)
    assert np.array_equal(ours, np.stack([expected] * 3, axis=-1))
    assert not np.array_equal(ours, lines.canny(photograph, low=100, high=150))


def test_canny_thresholds_are_the_gradient_of_the_strongest_channel(drawing):
    sobel = [[ndimage.sobel(drawing[..., c].astype(int), axis=a, mode="nearest") for c in range(3)] for a in (0, 1)]
    strength = (np.abs(sobel[0]) + np.abs(sobel[1])).max(axis=0)
    edges = lines.canny(drawing, low=300, high=300)[..., 0] > 0
    assert edges.any()
    assert (strength[edges] > 300).all()
    assert not lines.canny(drawing, low=strength.max(), high=strength.max()).any()


def test_canny_with_thresholds_the_wrong_way_round():
    with pytest.raises(RequestError, match="low is 200 and high is 100; expected low <= high"):
        lines.canny(np.zeros((8, 8, 3), np.uint8), low=200, high=100)


def test_scribble_is_the_difference_of_gaussians(photograph):
    fine, coarse = (gaussian(photograph, s, taps_of_float(s)) for s in (0.5, 5.0))
    difference = np.floor(np.clip(255 - (coarse - fine).min(axis=-1), 0, 255))
    expected = 2 * (255 - difference) > 32
    ours = lines.scribble(photograph, threshold=32)[..., 0] > 0
    assert 0.02 < expected.mean() < 0.5
    assert (ours != expected).mean() <= 1e-4  # measured 0: float32 against float64 may fall on either side of a level


def test_scribble_of_strong_strokes_is_solid():
    # 8-bit arithmetic would wrap where the difference is 128 or more and leave holes in the blackest strokes.
    paper = np.full((64, 64, 3), 255, np.uint8)
    paper[30:33, 8:56] = 0
    assert (lines.scribble(paper, threshold=32)[31, 12:52] == 255).all()


def test_lineart_is_the_normalised_difference_to_the_blur(photograph):
    difference = np.clip((gaussian(photograph, 6.0, taps_of_float(6.0)) - photograph).min(axis=-1), 0, 255)
    usual = max(16.0, np.median(difference[difference > 8]))
    expected = np.clip(difference / usual * 127, 0, 255)
    ours = lines.lineart(photograph, sigma=6, floor=8)[..., 0]
    assert np.abs(ours - np.floor(expected)).max() <= 1  # measured 1, where float32 falls below a whole level
    assert (ours != np.floor(expected)).mean() < 1e-3
    assert ours.max() > 200


def test_lineart_of_a_blank_page_is_black():
    assert not lines.lineart(np.full((64, 64, 3), 200, np.uint8), sigma=6, floor=8).any()


@pytest.mark.parametrize("level", [0, 127, 254])
def test_threshold_looks_at_the_darkest_channel(photograph, level):
    expected = np.where(photograph.min(axis=-1) > level, 255, 0)
    assert np.array_equal(lines.threshold(photograph, threshold=level), np.stack([expected] * 3, axis=-1))


def test_invert(photograph):
    assert np.array_equal(colour.invert(photograph).astype(int), 255 - photograph.astype(int))


def test_luminance_is_cie_lightness(photograph):
    lightness = rgb2lab(photograph)[..., 0] / 100 * 255
    error = np.abs(colour.luminance(photograph, gamma=1) - lightness[..., None])
    assert error.max() <= 1.5  # measured 1.1: OpenCV's 8-bit Lab is a table
    assert error.mean() < 0.5


@pytest.mark.parametrize("gamma", [0.5, 1.7])
def test_gamma_bends_the_lightness(photograph, gamma):
    straight = colour.luminance(photograph, gamma=1) / 255
    assert np.array_equal(colour.luminance(photograph, gamma=gamma), np.rint(255 * straight**gamma))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.7])
def test_intensity_is_the_value_of_hsv(drawing, gamma):
    value = np.array([[colorsys.rgb_to_hsv(*(pixel / 255.0))[2] for pixel in row] for row in drawing])
    assert np.array_equal(colour.intensity(drawing, gamma=gamma), np.rint(255 * value**gamma)[..., None].repeat(3, -1))


def test_gamma_one_changes_nothing():
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, -1)
    assert np.array_equal(colour.intensity(ramp, gamma=1), ramp)


@pytest.mark.parametrize(
    ("give_back", "kind"), [(colour.with_luminance, colour.luminance), (colour.with_intensity, colour.intensity)]
)
def test_a_recoloured_picture_has_the_lightness_of_its_source(photograph, give_back, kind):
    tinted = np.clip(photograph.astype(int)[::-1] // 2 + (70, 60, 50), 0, 255).astype(np.uint8)
    result = give_back(tinted, photograph)
    error = np.abs(kind(result, gamma=1).astype(int) - kind(photograph, gamma=1).astype(int))
    assert np.percentile(error, 99) <= 4  # colours outside RGB cannot have any lightness
    assert np.abs(kind(tinted, gamma=1).astype(int) - kind(photograph, gamma=1).astype(int)).mean() > 20
    own = give_back(photograph, photograph)
    assert np.abs(own.astype(int) - photograph).max() <= 9  # measured 9: 8-bit Lab and HSV there and back


@pytest.mark.parametrize("cell", [1, 16, 64])
def test_a_grid_has_one_colour_a_square(photograph, cell):
    pixels = photograph[:256, :448]
    grid = colour.grid(pixels, cell=cell)
    squares = grid.reshape(256 // cell, cell, 448 // cell, cell, 3).swapaxes(1, 2)
    assert np.array_equal(squares, np.broadcast_to(squares[:, :, :1, :1], squares.shape))
    few = cv2.resize(pixels, (448 // cell, 256 // cell), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(squares[:, :, 0, 0], few)


def test_tile_averages_blocks(photograph):
    pixels = photograph[:300, :450]
    blocks = pixels.reshape(100, 3, 150, 3, 3).mean(axis=(1, 3))
    assert np.abs(texture.tile(pixels, factor=3) - blocks).max() <= 0.5 + 1e-6  # rounding to bytes
    assert texture.tile(pixels, factor=1.09) is pixels
    assert texture.tile(pixels, factor=2).shape == (150, 225, 3)


def test_blur_is_a_gaussian(photograph):
    expected = gaussian(photograph, 9.0, round(9.0 * 6 + 1) | 1)
    assert np.abs(texture.blur(photograph, sigma=9) - expected).max() <= 1.0  # measured 0.54


def test_shuffle_moves_by_two_fields_of_numpys_legacy_noise(photograph):
    height, width = photograph.shape[:2]
    random = np.random.RandomState(5)
    fields = []
    for length in (width, height):  # across first, then down: the order others draw in
        points = random.uniform(0, 1, (height // 256 + 2, width // 256 + 2, 1))
        field = cv2.resize(points, (width + 512, height + 512), interpolation=cv2.INTER_CUBIC)[256:-256, 256:-256]
        fields.append((field - field.min()) / (field.max() - field.min()) * (length - 1))
    expected = np.stack(
        [ndimage.map_coordinates(photograph[..., c].astype(float), fields[::-1], order=1) for c in range(3)], axis=-1
    )
    error = np.abs(texture.shuffle(photograph, seed=5) - expected)
    assert error.max() <= 6  # measured 5.1: OpenCV moves in 32nds of a pixel
    assert error.mean() < 0.5
    assert not np.array_equal(texture.shuffle(photograph, seed=5), texture.shuffle(photograph, seed=6))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.sampled_from(sorted(n for n, k in KINDS.items() if k.needs == "nothing"))
)
def test_any_size_gives_a_map_of_its_size(height, width, name):
    pixels = np.random.default_rng(height * 71 + width).integers(0, 256, (height, width, 3), np.uint8)
    before = pixels.copy()
    kind = KINDS[name]
    result = kind.run(pixels, **kind.checked(name, {}))
    assert result.shape == (height, width, 3)
    assert result.dtype == np.uint8
    assert np.array_equal(pixels, before)
