"""Composition: Porter and Duff's identities over all bytes, Pillow as the second opinion, and RGBA put back by maps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.compose import background, checkerboard, composite_rgba, flatten, opaque, over, resized
from glassine.runtime.decode import composite, decoded_share

RNG = np.random.default_rng(6)
SHAPE = (5, 7, 4)
layers = arrays(np.uint8, SHAPE)
few = settings(max_examples=40, deadline=None)


def with_alpha(rgba: np.ndarray, alpha: int) -> np.ndarray:
    return np.dstack([rgba[..., :3], np.full(rgba.shape[:2], alpha, np.uint8)])


@few
@given(layers, layers)
def test_clear_and_opaque_layers(back, front):
    assert np.array_equal(over([back]), back)
    assert np.array_equal(over([back, with_alpha(front, 0)]), back)
    assert np.array_equal(over([back, with_alpha(front, 255)]), with_alpha(front, 255))
    seen = back[..., 3] > 0
    assert np.array_equal(over([with_alpha(front, 0), back])[seen], back[seen])


@few
@given(layers, layers, layers)
def test_the_order_of_composing_does_not_matter_but_for_rounding(a, b, c):
    """ "over" is associative; the stack as a whole is rounded once, parts of it twice."""
    whole, parts = over([a, b, c]).astype(int), over([over([a, b]), c]).astype(int)
    alpha = whole[..., 3:] / 255
    assert np.abs((whole - parts)[..., 3]).max() <= 1
    assert np.abs(whole[..., :3] * alpha - parts[..., :3] * (parts[..., 3:] / 255)).max() <= 2


@few
@given(layers, layers)
def test_pillow_composes_the_same(back, front):
    expected = np.asarray(Image.alpha_composite(Image.fromarray(back), Image.fromarray(front))).astype(int)
    result = over([back, front]).astype(int)
    assert np.abs(result - expected)[..., 3].max() <= 1
    sure = result[..., 3] > 16  # where the colours of 8-bit arithmetic mean something
    assert not sure.any() or np.abs(result - expected)[sure].max() <= 2


@few
@given(layers, layers)
def test_over_an_opaque_background(back, front):
    alpha = front[..., 3:] / 255
    expected = front[..., :3] * alpha + back[..., :3] * (1 - alpha)
    result = flatten(front, back[..., :3])
    assert np.abs(result - expected).max() <= 0.5 + 1e-9
    assert np.array_equal(opaque(result)[..., 3], np.full(SHAPE[:2], 255))


def test_layers_that_do_not_fit():
    with pytest.raises(RequestError, match="layer 2 is 4x3, the first is 7x5"):
        over([np.zeros(SHAPE, np.uint8), np.zeros((3, 4, 4), np.uint8)])
    with pytest.raises(RequestError, match="no layers"):
        over([])


def test_backgrounds(tmp_path):
    assert (background("#ff8000", 3, 2) == (255, 128, 0)).all()
    assert (background("white", 3, 2) == 255).all()
    assert np.array_equal(background("checkerboard", 64, 32), checkerboard(64, 32))
    assert set(np.unique(checkerboard(64, 32))) == {114, 140}  # 0.45 and 0.55
    picture = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "back.png")
    assert np.array_equal(background(str(tmp_path / "back.png"), 50, 30), picture)
    assert np.array_equal(background(picture, 50, 30), picture)
    assert background(tmp_path / "back.png", 33, 21).shape == (21, 33, 3)
    with pytest.raises(RequestError, match="neither 'checkerboard', nor a colour"):
        background("no-such-colour", 3, 2)


def test_protected_pixels_are_the_sources_bytes():
    decoded, source = RNG.integers(0, 256, (2, 64, 64, 4), np.uint8)
    live = np.zeros((8, 8), int)
    live[:, 4:] = 3
    share = decoded_share(live)
    result = composite_rgba(decoded, source, live)
    assert np.array_equal(result[share == 0], source[share == 0])
    assert (share == 0).any()
    assert np.array_equal(result[share == 1], decoded[share == 1])
    assert (share == 1).any()
    assert np.array_equal(composite_rgba(decoded, source, np.zeros((8, 8))), source)
    whole = composite_rgba(with_alpha(decoded, 255), with_alpha(source, 255), live)
    assert np.array_equal(whole[..., :3], composite(decoded[..., :3], source[..., :3], live))


def test_what_lies_under_alpha_0_does_not_shine_through_the_fade():
    """Red that can be seen beside green that cannot: mixed by their alpha, only red is left, ever fainter."""
    decoded, source = np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 4), np.uint8)
    decoded[:] = (0, 255, 0, 0)
    source[:] = (255, 0, 0, 255)
    live = np.zeros((8, 8), int)
    live[:, 4:] = 1
    result = composite_rgba(decoded, source, live)
    seen = result[..., 3] > 0
    assert (result[seen][:, :3] == (255, 0, 0)).all()
    assert len(np.unique(result[..., 3])) > 4


def test_larger_pictures_keep_their_colours_at_the_edge():
    """Lanczos on each by itself; what another tool blackened under alpha 0 does not darken the edge."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[8:24, 8:24] = (200, 40, 90, 255)
    large = resized(rgba, 100, 80)
    alpha = np.asarray(Image.fromarray(rgba[..., 3]).resize((100, 80), Image.Resampling.LANCZOS))
    assert np.array_equal(large[..., 3], alpha)
    seen = large[..., 3] > 8
    assert np.abs(large[seen][:, :3].astype(int) - (200, 40, 90)).max() <= 1
    naive = np.asarray(Image.fromarray(rgba[..., :3]).resize((100, 80), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(naive[seen] - (200, 40, 90)).max() > 100
    assert resized(rgba, 32, 32) is rgba


@few
@given(st.integers(1, 40), st.integers(1, 40))
def test_opaque_pictures_are_resized_as_ever(width, height):
    rgba = with_alpha(RNG.integers(0, 256, (16, 16, 4), np.uint8), 255)
    expected = Image.fromarray(rgba[..., :3]).resize((width, height), Image.Resampling.LANCZOS)
    assert np.array_equal(resized(rgba, width, height)[..., :3], np.asarray(expected))
    with pytest.raises(RequestError, match="expected sides of 1 to"):
        resized(rgba, 0, height)
