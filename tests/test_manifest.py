"""glassine.json: what is written comes back; what is damaged, newer or hostile is refused with a message."""

import json

import pytest

from glassine.errors import PackageError
from glassine.manifest import FILE_NAME, Manifest, Part


def part(file: str) -> Part:
    return Part(
        file=file, role="unet", inputs={"sample": ((2, 4, 8, 8), "float16")}, outputs={}, parameters=1,
        precision="float16", source="a.safetensors", source_sha256="0" * 64,
    )  # fmt: skip


@pytest.fixture
def manifest() -> Manifest:
    parts = {"unet": part("Unet.mlpackage"), "unet_96x64": part("Unet_96x64.mlpackage")}
    return Manifest(
        name="a", family="sd15", prediction_type="epsilon", width=64, height=64, batch=2, tokens=77,
        latent_scale=0.18215, clip_skip=1, parts=parts,
    )  # fmt: skip


def test_round_trip(manifest, tmp_path):
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def test_sizes_and_parts(manifest):
    assert manifest.sizes == ((64, 64), (96, 64))
    assert manifest.part("unet", (96, 64)).file == "Unet_96x64.mlpackage"
    assert manifest.part("vae_decoder", (96, 64)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2, this Glassine reads 1"),
        ({"width": "64"}, "not positive integers"),
        ({"batch": 0}, "not positive integers"),
        ({"latent_scale": None}, "latent_scale is None"),
        ({"unknown": 1}, "unknown"),
        ({"parts": []}, "not a valid manifest"),
    ],
)
def test_damage_is_named(manifest, tmp_path, change, message):
    manifest.write(tmp_path)
    raw = json.loads((tmp_path / FILE_NAME).read_text()) | change
    (tmp_path / FILE_NAME).write_text(json.dumps(raw))
    with pytest.raises(PackageError, match=message):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("file", ["../Unet.mlpackage", "/etc/passwd", "a/b.mlpackage"])
def test_a_part_outside_the_folder_is_refused(manifest, tmp_path, file):
    manifest.write(tmp_path)
    text = (tmp_path / FILE_NAME).read_text().replace('"Unet.mlpackage"', json.dumps(file))
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(PackageError, match="is not a plain file name"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_text_that_is_no_manifest(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(PackageError):
        Manifest.read(tmp_path)
