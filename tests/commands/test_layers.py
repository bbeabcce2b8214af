"""layers, compose, generate --transparent as a user runs them: files, notes, and what is refused with which words."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from glassine.runtime.compose import checkerboard, flatten, opaque, over

RNG = np.random.default_rng(9)


@pytest.fixture
def cups(tmp_path):
    """table.png opaque, cup.png and steam.png with alpha, 48x32."""
    layers = [RNG.integers(0, 256, (32, 48, 4), np.uint8) for _ in range(3)]
    layers[0][..., 3] = 255
    for name, pixels in zip(("table", "cup", "steam"), layers, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return layers


def read(path):
    return np.asarray(Image.open(path))


def test_compose_lays_pictures_over_each_other(glassine, tmp_path, cups):
    result = glassine("compose", "table.png", "cup.png", "steam.png", "-o", "tea.png", "--json")
    assert json.loads(result.stdout) == {"path": "tea.png", "layers": ["table", "cup", "steam"]}
    assert np.array_equal(read(tmp_path / "tea.png"), over(cups))
    assert glassine("compose", "cup.png", "-o", "tea.png").exit_code == 1  # exists
    assert np.array_equal(read(tmp_path / "tea.png"), over(cups))


def test_compose_keeps_the_layers_in_openraster(glassine, tmp_path, cups):
    assert glassine("compose", "table.png", "cup.png", "-o", "tea.ora").exit_code == 0
    with zipfile.ZipFile(tmp_path / "tea.ora") as archive:
        assert archive.namelist()[0] == "mimetype"
        with archive.open("mergedimage.png") as file:
            assert np.array_equal(read(file), over(cups[:2]))


@pytest.mark.parametrize("what", ["#204060", "checkerboard", "table.png"])
def test_compose_looks_at_a_picture_over_a_background(glassine, tmp_path, cups, what):
    assert glassine("compose", "cup.png", "--background", what, "-o", "seen.png").exit_code == 0
    behind = {"#204060": np.full((32, 48, 3), (32, 64, 96), np.uint8), "checkerboard": checkerboard(48, 32)}
    expected = opaque(flatten(cups[1], behind.get(what, cups[0][..., :3])))
    assert np.array_equal(read(tmp_path / "seen.png"), expected)


def test_compose_changes_the_size(glassine, tmp_path, cups):
    assert glassine("compose", "cup.png", "--size", "96x64", "-o", "large.png").exit_code == 0
    alpha = Image.fromarray(cups[1][..., 3]).resize((96, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(read(tmp_path / "large.png")[..., 3], np.asarray(alpha))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["table.png", "none.png"], "none.png: no such file"),
     (["table.png", "small.png"], "layer 2 is 8x8, the first is 48x32"),
     (["cup.png", "--background", "blau"], "neither 'checkerboard', nor a colour"),
     (["cup.png", "-o", "out.jpg"], "ending in .png")],
)  # fmt: skip
def test_what_compose_refuses(glassine, tmp_path, cups, arguments, words):
    Image.new("RGBA", (8, 8)).save(tmp_path / "small.png")
    result = glassine("compose", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert not (tmp_path / "composite.png").exists()


def test_a_model_without_the_networks_says_how_to_add_them(glassine, tiny_folder, tmp_path, cups):
    for arguments, words in (
        (
            ["generate", tiny_folder, "a star", "--transparent"],
            "no transparent_unet for 64x64; add LayerDiffuse's patch",
        ),
        (["layers", "joint", tiny_folder, "tea"], "cannot joint at 64x64; add LayerDiffuse's joint"),
        (["layers", "fg2bg", tiny_folder, "tea", "--image", "cup.png"], "fg2bg or fg2ble and fgble2bg"),
        (["layers", "extract", tiny_folder, "--image", "cup.png"], "no transparent_decoder"),
    ):
        result = glassine(*arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert f"--base {tiny_folder}" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cup.png", "steam.png", "table.png"]


def test_views_are_of_transparent_pictures(glassine, tiny_folder, tmp_path):
    result = glassine("generate", tiny_folder, "a star", "--background", "red")
    assert (result.exit_code, "say --transparent too" in result.stderr) == (2, True)
    result = glassine("generate", tiny_folder, "a star", "--transparent", "--background", "blau")
    assert (result.exit_code, "neither 'checkerboard', nor a colour" in result.stderr) == (1, True)
    (tmp_path / "star-over.png").write_bytes(b"mine")
    result = glassine("generate", tiny_folder, "a star", "--transparent", "--background", "red", "-o", "star.png")
    assert result.exit_code == 1
    assert "star-over.png: exists" in result.stderr


def test_layers_asks_for_one_given_layer(glassine, tiny_folder, cups):
    both = ["--background", "table.png", "--foreground", "cup.png"]
    result = glassine("layers", "extract", tiny_folder, "tea", "--image", "table.png", *both)
    assert result.exit_code == 2
    assert "not both" in result.stderr
