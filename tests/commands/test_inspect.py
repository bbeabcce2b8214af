"""inspect --placement: what a person and a program are told."""

import json


def test_placement_of_a_folder(glassine, tiny_folder):
    result = glassine("inspect", tiny_folder, "--placement", "--units", "cpu_and_ne", "--json")
    report = json.loads(result.stdout)
    assert set(report["parts"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    text = glassine("inspect", tiny_folder, "--placement", "--units", "cpu_and_ne").stdout
    assert "A prediction from rules, not from Core ML" in text
    for part in report["parts"].values():
        assert part["source"] == "prediction"
        left = [each for each in part["operations"] if each["unit"] != "neural_engine"]
        assert all(each["reason"] for each in left)
    # The text encoder looks its tokens up; its tokens are float32 at the door.
    gathers = [each for each in report["parts"]["text_encoder"]["operations"] if each["type"] == "gather"]
    assert {each["reason"] for each in gathers} == {"a gather (gather)"}
    assert "a gather (gather)" in text
    kinds = {each["type"] for each in report["parts"]["unet"]["operations"] if each["unit"] == "neural_engine"}
    assert {"conv", "softmax", "einsum"} & kinds


def test_placement_of_one_package(glassine, tiny_folder):
    result = glassine("inspect", tiny_folder / "Unet.mlpackage", "--placement", "--units", "cpu_and_gpu")
    assert "Unet (Unet.mlpackage), prediction: GPU" in result.stdout
    assert "Neural Engine" not in result.stdout


def test_a_checkpoint_has_no_placement(glassine, tiny_checkpoint):
    result = glassine("inspect", tiny_checkpoint, "--placement")
    assert result.exit_code == 2
    assert "convert the checkpoint first" in result.stderr
