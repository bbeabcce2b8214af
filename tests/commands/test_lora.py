"""glassine lora and the LoRAs of prompts: what changes, what is said, what is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import glassine as package
from glassine.convert.extras import file_sha256
from glassine.manifest import Manifest
from glassine.runtime.prompt import NetworkTag, network_tags, without_tags

FAST = ("--steps", 1, "--sampler", "euler", "--cfg", 1, "--seed", 3)
TINY = Path(package.__file__).parent / "models" / "tiny"


@pytest.fixture
def model(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


@pytest.fixture
def ink(checkpoints, tmp_path):
    rng = np.random.default_rng(0)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    tensors = {f"{module}.lora_down.weight": rng.standard_normal((2, 64)), f"{module}.lora_up.weight": np.ones((64, 2))}
    (tmp_path / "files").mkdir()
    return checkpoints.write_safetensors(tmp_path / "files" / "ink.safetensors", tensors)


def drawn(glassine, model, prompt, *options, name="out.png"):
    result = glassine("generate", model, prompt, *FAST, *options, "-o", name, "--overwrite")
    assert result.exit_code == 0, result.stderr
    return np.asarray(Image.open(name)), result


def test_add_change_list_remove(glassine, model, ink):
    plain, _ = drawn(glassine, model, "a cat")
    assert glassine("lora", model, "list").stdout == f"{model}: no LoRAs\n"
    assert glassine("lora", model, "add", f"{ink}=0.5").stdout.startswith("ink                      unet 0.5, text 0.5")
    half, _ = drawn(glassine, model, "a cat")
    result = json.loads(glassine("lora", model, "add", f"{ink}=1,0", "--json").stdout)
    assert [(lora["name"], lora["unet"], lora["text"]) for lora in result["loras"]] == [("ink", 1.0, 0.0)]
    full, _ = drawn(glassine, model, "a cat")
    assert not np.array_equal(plain, half)
    assert not np.array_equal(half, full)
    ink.unlink()  # the model has its own copy, and its own weights
    assert glassine("lora", model, "remove", "ink").stdout == f"{model}: no LoRAs\n"
    again, _ = drawn(glassine, model, "a cat")
    np.testing.assert_array_equal(plain, again)


def test_what_is_asked_wrongly(glassine, model, ink):
    assert glassine("lora", model, "add").exit_code == 2
    assert glassine("lora", model, "list", "ink").exit_code == 2
    gone = glassine("lora", model, "remove", "nothing")
    assert (gone.exit_code, "nothing: is not in" in gone.stderr) == (1, True)
    assert "no such file" in glassine("lora", model, "add", "missing.safetensors").stderr
    other = glassine("lora", model, "add", TINY / "tiny_lcm_lora.safetensors").stderr
    assert other.startswith(f"Error: {TINY / 'tiny_lcm_lora.safetensors'}: ")
    assert other.endswith("the file was made for another model\n")
    assert not (model / "loras").exists()
    assert Manifest.read(model).loras == ()


def test_a_lora_of_the_conversion_cannot_be_removed(glassine, tiny_checkpoint, ink, tmp_path):
    converted = tmp_path / "inked"
    result = glassine(
        "convert", tiny_checkpoint, converted, "--part", "unet", "--size", "64x64", "--lora", f"{ink}=0.5"
    )
    assert result.exit_code == 0, result.stderr
    assert "merged at conversion" in glassine("lora", converted, "list").stdout
    refused = glassine("lora", converted, "remove", "ink")
    assert "was merged when" in refused.stderr


def test_the_lora_of_a_prompt_draws_as_one_that_was_added(glassine, model, ink):
    plain, _ = drawn(glassine, model, "a cat")
    tagged, result = drawn(glassine, model, "a cat<lora:ink:0.5>", "--lora-dir", ink.parent)
    assert f"LoRA {ink}: unet 0.5, text 0.5" in result.stderr
    assert "left out" not in result.stderr
    with Image.open("out.png") as picture:
        assert "<lora:ink:0.5>" in picture.info["parameters"]  # and can be drawn again
        assert json.loads(picture.info["glassine"])["model"]["loras"].startswith("ink=0.5,0.5 ")
    untouched, _ = drawn(glassine, model, "a cat")
    np.testing.assert_array_equal(plain, untouched)
    glassine("lora", model, "add", f"{ink}=0.5")
    added, _ = drawn(glassine, model, "a cat")
    np.testing.assert_array_equal(tagged, added)


def test_the_lora_of_a_prompt_goes_into_the_source_of_palettes(glassine, tiny_checkpoint, ink, tmp_path):
    source, small = tmp_path / "source.safetensors", tmp_path / "small"
    shutil.copyfile(tiny_checkpoint, source)
    result = glassine("convert", source, small, "--size", "64x64", "--palette", 4)
    assert result.exit_code == 0, result.stderr
    prompt = ("a cat<lora:ink:0.5>", "--lora-dir", ink.parent)
    plain, _ = drawn(glassine, small, "a cat")
    tagged, result = drawn(glassine, small, *prompt)
    assert f"{small} has palettes: the LoRAs go into the weights of {source} and 0 million numbers" in result.stderr
    assert not np.array_equal(plain, tagged)
    # One that is made is found again, and needs no source.
    moved = source.rename(tmp_path / "moved.safetensors")
    again, result = drawn(glassine, small, *prompt)
    assert "has palettes" not in result.stderr
    np.testing.assert_array_equal(tagged, again)

    other = ("a cat<lora:ink:0.75>", "--lora-dir", ink.parent)
    refused = glassine("generate", small, *other, *FAST)
    assert refused.exit_code == 1
    assert f"source.safetensors (sha256 {file_sha256(moved)[:12]}...) is no longer at {source}" in refused.stderr
    wrong = glassine("generate", small, *other, *FAST, "--source", ink)
    assert wrong.exit_code == 1
    drawn(glassine, small, *other, "--source", moved)
    drawn(glassine, small, "a cat<lora:ink:0.25>", "--lora-dir", ink.parent)  # it is known from now on
    assert len(list((small / ".glassine/variants").iterdir())) == 2

    assert glassine("lora", small, "add", f"{ink}=0.5", "--source", moved).exit_code == 0
    added, _ = drawn(glassine, small, "a cat")
    np.testing.assert_array_equal(tagged, added)
    glassine("lora", small, "remove", "ink")
    np.testing.assert_array_equal(drawn(glassine, small, "a cat")[0], plain)


def test_palettes_of_which_nobody_knows_the_source(glassine, tiny_checkpoint, ink, tmp_path):
    small = tmp_path / "small"
    glassine("convert", tiny_checkpoint, small, "--part", "unet", "--size", "64x64", "--palette", 4)
    shutil.rmtree(small / ".glassine")  # as earlier versions left it
    refused = glassine("generate", small, "a cat<lora:ink>", "--lora-dir", ink.parent, *FAST)
    assert "lies where the folder does not know; say --source CHECKPOINT" in refused.stderr
    assert not (small / ".glassine").exists()


def test_a_lora_is_given_once(glassine, model, ink, tiny_checkpoint, tmp_path):
    twice = glassine("lora", model, "add", f"{ink}=2", f"{ink}=1")
    assert (twice.exit_code, f"LoRA 'ink': is given twice, {ink} and {ink}; say it once" in twice.stderr) == (1, True)
    namesake = tmp_path / "ink.safetensors"
    shutil.copyfile(ink, namesake)
    for command in (("lora", model, "add", ink, namesake),
                    ("convert", tiny_checkpoint, tmp_path / "new", "--lora", ink, "--lora", namesake)):  # fmt: skip
        assert "rename one of them" in glassine(*command).stderr
    assert Manifest.read(model).loras == ()


def test_what_is_no_model_has_no_loras(glassine, ink, tmp_path):
    result = glassine("generate", tmp_path / "nothing", "a cat <lora:ink:1>", "--lora-dir", ink.parent)
    assert result.exit_code == 1
    assert "LoRA" not in result.stderr


def test_a_lora_of_a_prompt_that_is_not_found_is_an_error(glassine, model, ink):
    missing = glassine("generate", model, "a cat <lora:pencil:1>", *FAST, "--lora-dir", ink.parent)
    assert missing.exit_code == 1
    assert "no LoRA 'pencil'" in missing.stderr
    assert "there are ink" in missing.stderr
    unreadable = glassine("generate", model, "a cat <lora:ink:strong>", *FAST, "--lora-dir", ink.parent)
    assert "<lora:ink:strong> cannot be read" in unreadable.stderr


def test_a_lora_in_the_negative_prompt_is_said_to_be_left_out(glassine, model):
    _, result = drawn(glassine, model, "a cat", "--negative", "<lora:ink:1>", "--cfg", 2)
    assert "<lora:ink:1> is left out of the prompt" in result.stderr


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:ink>", ("ink", 1.0, 1.0)),
        ("<lora:ink:0.8>", ("ink", 0.8, 0.8)),
        ("<lyco:ink:-0.5>", ("ink", -0.5, -0.5)),
        ("<lora:ink:0.3:0.9>", ("ink", 0.9, 0.3)),  # A1111: text first
        ("<lora:ink:unet=0.9:te=0.3>", ("ink", 0.9, 0.3)),
        ("<lora:ink:0.3:unet=0.9>", ("ink", 0.9, 0.3)),
        ("<lora:ink:x>", None),
        ("<lora:ink:1:2:3>", None),
        ("<lora:ink:dyn=4>", None),
        ("<lora::1>", None),
        ("<hypernet:ink:1>", None),
    ],
)
def test_tags(tag, expected):
    wanted = None if expected is None else NetworkTag(*expected)
    assert network_tags(f"a cat {tag}, dog") == {tag: wanted}
    assert without_tags(f"a cat {tag}, dog", [NetworkTag("ink", 5, 5)]) == f"a cat {tag}, dog"
    if wanted is not None:
        assert without_tags(f"a cat {tag}, dog", [wanted]) == "a cat , dog"
