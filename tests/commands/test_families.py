"""Refiners, settings of a model's own, and folders that others converted, from the command line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from glassine.errors import RequestError
from glassine.manifest import Manifest
from glassine.runtime.metadata import parse_parameters, read_record
from glassine.runtime.request import Request


@pytest.fixture(scope="module")
def bundle(tiny_folder, tmp_path_factory):
    """The same packages as a Swift bundle has them."""
    folder = tmp_path_factory.mktemp("foreign") / "bundle"
    return shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("glassine.json", "*.weights.json"))


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_folder_that_others_converted_draws_the_same(glassine, tiny_folder, bundle, tmp_path):
    for model, name in ((tiny_folder, "ours.png"), (bundle, "theirs.png")):
        result = glassine("generate", model, "a cat", "--seed", 3, "--steps", 2, "-o", name)
        assert result.exit_code == 0, result.stderr
    assert np.array_equal(pixels(tmp_path / "ours.png"), pixels(tmp_path / "theirs.png"))
    assert read_record(tmp_path / "theirs.png").model == {"name": "bundle"}


def test_inspect_says_what_it_was_taken_for(glassine, bundle):
    result = glassine("inspect", bundle, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["model"]["family"] == "sd15"
    assert said["model"]["latent_scale"] == 0.18215
    assert "packages do not say" in said["model"]["decided"]["latent_scale"]
    assert set(said["parts"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


def test_a_refiner_is_written_down_and_missed(glassine, tiny_folder, tmp_path):
    drawing = ("generate", tiny_folder, "a cat", "--seed", 3, "--steps", 2)
    result = glassine(*drawing, "--refiner", tiny_folder, "--refine-at", 0.5, "-o", "refined.png")
    assert result.exit_code == 0, result.stderr
    record = read_record(tmp_path / "refined.png")
    assert record.model["refiner"] == Manifest.read(tiny_folder).name
    assert record.request["refine_at"] == 0.5
    with Image.open(tmp_path / "refined.png") as picture:
        text = picture.info["parameters"]
    assert f"Refiner: {record.model['refiner']}, Refiner switch at: 0.5" in text
    assert parse_parameters(text).request["refine_at"] == 0.5
    assert parse_parameters(text).model["refiner"] == record.model["refiner"]
    again = glassine("generate", tiny_folder, "--from", "refined.png", "--size", "8x8")  # refused, but after the note
    assert f"the last steps were drawn by {record.model['refiner']}; give it with --refiner" in again.stderr


def test_the_models_own_settings_hold_unless_said_otherwise(glassine, tiny_folder, tmp_path):
    turbo = tmp_path / "turbo"
    shutil.copytree(tiny_folder, turbo)
    raw = json.loads((turbo / "glassine.json").read_text())
    raw["defaults"] = {"steps": 1, "guidance_scale": 1.0, "sampler": "euler_a", "spacing": "trailing"}
    (turbo / "glassine.json").write_text(json.dumps(raw))
    result = glassine("generate", turbo, "a cat", "--spacing", "karras", "--seed", 3, "-o", "own.png")
    assert result.exit_code == 0, result.stderr
    request = read_record(tmp_path / "own.png").request
    assert {name: request[name] for name in raw["defaults"]} == raw["defaults"] | {"spacing": "karras"}


def test_sizes_survive_the_picture(glassine, tiny_folder, tmp_path):
    options = ("--original-size", "640x480", "--crop", "8,16", "--image-cfg", 2, "--steps", 1, "--seed", 3)
    result = glassine("generate", tiny_folder, "a cat", *options, "-o", "first.png")
    assert result.exit_code == 0, result.stderr
    request = Request.from_dict(read_record(tmp_path / "first.png").request)
    assert (request.original_size, request.crop, request.image_guidance) == ((640, 480), (8, 16), 2.0)
    with pytest.raises(RequestError, match="crop is"):
        Request(crop=(-8, 0))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--crop", "8"), 2, "'8' is not LEFT,TOP"),
        (("--original-size", "big"), 2, "'big' is not a size"),
        (("--refine-at", "1.5"), 1, "refine_at is 1.5, expected 0 to 1"),
        (("--refiner", "nowhere"), 1, "nowhere: no glassine.json here"),
    ],
)
def test_bad_settings(glassine, tiny_folder, options, code, message):
    result = glassine("generate", tiny_folder, "a cat", *options)
    assert result.exit_code == code
    assert message in result.stderr


def test_a_refiner_of_another_family_is_refused(glassine, tiny_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    raw = json.loads((other / "glassine.json").read_text())
    (other / "glassine.json").write_text(json.dumps({**raw, "latent_scale": 0.13025}))
    result = glassine("generate", tiny_folder, "a cat", "--refiner", other)
    assert result.exit_code == 1
    assert "latents are scaled by 0.13025" in result.stderr
