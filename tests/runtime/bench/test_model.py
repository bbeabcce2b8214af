"""What a folder has to time, and the digest that tells its weights whatever they were converted to."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.errors import PackageError
from glassine.runtime.bench.model import model_digest, packages_of, parts_of
from glassine.runtime.foreign import read_model


@pytest.fixture(scope="module")
def other(tiny_checkpoint, tmp_path_factory):
    """The same checkpoint at two sizes, in another attention form, with one row a call."""
    folder = tmp_path_factory.mktemp("other") / "other"
    options = ConvertOptions(sizes=((64, 64), (96, 64)), attention="split", layout="channels_first", batch=1)
    convert_checkpoint(tiny_checkpoint, folder, options)
    return folder


def test_the_parts_of_a_size(other, tiny_folder):
    manifest = read_model(other).manifest
    roles = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for size, ending in (((64, 64), ""), ((96, 64), "_96x64")):
        parts = parts_of(manifest, size)
        assert sorted(parts) == roles
        assert parts["unet"] is manifest.parts[f"unet{ending}"]
        assert parts["text_encoder"] is manifest.parts["text_encoder"]
    assert list(parts_of(manifest, (64, 64), ("unet",))) == ["unet"]
    with pytest.raises(PackageError, match="no moon, only text_encoder"):
        parts_of(manifest, (64, 64), ("moon",))
    part = dataclasses.replace(manifest.parts["unet"], about={"chunks": ["A.mlpackage", "../B.mlpackage"]})
    with pytest.raises(PackageError, match="not plain file names"):
        packages_of(other, part)


def test_the_digest_is_of_the_weights(other, tiny_folder, tmp_path):
    digest = model_digest(read_model(tiny_folder))
    assert model_digest(read_model(other)) == digest
    changed = tmp_path / "changed"
    shutil.copytree(other, changed)
    manifest = json.loads((changed / "glassine.json").read_text())
    manifest["loras"] = [{"name": "ink", "sha256": "ab", "unet": 0.8, "text": 0.8}]
    (changed / "glassine.json").write_text(json.dumps(manifest))
    assert model_digest(read_model(changed)) != digest


def test_the_digest_of_a_folder_that_says_nothing_of_its_source(tiny_folder, tmp_path):
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        shutil.copytree(tiny_folder, copy)
        (copy / "glassine.json").unlink()
    first, second = (model_digest(read_model(copy)) for copy in copies)
    assert first == second
    weights = next(copies[1].joinpath("Unet.mlpackage").rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    assert model_digest(read_model(copies[1])) != first
