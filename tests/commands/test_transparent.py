"""LayerDiffuse's files on the command line: beside a checkpoint, and into a folder that is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from glassine.manifest import Manifest

TINY = Path(__file__).parents[2] / "models/tiny"
ENCODER = TINY / "tiny_transparent_encoder.safetensors"


def test_a_file_is_added_to_a_folder(glassine, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    assert glassine("convert", ENCODER, "--base", "model", "--dry-run").exit_code == 0
    assert "transparent_encoder" not in Manifest.read(tmp_path / "model").parts
    result = glassine("convert", ENCODER, "--base", "model", "--offset-scale", 0, "--json")
    assert json.loads(result.stdout)["parts"]["transparent_encoder"] == "TransparentEncoder.mlpackage"
    assert Manifest.read(tmp_path / "model").parts["transparent_encoder"].about["offset_scale"] == 0
    refused = glassine("convert", f"encoder={ENCODER}", "--base", "model")
    assert refused.exit_code == 1
    assert "has a transparent_encoder already; pass --overwrite" in refused.stderr
    assert glassine("convert", f"encoder={ENCODER}", "--base", "model", "--overwrite").exit_code == 0


def test_a_file_goes_beside_a_checkpoint(glassine, tiny_checkpoint, tmp_path):
    result = glassine(
        "convert", tiny_checkpoint, "out", "--size", "64x64", "--attention", "einsum", "--part", "unet",
        "--transparent", ENCODER, "--dry-run", "--json",
    )  # fmt: skip
    assert list(json.loads(result.stdout)["parts"]) == ["unet", "transparent_encoder"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing argument 'OUT'"),
        (["out", "--base", "model"], "say one of them"),
        (["--base", "model", "--transparent", "decoder.safetensors"], "With --base"),
    ],
)
def test_a_folder_is_made_or_added_to(glassine, words, message):
    result = glassine("convert", ENCODER, *words)
    assert result.exit_code == 2
    assert message in result.stderr
