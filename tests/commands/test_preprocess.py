"""glassine preprocess, as a user runs it."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from glassine.runtime.preprocess import KINDS


def test_it_writes_what_the_net_will_see(glassine, photo, tmp_path):
    result = glassine("preprocess", "canny,low=10,high=20", photo, "-o", "edges.png", "--json")
    assert result.exit_code == 0
    expected = {"path": "edges.png", "preprocessor": "canny", "width": 64, "height": 64, "notices": []}
    assert json.loads(result.stdout) == expected
    edges = cv2.Canny(np.asarray(Image.open(photo)), 10, 20)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "edges.png")), np.stack([edges] * 3, axis=-1))


def test_size_fit_and_mask(glassine, photo, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    result = glassine("preprocess", "inpaint", photo, "--mask", "mask.png", "--size", "128x64", "--fit", "fit")
    assert result.exit_code == 0, result.stderr
    pixels = np.asarray(Image.open(tmp_path / "hint.png"))
    assert pixels.shape == (64, 128, 3)
    assert not pixels[:, :32].any()
    assert not pixels[16:48, 48:80].any()
    assert np.array_equal(pixels[:16, 32:96], np.asarray(Image.open(photo))[:16])


def test_the_default_size_is_the_pictures_in_eights(glassine, photo, tmp_path):
    with Image.open(photo) as whole:
        whole.crop((0, 0, 61, 50)).save(tmp_path / "odd.png")
    assert json.loads(glassine("preprocess", "blur", "odd.png", "--json").stdout)["width"] == 56
    with Image.open(tmp_path / "hint.png") as written:
        assert written.size == (56, 48)


def test_list_tells_every_preprocessor_and_setting(glassine):
    text = glassine("preprocess", "--list").stdout
    told = json.loads(glassine("preprocess", "--list", "--json").stdout)
    assert list(told) == list(KINDS)
    for name, kind in KINDS.items():
        assert f"{name:<11}{kind.says}\n" in text + "\n"
        for setting in kind.settings:
            assert f"{setting.name}={setting.default}  {setting.range}: {setting.says}" in text
            assert told[name]["settings"][setting.name]["default"] == setting.default


def test_help_names_every_preprocessor_with_its_line(glassine):
    text = glassine("preprocess", "--help").stdout
    lines = {
        line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line[:4] == "    " and line.split()
    }
    assert {name: lines.get(name) for name in KINDS} == {name: kind.says for name, kind in KINDS.items()}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give HOW and PICTURE, or --list"),
        (("canny",), 2, "give HOW and PICTURE"),
        (("cany", "photo.png"), 1, "did you mean canny"),
        (("canny", "nothing.png"), 1, "nothing.png: no such file"),
        (("canny", "text.png"), 1, "not a picture"),
        (("canny,low=-1", "photo.png"), 1, "low is -1, expected a number from 0 to 2040"),
        (("canny,low=9,high=1", "photo.png"), 1, "expected low <= high"),
        (("canny", "photo.png", "--size", "65x64"), 1, "expected multiples of 8, for example 64x64"),
        (("canny", "photo.png", "--size", "big"), 2, "is not a size"),
        (("canny", "photo.png", "-o", "photo.png"), 1, "exists; choose another name or say --overwrite"),
        (("canny", "photo.png", "--mask", "photo.png"), 1, "takes no mask"),
        (("pose=photo.png", "photo.png"), 1, "expected a network as FILE.onnx"),
    ],
)
def test_what_is_wrong_is_said(glassine, photo, tmp_path, arguments, code, message):
    (tmp_path / "text.png").write_text("no picture")
    result = glassine("preprocess", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "hint.png").exists()


def test_overwrite(glassine, photo):
    assert glassine("preprocess", "invert", photo).exit_code == 0
    assert glassine("preprocess", "invert", photo, "--overwrite").exit_code == 0
