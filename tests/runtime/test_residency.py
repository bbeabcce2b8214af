"""With little memory only one stage's engines are loaded at a time, and the pictures stay the same."""

import numpy as np
import pytest

from glassine.manifest import WEIGHT_FILE, Manifest
from glassine.runtime import pipeline
from glassine.runtime.engine import EngineOptions
from glassine.runtime.inputs import MapSource, read_inputs
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.plan import stage_of
from glassine.runtime.request import Request


@pytest.fixture
def opened(monkeypatch):
    """The packages that are open: a list after every opening."""
    now, history = [], []
    real = pipeline.open_engine

    def watched(path, options):
        engine = real(path, options)
        close = engine.close
        now.append(path.stem)
        history.append(list(now))

        def closing():
            now.remove(path.stem)
            close()

        engine.close = closing
        return engine

    monkeypatch.setattr(pipeline, "open_engine", watched)
    return history


def draw(folder, *, low_memory, refiner=None):
    options = EngineOptions(engine="portable", low_memory=low_memory)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with Pipeline.load(folder, options, refiner=refiner) as pipe:
        inputs = read_inputs(picture, MapSource(map="gradient:left-right"), *pipe.size)
        results = [
            pipe.run(Request(prompt=prompt, steps=3, seed=7, strength=1.0), inputs).finish()
            for prompt in ("a boat", "a house")
        ]
        return results, pipe.residents.peak, pipe.residents.used


def test_one_stage_at_a_time_draws_the_same(tiny_folder, opened):
    plain, all_at_once, used = draw(tiny_folder, low_memory=False)
    assert opened[-1] == ["VAEEncoder", "TextEncoder", "Unet", "VAEDecoder"]
    opened.clear()
    low, at_most, used_low = draw(tiny_folder, low_memory=True)
    second = [["TextEncoder"], ["Unet"], ["VAEDecoder"]]  # the picture's latents are remembered
    assert opened == [["VAEEncoder"], *second, *second]
    for ours, theirs in zip(low, plain, strict=True):
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    sizes = {part.file: (tiny_folder / part.file / WEIGHT_FILE).stat().st_size
             for part in Manifest.read(tiny_folder).parts.values()}  # fmt: skip
    assert all_at_once == used == used_low == sum(sizes.values())
    assert at_most == max(sizes.values())


def test_a_refiner_takes_the_place_of_the_base(tiny_folder, opened):
    draw(tiny_folder, low_memory=True, refiner=tiny_folder)
    # Text encoders of both, then one UNet and the other: never both.
    first = [["VAEEncoder"], ["TextEncoder"], ["TextEncoder"] * 2, ["Unet"], ["Unet"], ["VAEDecoder"]]
    assert opened[:6] == first


def test_packages_that_share_a_file_count_once(tiny_folder):
    options = EngineOptions(engine="portable")
    with Pipeline.load(tiny_folder, options) as pipe:
        pipe.engine("unet")
        weights = (tiny_folder / "Unet.mlpackage" / WEIGHT_FILE).stat().st_size
        assert pipe.residents.peak == weights
        pipe.package(tiny_folder / "Unet.mlpackage")
        assert pipe.residents.peak == weights


@pytest.mark.parametrize(
    ("role", "stage"),
    [
        ("text_encoder_2", "text"),
        ("vae_encoder", "encode"),
        ("transparent_decoder_turned", "decode"),
        ("controlled_unet", "denoise"),
        ("control:canny", "denoise"),
        ("preview_decoder", "denoise"),
        ("fg2bg_control", "denoise"),
    ],
)
def test_stages(role, stage):
    assert stage_of(role) == stage
