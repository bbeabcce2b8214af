"""generate, map and fan on a small random model: what they write, what they say, what they refuse."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from glassine.errors import RequestError
from glassine.manifest import WEIGHT_FILE, Manifest
from glassine.runtime import machine
from glassine.runtime.pipeline import Pipeline

FAST = ("--steps", 2, "--sampler", "euler")
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_generate_writes_a_picture_and_prints_its_path(glassine, tiny_folder, tmp_path):
    result = glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 1, "-o", "cat.png")
    assert (result.exit_code, result.stdout) == (0, "cat.png\n")
    assert pixels(tmp_path / "cat.png").shape == (64, 64, 3)


def test_a_seed_that_was_not_given_is_told(glassine, tiny_folder, tmp_path):
    result = glassine("generate", tiny_folder, "a cat", "--steps", 1)
    seed = int(result.stderr.split("seed ")[1].split()[0])
    assert (tmp_path / f"glassine-{seed}.png").is_file()


def test_count_draws_the_next_seeds(glassine, tiny_folder, tmp_path):
    result = glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 7, "--count", 2, "-o", "cat.png")
    assert result.stdout.split() == ["cat-7.png", "cat-8.png"]
    glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 8, "-o", "alone.png")
    assert np.array_equal(pixels(tmp_path / "cat-8.png"), pixels(tmp_path / "alone.png"))
    assert not np.array_equal(pixels(tmp_path / "cat-7.png"), pixels(tmp_path / "cat-8.png"))


def test_json_holds_path_seed_evaluations_and_notices(glassine, tiny_folder):
    prompt = ", ".join(["a cat"] * 60)
    result = glassine("generate", tiny_folder, prompt, *FAST, "--seed", 1, "-o", "cat.png", "--json")
    report = json.loads(result.stdout)
    assert (report["path"], report["seed"], report["evaluations"]) == ("cat.png", 1, 2)
    assert any(notice.startswith("cut:") for notice in report["notices"])


def test_low_memory_says_what_it_saves(glassine, tiny_folder, tmp_path):
    result = glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 1, "-o", "low.png", "--low-memory")
    sizes = [(tiny_folder / f"{name}.mlpackage" / WEIGHT_FILE).stat().st_size / 1e6
             for name in ("TextEncoder", "Unet", "VAEDecoder")]  # fmt: skip
    words = f"at most {max(sizes):.1f} MB at a time, {sum(sizes):.1f} MB without --low-memory"
    assert f"weights in memory: {words}" in result.stderr
    assert "weights" not in glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 1, "-o", "cat.png").stderr
    assert np.array_equal(pixels(tmp_path / "low.png"), pixels(tmp_path / "cat.png"))


def refuse(*_):
    raise RequestError("as far as this test goes")


@pytest.mark.parametrize(
    ("free", "low_memory", "said"),
    [
        (1.0, [], None),
        (0.9, [], "this may swap; --low-memory takes "),
        (0.9, ["--low-memory"], None),
        (0.1, [], "this will swap; close programs, or convert with --palette"),
        (0.1, ["--low-memory"], "this will swap"),
    ],
)
def test_too_little_memory_is_said_before_drawing(glassine, tiny_folder, monkeypatch, free, low_memory, said):
    numbers = [
        4 * Manifest.read(tiny_folder).parts[role].parameters for role in ("text_encoder", "unet", "vae_decoder")
    ]
    monkeypatch.setattr(machine, "available_memory", lambda: int(free * sum(numbers)))
    monkeypatch.setattr(Pipeline, "run", refuse)
    result = glassine("generate", tiny_folder, "a cat", "--seed", "1", *low_memory)
    assert result.exit_code == 1
    assert ("of memory are free" in result.stderr) == (said is not None)
    assert said is None or said in result.stderr


def test_protected_pixels_come_back_byte_for_byte(glassine, tiny_folder, photo, tmp_path):
    change = "box:50%,0,50%,100%"
    result = glassine("generate", tiny_folder, "a cat", "--image", photo, "--map", change, *FAST, "-o", "out.png")
    assert result.exit_code == 0
    drawn, source = pixels(tmp_path / "out.png"), pixels(photo)
    # Cells 4..7 may change; cell 3 is their guard ring, in which the decoded picture fades in.
    assert np.array_equal(drawn[:, :24], source[:, :24])
    assert np.abs(drawn[:, 32:].astype(int) - source[:, 32:]).mean() > 10


def test_nothing_to_change_costs_nothing_and_returns_the_source(glassine, tiny_folder, photo, tmp_path):
    result = glassine(
        "generate", tiny_folder, "a cat", "--image", photo, "--map", "flat:0", *FAST, "-o", "out.png", "--json"
    )
    assert json.loads(result.stdout)["evaluations"] == 0
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(photo))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--image", "photo.png", "--strength", 0.5),
        ("--image", "photo.png", "--map", "gradient:top-bottom", "--sampler", "euler_a", "--rule", "time"),
        ("--image", "photo.png", "--mask", "mask.png", "--softness", 8, "--map-white", "keep"),
    ],
)
def test_from_draws_the_same_picture_byte_for_byte(glassine, tiny_folder, photo, tmp_path, options):
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = ("generate", tiny_folder, "a (red:1.2) cat", *FAST, "--negative", "dog", "--seed", 3)
    first = glassine(*command, *options, "-o", "first.png")
    assert first.exit_code == 0, first.stderr
    second = glassine("generate", tiny_folder, "--from", "first.png", "-o", "second.png")
    assert second.exit_code == 0, second.stderr
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_from_with_an_option_changes_only_that(glassine, tiny_folder, tmp_path):
    glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 3, "-o", "first.png")
    glassine("generate", tiny_folder, "--from", "first.png", "--seed", 4, "-o", "other.png")
    glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 4, "-o", "direct.png")
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "direct.png").read_bytes()


def test_from_refuses_a_source_that_has_changed(glassine, tiny_folder, photo, tmp_path):
    glassine("generate", tiny_folder, "a cat", "--image", photo, *FAST, "--seed", 3, "-o", "first.png")
    Image.fromarray(pixels(photo)[::-1]).save(photo)
    result = glassine("generate", tiny_folder, "--from", "first.png", "-o", "second.png")
    assert result.exit_code == 1
    assert "photo.png: changed since the picture was drawn from it; give the image with --image" in result.stderr
    assert not (tmp_path / "second.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "7"}, "setting 'seed' is '7', expected int"),
        ({"seed": None}, "setting 'seed' is None, expected int"),
        ({"magic": 1}, "unknown settings ['magic']"),
    ],
)
def test_from_refuses_settings_that_make_no_sense(glassine, tiny_folder, tmp_path, change, message):
    glassine("generate", tiny_folder, "a cat", *FAST, "--seed", 3, "-o", "first.png")
    with Image.open(tmp_path / "first.png") as image:
        record = json.loads(image.info["glassine"])
        record["request"] |= change
        info = PngInfo()
        info.add_text("glassine", json.dumps(record))
        image.save(tmp_path / "forged.png", pnginfo=info)
    result = glassine("generate", tiny_folder, "--from", "forged.png", "-o", "second.png")
    assert result.exit_code == 1
    assert message in result.stderr


def test_preview_leaves_the_last_steps_picture(glassine, tiny_folder, tmp_path):
    glassine("generate", tiny_folder, "a cat", *FAST, "--preview", "now.png", "-o", "cat.png")
    assert pixels(tmp_path / "now.png").shape == (64, 64, 3)


def test_map_shows_the_plan_without_a_model(glassine, photo, tmp_path):
    result = glassine(
        "map", "--image", photo, "--map", "gradient:left-right", "--steps", 10, "-o", "plan.png", "--json"
    )
    assert json.loads(result.stdout) == {"path": "plan.png", "evaluations": 10}
    assert pixels(tmp_path / "plan.png").std() > 20


def test_exact_fan_is_cut_from_runs_at_each_strength(glassine, tiny_folder, photo, tmp_path):
    command = ("fan", tiny_folder, "a cat", "--image", photo, "--columns", 2, *FAST, "--seed", 1)
    result = glassine(*command, "--exact", "-o", "fan.png", "--json")
    assert json.loads(result.stdout)["strengths"] == [0.0, 1.0]
    sheet = pixels(tmp_path / "fan.png")[:64]
    assert np.array_equal(sheet[:, :32], pixels(photo)[:, :32])
    glassine(
        "generate", tiny_folder, "a cat", "--image", photo, "--map", "flat:1", *FAST, "--seed", 1, "-o", "whole.png"
    )
    assert np.array_equal(sheet[:, 32:], pixels(tmp_path / "whole.png")[:, 32:])


def test_approximate_fan_says_that_it_is(glassine, tiny_folder, photo):
    result = glassine("fan", tiny_folder, "a cat", "--image", photo, "--columns", 4, *FAST, "--json")
    assert json.loads(result.stdout)["exact"] is False


def write_16_bit(path):
    Image.fromarray(np.zeros((16, 64), np.uint16)).save(path)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "give a PROMPT, or --from PICTURE.png"),
        (("a cat", "--steps", 0), 1, "steps is 0, expected 1 to 1000"),
        (("a cat", "--strength", 1.5), 1, "strength is 1.5, expected 0 to 1"),
        (("a cat", "--seed", -1), 1, "seed is -1, expected 0 to 2**64 - 1"),
        (("a cat", "--sampler", "magic"), 2, "'magic' is not one of 'ddim'"),
        (("a cat", "--sampler", "dpmpp_2m", "--eta", 0.5), 1, 'has no option "eta"'),
        (("a cat", "--map", "gradient:left-right"), 1, "give the picture too (--image)"),
        (("a cat", "--image", "missing.png"), 1, "missing.png: no such file"),
        (("a cat", "--image", "text.png"), 1, "text.png: not a picture Glassine reads"),
        (("a cat", "--image", "broken.png"), 1, "broken.png: cannot be read, the file is damaged or incomplete"),
        (("a cat", "--image", "photo.png", "--map", "wide.png"), 1, "wide.png: is 64x16, but the picture is 64x64"),
        (("a cat", "--image", "photo.png", "--map", "gradient:up"), 1, 'direction "up"; expected one of left-right'),
        (("a cat", "--image", "photo.png", "--map", "photo.png", "--mask", "photo.png"), 1, "give one of them"),
        (("a cat", "--image", "photo.png", "--softness", 3), 1, "softness is the soft border of a mask"),
        (("a cat", "--clip-skip", 9), 1, "clip skip 9: expected 1 to 3, the layers of this text encoder"),
        (("a cat", "-o", "photo.png"), 1, "photo.png: exists; choose another name or say --overwrite"),
        (("a cat", "-o", "cat.jpg"), 1, "cat.jpg: expected a name ending in .png"),
        (("a cat", "-o", "nowhere/cat.png"), 1, "there is no folder nowhere"),
        (("--from", "photo.png"), 1, "photo.png: holds no settings"),
        pytest.param(("a cat", "--device", "cuda"), 1, "cuda", marks=WITHOUT_CUDA),
    ],
)
def test_bad_requests(glassine, tiny_folder, photo, tmp_path, options, code, message):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    write_16_bit(tmp_path / "wide.png")
    before = photo.read_bytes()
    result = glassine("generate", tiny_folder, *options)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert photo.read_bytes() == before


def test_a_folder_that_is_no_model(glassine, tmp_path):
    result = glassine("generate", tmp_path, "a cat")
    assert result.exit_code == 1
    assert "no glassine.json here; expected a folder made by 'glassine convert CHECKPOINT FOLDER'" in result.stderr
