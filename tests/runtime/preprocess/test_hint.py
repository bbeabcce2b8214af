"""Whole hints: what a control net is given, from files and arrays, and what is said about bad ones."""

import cv2
import numpy as np
import pytest
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.preprocess import KINDS, Preprocess, hint
from glassine.runtime.preprocess.catalogue import Choice


def test_a_map_of_the_models_size_is_handed_over_untouched(photograph):
    pixels = photograph[:256, :384]
    made = hint(pixels, (384, 256))
    assert np.array_equal(made.pixels, pixels)
    assert made.values.dtype == np.float32
    assert np.array_equal(made.values, np.moveaxis(pixels, -1, 0)[None].astype(np.float32) / 255)


def test_canny_is_seen_at_the_pixel_perfect_resolution_and_padded(photograph):
    # 451x300 to cover 512x384: k = 1.28, so 384 high and round(577.28) wide, 577 -> 640 with repeated edges.
    seen = cv2.resize(photograph, (577, 384), interpolation=cv2.INTER_CUBIC)
    seen = np.pad(seen, ((0, 0), (0, 63), (0, 0)), mode="edge")
    edges = cv2.Canny(seen, 100, 200)[:, :577]
    made = hint(photograph, (512, 384), Preprocess(name="canny"))
    assert np.array_equal(made.pixels, np.stack([edges[:, 32:544]] * 3, axis=-1))


def test_a_blur_sees_repeated_edges(photograph):
    seen = np.pad(photograph, ((0, 20), (0, 61), (0, 0)), mode="edge")  # 300 -> 320, 451 -> 512
    blurred = cv2.GaussianBlur(seen, (0, 0), 9.0)[:300, :451]
    made = hint(photograph, (448, 296), Preprocess(name="blur", resolution=300, fit="stretch"))
    assert np.array_equal(made.pixels, cv2.resize(blurred, (448, 296), interpolation=cv2.INTER_AREA))


def test_the_resolution_can_be_said(photograph):
    coarse = hint(photograph, (512, 384), Preprocess(name="canny", resolution=128))
    fine = hint(photograph, (512, 384), Preprocess(name="canny"))
    assert not np.array_equal(coarse.pixels, fine.pixels)
    assert set(np.unique(coarse.pixels)) == {0, 255}


def test_settings_reach_the_preprocessor(photograph):
    assert (hint(photograph, (64, 64), Preprocess(name="threshold", settings={"threshold": 255})).pixels == 0).all()
    words = Preprocess.read("canny,low=20,high=60")
    assert words == Preprocess(name="canny", settings={"low": "20", "high": "60"})
    numbers = Preprocess(name="canny", settings={"low": 20, "high": 60})
    assert np.array_equal(hint(photograph, (64, 64), words).pixels, hint(photograph, (64, 64), numbers).pixels)


@pytest.mark.parametrize("fit", ["crop", "fit", "stretch"])
def test_inpaint_is_minus_one_where_the_mask_says(photograph, fit):
    mask = np.zeros(photograph.shape[:2], np.float32)
    mask[100:200, 150:300], mask[:20] = 1.0, 0.49
    made = hint(photograph, (256, 256), Preprocess(name="inpaint", fit=fit), mask=mask)
    plain = hint(photograph, (256, 256), Preprocess(fit=fit))
    cut = (made.values == -1).all(axis=1, keepdims=True)
    assert np.array_equal(made.values, np.where(cut, np.float32(-1), plain.values))
    assert abs(np.argwhere(cut[0, 0])[:, 0].mean() - 128) < 3
    assert (made.pixels[cut[0, 0]] == 0).all()
    share = cut.mean() if fit != "fit" else cut[0, 0, 43:213].mean()
    assert share == pytest.approx((100 * 150) / (300 * (451 if fit != "crop" else 300)), rel=0.03)


def test_a_transparent_picture_is_seen_over_white(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "hint.png")
    made = hint(tmp_path / "hint.png", (64, 64))
    assert (made.pixels[:32] == 0).all()
    assert (made.pixels[32:] == 255).all()
    assert "transparent" in made.notices[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cany", "did you mean canny"),
        ("zzz", "expected one of none, canny"),
        ("canny,low", r'got "low", expected SETTING=VALUE'),
        ("canny,low=3000", "low is 3000, expected a number from 0 to 2040"),
        ("canny,low=nan", "low is nan, expected a number"),
        ("canny,low=much", "low is much, expected a number"),
        ("canny,hue=3", 'preprocessor "canny" has no setting hue; it has low, high'),
        ("invert,low=3", 'preprocessor "invert" has no setting low; it has none'),
        ("shuffle,seed=1.5", "seed is 1.5, expected a whole number from 0 to 4294967295"),
        ("grid,cell=0", "cell is 0, expected a whole number from 1 to 1024"),
        ("depth", "needs a network; give one as depth=FILE"),
        ("depth=d.onnx,near=left", "near is left, expected high or low"),
        ("canny=d.onnx", r"needs no network, got d\.onnx"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(RequestError, match=message):
        Preprocess.read(words)


def test_bad_values_are_refused(photograph):
    with pytest.raises(RequestError, match='fit is "cover"'):
        Preprocess(fit="cover")
    with pytest.raises(RequestError, match="resolution is 0, expected 64 to 8192"):
        Preprocess(name="canny", resolution=0)
    with pytest.raises(RequestError, match="size 100x64: expected multiples of 8"):
        hint(photograph, (100, 64))
    with pytest.raises(RequestError, match="needs a mask"):
        hint(photograph, (64, 64), Preprocess(name="inpaint"))
    with pytest.raises(RequestError, match="takes no mask"):
        hint(photograph, (64, 64), Preprocess(name="canny"), mask=photograph[..., 0])
    with pytest.raises(RequestError, match="is 10x10, expected the picture's 451x300"):
        hint(photograph, (64, 64), Preprocess(name="inpaint"), mask=np.zeros((10, 10), np.uint8))


def test_defaults_are_within_their_own_ranges():
    for name, kind in KINDS.items():
        assert set(kind.checked(name, {})) == {setting.name for setting in kind.settings}
        for setting in kind.settings:
            if isinstance(setting, Choice):
                assert setting.default in setting.words


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3)])
def test_odd_pictures(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for name, kind in KINDS.items():
        if kind.needs == "nothing":
            assert hint(pixels, (64, 64), Preprocess(name=name, resolution=64)).values.shape == (1, 3, 64, 64)
