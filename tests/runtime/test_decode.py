"""Latents into pictures; protected bytes; previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from glassine.errors import EngineError
from glassine.runtime.decode import (
    CELL,
    SD1_PREVIEW,
    composite,
    decode_latents,
    decoded_share,
    measure_preview,
    preview,
)
from glassine.runtime.image import read_picture, save_png

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
LIVE = st.integers(0, 2**32).flatmap(
    lambda seed: st.sampled_from([0.02, 0.1, 0.5, 0.9]).map(
        lambda share: np.random.default_rng(seed).random((7, 9)) < share
    )
)


def test_decoding_rounds_as_diffusers() -> None:
    import torch

    image = RNG.uniform(-1.2, 1.2, (1, 3, 16, 24)).astype(np.float32)
    latents = RNG.standard_normal((1, 4, 2, 3)).astype(np.float32)

    def predict(*, z: Array) -> dict[str, Array]:
        np.testing.assert_array_equal(z, latents / np.float32(0.18215))
        return {"image": image}

    (expected,) = VaeImageProcessor().postprocess(torch.from_numpy(image), output_type="pil")
    assert np.array_equal(decode_latents(predict, latents, latent_scale=0.18215), np.asarray(expected))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, 'output "image" is nothing'),
        ({"image": np.zeros((1, 4, 8, 8))}, r'output "image" is \(1, 4, 8, 8\), expected \(1, 3, H, W\)'),
        ({"image": np.full((1, 3, 8, 8), np.inf)}, "overflows in fp16"),
    ],
)
def test_decoders_that_answer_something_else(outputs: dict[str, Array], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        decode_latents(lambda z: outputs, np.zeros((1, 4, 1, 1), np.float32), latent_scale=1.0)


def upscaled(cells: Array) -> Array:
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)


@given(live=LIVE, guard=st.integers(0, 2), feather=st.sampled_from([0, 2, 8, 16]))
@settings(max_examples=80, deadline=None)
def test_the_share_is_what_scipy_makes_of_its_definition(live: Array, guard: int, feather: int) -> None:
    square = np.ones((2 * guard + 1,) * 2)
    region = upscaled(ndimage.maximum_filter(live.astype(np.uint8), footprint=square, mode="nearest"))
    width = feather + 1
    shrunk = ndimage.minimum_filter(region, size=width, mode="nearest")
    expected = ndimage.uniform_filter(shrunk.astype(np.float64), size=width, mode="nearest")
    share = decoded_share(live, guard=guard, feather=feather)
    np.testing.assert_allclose(share, expected, atol=1e-6)  # measured 6e-8
    assert (share[region == 0] == 0).all()
    if feather <= CELL * guard:
        assert (share[upscaled(live)] == 1).all()


@given(live=LIVE)
@settings(max_examples=30, deadline=None)
def test_protected_bytes_are_the_sources_and_live_cells_the_decoders(live: Array) -> None:
    source, decoded = (RNG.integers(0, 256, (56, 72, 3), dtype=np.uint8) for _ in range(2))
    out = composite(decoded, source, live)
    protected = upscaled(~ndimage.binary_dilation(live, np.ones((3, 3))))
    assert np.array_equal(out[protected], source[protected])
    assert np.array_equal(out[upscaled(live)], decoded[upscaled(live)])
    low, high = np.minimum(source, decoded), np.maximum(source, decoded)
    assert ((out >= low) & (out <= high)).all()


def test_the_fade_is_a_straight_ramp() -> None:
    live = np.zeros((9, 9), bool)
    live[:, 5:] = True
    share = decoded_share(live)[36]
    np.testing.assert_allclose(share[30:43], [0, 0, *(np.arange(1, 9) / 9), 1, 1, 1], rtol=1e-6)  # measured 6e-8


def test_all_or_nothing() -> None:
    source, decoded = (RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(2))
    assert np.array_equal(composite(decoded, source, np.zeros((2, 2), int)), source)
    assert np.array_equal(composite(decoded, source, np.full((2, 2), 20)), decoded)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "CMYK"]


@pytest.mark.parametrize("mode", MODES)
def test_protected_pixels_of_a_file_of_every_mode_come_out_as_they_were_read(tmp_path: Path, mode: str) -> None:
    rgba = RNG.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(RNG.integers(0, 65536, (64, 64), dtype=np.uint16))
    elif mode in {"P", "PA"}:
        image = Image.fromarray(rgba[..., :3]).quantize(64)
        if mode == "PA":
            image.info["transparency"] = bytes(range(64))
    else:
        image = Image.fromarray(rgba if mode in {"LA", "RGBA"} else rgba[..., :3]).convert(mode)
    path = tmp_path / ("source.tiff" if mode == "CMYK" else "source.png")
    image.save(path)
    source = read_picture(path).pixels
    live = np.zeros((8, 8), int)
    live[3:5, 4] = 7
    save_png(tmp_path / "out.png", composite(255 - source, source, live))
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    touched = np.zeros((64, 64), bool)
    touched[16:48, 24:48] = True  # the live cells and the ring around them
    assert np.array_equal(drawn[~touched], source[~touched])
    assert np.array_equal(drawn[24:40, 32:40], 255 - source[24:40, 32:40])
    if mode in {"RGB", "L", "1"}:  # and as another program reads them
        assert np.array_equal(drawn[~touched], np.asarray(Image.open(path).convert("RGB"))[~touched])


def linear_decoder(matrix: Array, scale: float) -> Any:
    def predict(*, z: Array) -> dict[str, Array]:
        image = np.einsum("chw,cr->rhw", z[0] * scale, matrix[:-1]) + matrix[-1][:, None, None]
        return {"image": image[None].repeat(CELL, axis=2).repeat(CELL, axis=3)}

    return predict


@pytest.mark.parametrize(("height", "width"), [(16, 24), (6, 9)])
def test_the_measured_matrix_is_that_of_a_linear_decoder(height: int, width: int) -> None:
    matrix = RNG.uniform(-0.2, 0.2, (5, 3))
    found = measure_preview(linear_decoder(matrix, 0.3), height=height, width=width, latent_scale=0.3)
    np.testing.assert_allclose(found, matrix, atol=6e-3)  # measured 3.5e-3: the decoder's bytes are rounded


def test_a_preview_is_the_matrix_in_colours() -> None:
    latents = np.zeros((1, 4, 6, 5), np.float32)
    latents[:, :, :3] = np.array([1.0, 0.5, -0.5, -1.0], np.float32)[:, None, None]
    out = preview(latents)
    assert out.shape == (48, 40, 3)
    expected = (np.array([1, 0.5, -0.5, -1]) @ SD1_PREVIEW[:4].astype(np.float64) + 1) * 127.5
    assert np.abs(out[:16] - expected).max() <= 0.5
    assert (out[-16:] == 128).all()  # zero latents are mid grey


def test_a_preview_of_broken_latents_is_still_a_picture() -> None:
    latents = np.full((1, 4, 4, 4), np.nan, np.float32)
    latents[0, 0, 0, 0] = np.inf
    assert preview(latents).shape == (32, 32, 3)
