"""Padded colours, transparent latents, the ensemble, the health figure: against goldens, OpenCV, torch and formulas."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from glassine.errors import EngineError, RequestError
from glassine.runtime.image import over_grey
from glassine.runtime.transparency import (
    AlphaDecoder,
    Health,
    check_decoder_size,
    decode_rgba,
    decoder_size,
    encode_rgba,
    health,
    pad_rgb,
    to_bytes,
)

RNG = np.random.default_rng(5)


def rgba_pictures(largest: int = 40):
    sides = st.integers(1, largest)
    return st.tuples(sides, sides).flatmap(lambda side: arrays(np.uint8, (*side, 4)))


@pytest.mark.parametrize("name", ["pad_in", "pad_in_soft"])
def test_padded_colours_are_the_official_ones(layerdiffuse, name):
    golden = layerdiffuse.golden()
    expected = golden[f"pad/{name.replace('in', 'out')}"]
    assert np.abs(pad_rgb(golden[f"pad/{name}"]) - expected).max() < 1e-5  # measured 2.4e-7


def padded_by_opencv(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.float32) / 255
    colours, levels = rgba[..., :3].astype(np.float32) / 255 * alpha, []
    while True:
        levels.append((colours, alpha))
        height, width = colours.shape[:2]
        if min(height, width) == 1:
            break
        size = (int(width / 1.2), int(height / 1.2))
        colours = cv2.resize(colours, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], 3)
        alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], 1)
    filled = (colours.sum((0, 1)) / max(alpha.sum(), 1e-8))[None, None].astype(np.float32)
    for colours, alpha in reversed(levels):
        size = colours.shape[1::-1]
        filled = cv2.resize(filled, size, interpolation=cv2.INTER_LINEAR).reshape(colours.shape)
        filled = colours + filled * (1 - alpha)
    return filled


@settings(max_examples=30, deadline=None)
@given(rgba_pictures())
def test_padded_colours_of_any_size(rgba):
    assert np.abs(pad_rgb(rgba) - padded_by_opencv(rgba)).max() < 1e-4  # measured 3e-6; OpenCV counts in float32


def test_what_padding_promises():
    rgba = RNG.integers(0, 256, (30, 21, 4), np.uint8)
    rgba[..., 3] = np.where(RNG.random((30, 21)) < 0.5, 0, rgba[..., 3])
    rgba[5:9, 5:9, 3] = 255
    padded = pad_rgb(rgba)
    opaque = rgba[..., 3] == 255
    assert np.abs(padded[opaque] - rgba[opaque][:, :3] / 255).max() < 1e-6
    junk = rgba.copy()
    junk[rgba[..., 3] == 0, :3] = 77
    assert np.array_equal(pad_rgb(junk), padded)
    assert not pad_rgb(np.dstack([rgba[..., :3], np.zeros((30, 21), np.uint8)])).any()


def test_grey_shows_through_what_is_transparent():
    rgba = RNG.integers(0, 256, (4, 6, 4), np.uint8)
    colours, alpha = rgba[..., :3] / 255, rgba[..., 3:] / 255
    expected = 2 * (0.5 + (colours - 0.5) * alpha) - 1
    assert np.abs(np.moveaxis(over_grey(rgba)[0], 0, -1) - expected).max() < 1e-6


def encoders(rgba, seen):
    """A VAE encoder and an offset encoder without a network, which remember what they saw."""
    height, width = rgba.shape[0] // 8, rgba.shape[1] // 8
    mean, logvar, offset = (
        RNG.normal(0, 8 if i == 1 else 1, (1, 4, height, width)).astype(np.float32) for i in range(3)
    )
    logvar[0, 0, 0, 0] = 50.0  # beyond what LDM lets through

    def vae(x):
        seen["x"] = x
        return {"latent": np.concatenate([mean, logvar], axis=1)}

    def offsets(argb):
        seen["argb"] = argb
        return {"offset": offset}

    return vae, offsets, (mean, logvar, offset)


@pytest.mark.parametrize("k", [1.0, 300.0])
def test_transparent_latents(k):
    rgba = RNG.integers(0, 256, (64, 128, 4), np.uint8)
    seen = {}
    vae, offsets, (mean, logvar, offset) = encoders(rgba, seen)
    z = encode_rgba(vae, offsets, rgba, latent_scale=0.13025, offset_scale=k)
    expected = 0.13025 * (mean + np.exp(0.5 * np.clip(logvar.astype(np.float64), -30, 20)) * k * offset)
    assert np.allclose(z, expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(seen["x"], over_grey(rgba))
    assert np.array_equal(seen["argb"][0, 0], rgba[..., 3].astype(np.float32) / 255)  # alpha first
    assert np.array_equal(np.moveaxis(seen["argb"][0, 1:], 0, -1), pad_rgb(rgba))


def test_what_cannot_be_encoded_is_said():
    rgba = RNG.integers(0, 256, (64, 64, 4), np.uint8)
    vae, offsets, _ = encoders(rgba, {})
    clear = np.dstack([rgba[..., :3], np.zeros((64, 64), np.uint8)])
    with pytest.raises(RequestError, match="fully transparent"):
        encode_rgba(vae, offsets, clear, latent_scale=1.0)
    with pytest.raises(EngineError, match=r'"offset" is nothing, expected \(1, 4, 8, 8\)'):
        encode_rgba(vae, lambda argb: {}, rgba, latent_scale=1.0)
    with pytest.raises(EngineError, match="NaN"):
        encode_rgba(vae, lambda argb: {"offset": np.full((1, 4, 8, 8), np.nan)}, rgba, latent_scale=1.0)


@pytest.fixture(scope="module")
def network():
    """A decoder that knows left from right and top from bottom: predict(pixel, latent), as torch and as NumPy."""
    generator = torch.Generator().manual_seed(1)
    pixels, latents = (torch.randn(4, channels, 5, 5, generator=generator) * 0.4 for channels in (3, 4))

    def forward(pixel, latent):
        wide = latent.repeat_interleave(8, 2).repeat_interleave(8, 3)
        conv = torch.nn.functional.conv2d
        return conv(pixel, pixels, padding=2) + conv(wide, latents, padding=2) * 0.3 + 0.5

    def predict(pixel, latent):
        assert pixel.flags.c_contiguous
        assert latent.flags.c_contiguous
        return {"argb": forward(torch.from_numpy(pixel), torch.from_numpy(latent)).numpy()}

    return forward, predict


def picture(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    pixel = RNG.random((1, 3, height, width), np.float32)
    return pixel, RNG.normal(0, 1, (1, 4, height // 8, width // 8)).astype(np.float32)


def views(forward, pixel, latent, turns):
    """LayerDiffuse's views in torch's own words: flip, turn, run, clip, turn back, flip back."""
    for flip in (False, True):
        for k in turns:
            seen = [torch.from_numpy(array) for array in (pixel, latent)]
            seen = [torch.rot90(torch.flip(x, (3,)) if flip else x, k, (2, 3)) for x in seen]
            out = torch.rot90(forward(*seen).clip(0, 1), -k, (2, 3))
            yield torch.flip(out, (3,)) if flip else out


def test_eight_passes_take_the_lower_median(network):
    forward, predict = network
    pixel, latent = picture(64, 64)
    stack = torch.stack(list(views(forward, pixel, latent, range(4))))
    argb = AlphaDecoder(predict, (64, 64))(pixel, latent, 8)
    assert np.abs(argb - stack.median(dim=0).values[0].numpy()).max() < 1e-5  # measured 6e-7
    assert np.abs(argb - np.median(stack.numpy(), axis=0)[0]).max() > 0.05  # measured 0.32


def test_eight_passes_of_a_wide_picture(network):
    """With a package for the turned size all eight; without, the four that keep the shape, and their mean."""
    forward, predict = network
    pixel, latent = picture(64, 128)
    whole = torch.stack(list(views(forward, pixel, latent, range(4)))).median(dim=0).values[0].numpy()
    shaped = torch.stack(list(views(forward, pixel, latent, (0, 2)))).mean(dim=0)[0].numpy()
    assert np.abs(AlphaDecoder(predict, (128, 64), turned=predict)(pixel, latent, 8) - whole).max() < 1e-5
    assert np.abs(AlphaDecoder(predict, (128, 64))(pixel, latent, 8) - shaped).max() < 1e-5
    assert np.abs(whole - shaped).max() > 0.05


@settings(max_examples=10, deadline=None)
@given(st.booleans(), st.integers(0, 3))
def test_the_ensemble_turns_with_its_picture(network, flip, k):
    _, predict = network
    decoder = AlphaDecoder(predict, (64, 64))
    pixel, latent = picture(64, 64)

    def moved(array):
        return np.ascontiguousarray(np.rot90(array[..., ::-1] if flip else array, k, axes=(-2, -1)))

    assert np.abs(decoder(moved(pixel), moved(latent), 8) - moved(decoder(pixel, latent, 8))).max() < 1e-5
    if flip or k:
        assert np.abs(decoder(moved(pixel), moved(latent), 1) - moved(decoder(pixel, latent, 1))).max() > 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_odd_sizes_are_padded_with_grey_and_cropped_back(rows, columns):
    """The network sees its own size; what it answers for the picture's place is what comes back."""
    width, height = decoder_size(columns * 8, rows * 8)
    assert width % 64 == height % 64 == 0
    assert 0 <= width - columns * 8 < 64
    assert 0 <= height - rows * 8 < 64
    pixel, latent = picture(rows * 8, columns * 8)
    answer = RNG.random((1, 4, height, width), np.float32)
    grey = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    seen = {}

    def predict(**arrays):
        seen.update(arrays)
        return {"argb": answer}

    argb = AlphaDecoder(predict, (width, height), grey_latent=grey)(pixel, latent, 1)
    assert np.array_equal(argb, answer[0, :, : rows * 8, : columns * 8])
    assert np.array_equal(seen["pixel"][:, :, : rows * 8, : columns * 8], pixel)
    assert np.array_equal(seen["latent"][:, :, :rows, :columns], latent)
    outside = np.ones((height, width), bool)
    outside[: rows * 8, : columns * 8] = False
    assert (seen["pixel"][..., outside] == 0.5).all()
    assert (seen["latent"][0][:, outside[::8, ::8]] == grey[:, None]).all()


def test_sizes_that_are_refused():
    check_decoder_size(512, 576)
    with pytest.raises(RequestError, match="960x960 and 1024x1024"):
        check_decoder_size(1000, 1000)
    pixel, latent = picture(128, 64)
    with pytest.raises(EngineError, match="its package is 64x64 pixels, the picture 64x128"):
        AlphaDecoder(lambda **_: {}, (64, 64))(pixel, latent)


def test_answers_that_are_no_pictures(network):
    pixel, latent = picture(64, 64)
    with pytest.raises(RequestError, match="passes is 3"):
        AlphaDecoder(network[1], (64, 64))(pixel, latent, 3)
    for answer, words in (({}, "nothing"), ({"argb": np.zeros((1, 3, 64, 64))}, "(1, 3, 64, 64)")):
        with pytest.raises(EngineError) as caught:
            AlphaDecoder(lambda answer=answer, **_: answer, (64, 64))(pixel, latent)
        assert words in str(caught.value)
    with pytest.raises(EngineError, match="NaN"):
        AlphaDecoder(lambda **_: {"argb": np.full((1, 4, 64, 64), np.inf)}, (64, 64))(pixel, latent)


def test_bytes_are_truncated():
    values = np.array([0.0, 0.5, 0.999, 1.0, 1.2, -0.1, 254.999 / 255], np.float32)
    assert to_bytes(values).tolist() == [0, 127, 254, 255, 255, 0, 254]


def test_decoding_reads_unscaled_latents_and_a_picture_from_0_to_1():
    pixel = RNG.normal(0, 1.2, (1, 3, 64, 64)).astype(np.float32)
    latents = RNG.normal(0, 1, (1, 4, 8, 8)).astype(np.float32)
    argb = RNG.random((1, 4, 64, 64), np.float32)
    seen = {}

    def decoder(z):
        seen["z"] = z
        return {"image": pixel}

    def alpha(**arrays):
        seen.update(arrays)
        return {"argb": argb}

    decoded = decode_rgba(decoder, AlphaDecoder(alpha, (64, 64)), latents, latent_scale=0.18215)
    assert np.array_equal(seen["latent"], latents / np.float32(0.18215))
    assert np.array_equal(seen["z"], seen["latent"])
    assert np.array_equal(seen["pixel"], np.clip(pixel / 2 + 0.5, 0, 1))
    assert np.array_equal(decoded.rgba, np.moveaxis(np.floor(argb[0][[1, 2, 3, 0]] * 255), 0, -1))
    assert np.array_equal(decoded.grey, np.moveaxis(np.floor(np.clip(pixel[0] / 2 + 0.5, 0, 1) * 255), 0, -1))


def drawn(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(4, 64, 64) with this alpha, and what a VAE would draw of it over grey."""
    argb = np.concatenate([alpha[None], RNG.random((3, 64, 64))]).astype(np.float32)
    return argb, 0.5 + (argb[1:] - 0.5) * argb[:1]


def test_the_health_of_a_good_picture():
    alpha = np.zeros((64, 64))
    alpha[16:48, 16:48] = 1
    argb, pixel = drawn(alpha)
    assert health(argb, pixel) == Health(mismatch=0.0, opaque=0.25, clear=0.75)
    assert health(argb, pixel).notices == ()
    assert health(argb, np.full_like(pixel, 0.5)).mismatch > 1  # nothing of it was drawn


@pytest.mark.parametrize(
    ("alpha", "pixel", "words"),
    [(np.ones((64, 64)), None, "no pixel is transparent"), (np.zeros((64, 64)), None, "every pixel is transparent"),
     (np.full((64, 64), 0.5), 0.1, "another family")],
)  # fmt: skip
def test_what_is_wrong_is_said(alpha, pixel, words):
    argb, composite = drawn(alpha)
    notices = health(argb, composite if pixel is None else np.full_like(composite, pixel)).notices
    assert len(notices) == 1
    assert words in notices[0]
