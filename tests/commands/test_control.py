"""--control: its grammar, and controlled pictures from the command line on a small random model."""

import json
from functools import partial
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from glassine.commands.control import read_control
from glassine.convert.control import Control, control_networks
from glassine.convert.folder import ConvertOptions, convert_checkpoint

FAST = ("--steps", 2, "--sampler", "euler", "--seed", 1)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("canny=edges.png", {"net": "canny", "image": Path("edges.png")}),
        ("tile", {"net": "tile", "image": None}),
        ("tile:weight=0", {"net": "tile", "image": None, "weight": 0.0}),
        (
            "canny=edges.png:weight=0.8:start=0:stop=0.6:mode=prompt",
            {"net": "canny", "image": Path("edges.png"), "weight": 0.8, "start": 0.0, "stop": 0.6, "mode": "prompt"},
        ),
        (r"C:\x.mlpackage=C:\e.png:weight=1", {"net": r"C:\x.mlpackage", "image": Path(r"C:\e.png"), "weight": 1.0}),
        ("/a=b/x.mlpackage=/c=d/e.png", {"net": "/a=b/x.mlpackage", "image": Path("/c=d/e.png")}),
        ("canny=12:30.png:map=w.png", {"net": "canny", "image": Path("12:30.png"), "map": "w.png"}),
        (
            "canny=e.png:map=box:10%,10%,50%,60%:soft=24:stop=.5",
            {"net": "canny", "image": Path("e.png"), "map": "box:10%,10%,50%,60%:soft=24", "stop": 0.5},
        ),
        (
            "union=p.png:preprocess=canny,low=50:type=hard_edge:mask=m.png:fit=fit:interval=a1111",
            {
                "net": "union",
                "image": Path("p.png"),
                "preprocess": "canny,low=50",
                "control_type": "hard_edge",
                "mask": "m.png",
                "fit": "fit",
                "interval": "a1111",
            },
        ),
    ],
)
def test_grammar(text, fields):
    assert read_control(text) == fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canny=e.png:wieght=2", 'no setting "wieght"; there are weight, start, stop, mode, map'),
        ("canny=e.png:weight=2:soft=3", 'no setting "soft"'),
        ("canny=e.png:weight=heavy", 'weight is "heavy", expected a number'),
        ("canny=e.png:weight=1:weight=2", "a setting is said twice"),
        ("=e.png", "no net before the ="),
        ("", "no net before the ="),
    ],
)
def test_slips_of_the_pen(text, message):
    with pytest.raises(click.BadParameter) as refused:
        read_control(text)
    assert message in refused.value.message
    assert "expected NET[=IMAGE][:weight=0.8]" in refused.value.message


@pytest.fixture(scope="module")
def controlled(checkpoints, controls, tiny_checkpoint, tmp_path_factory):
    """`tiny_checkpoint` with a random control net, `canny`, converted at 64x64 pixels; read only."""
    place = tmp_path_factory.mktemp("controlled")
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    net = checkpoints.write_safetensors(place / "net.safetensors", values)
    options = ConvertOptions(
        sizes=((64, 64),), attention="einsum", further=(partial(control_networks, [Control(net, name="canny")]),)
    )
    convert_checkpoint(tiny_checkpoint, place / "model", options)
    return place / "model"


@pytest.fixture
def edges(tmp_path):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[20:44, 20] = pixels[20:44, 44] = 255
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_control_changes_the_picture_and_weight_0_does_not(glassine, controlled, edges, tmp_path):
    for name, option in (
        ("plain", ()),
        ("steered", ("--control", "canny=edges.png")),
        ("off", ("--control", "canny=edges.png:weight=0")),
    ):
        result = glassine("generate", controlled, "a cat", *FAST, *option, "-o", f"{name}.png")
        assert result.exit_code == 0, result.stderr
    assert np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "off.png"))
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "steered.png"))


def test_from_draws_the_controlled_picture_byte_for_byte(glassine, controlled, edges, photo, tmp_path):
    Image.fromarray(np.full((64, 64), 128, np.uint8)).save(tmp_path / "where.png")
    first = glassine(
        "generate", controlled, "a cat", "--image", photo, "--map", "gradient:left-right", *FAST, "-o", "first.png",
        "--control", "canny=edges.png:weight=0.8:stop=0.5:mode=prompt:map=where.png",
        "--control", "canny:preprocess=canny,low=20:mode=control",
    )  # fmt: skip
    assert first.exit_code == 0, first.stderr
    second = glassine("generate", controlled, "--from", "first.png", "-o", "second.png")
    assert second.exit_code == 0, second.stderr
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with Image.open(tmp_path / "first.png") as image:
        record = json.loads(image.info["glassine"])
    assert [control["weight"] for control in record["controls"]] == [0.8, 1.0]
    edges.write_bytes(photo.read_bytes())
    changed = glassine("generate", controlled, "--from", "first.png", "-o", "third.png")
    assert changed.exit_code == 1
    assert "edges.png: changed since the picture was drawn from it; give the image of canny with --control" in (
        changed.stderr
    )


def test_count_and_fan(glassine, controlled, edges, photo, tmp_path):
    option = ("--control", "canny=edges.png")
    counted = glassine("generate", controlled, "a cat", *FAST, *option, "--count", 2, "-o", "cat.png")
    assert counted.stdout.split() == ["cat-1.png", "cat-2.png"]
    glassine("generate", controlled, "a cat", *FAST[:-1], 2, *option, "-o", "alone.png")
    assert np.array_equal(pixels(tmp_path / "cat-2.png"), pixels(tmp_path / "alone.png"))
    fan = ("fan", controlled, "a cat", "--image", photo, "--columns", 2, *FAST, "--exact")
    assert glassine(*fan, "-o", "fan.png").exit_code == 0
    assert glassine(*fan, *option, "-o", "steered.png").exit_code == 0
    plain, steered = pixels(tmp_path / "fan.png"), pixels(tmp_path / "steered.png")
    assert np.array_equal(plain[:64, :32], steered[:64, :32])
    assert not np.array_equal(plain[:64, 32:], steered[:64, 32:])


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("canny=missing.png", 1, "missing.png: no such file"),
        ("canny", 1, "control canny: has no hint"),
        ("cany=edges.png", 1, 'no control net "cany", only canny; convert it first'),
        ("canny=edges.png:weight=3", 1, "control canny: weight is 3.0, expected 0 (off) to 2"),
        ("canny=edges.png:start=0.5:stop=0.2", 1, "starts at 0.5 and stops before, at 0.2"),
        ("canny=edges.png:mode=mine", 1, "mode is 'mine', expected one of balanced, prompt, control, guess"),
        ("canny=edges.png:preprocess=magic", 1, "magic"),
        ("canny=edges.png:map=missing.png", 1, "missing.png: no such file"),
        ("canny=edges.png:map=wide.png", 1, "wide.png: is 64x16, but the picture is 64x64"),
        ("canny=clear.png", 1, "clear.png: has transparent pixels, and a hint is taken as it is"),
        ("nowhere.mlpackage=edges.png", 1, "nowhere.mlpackage: not a model package"),
        ("canny=edges.png:wieght=1", 2, 'no setting "wieght"'),
    ],
)
def test_bad_requests(glassine, controlled, edges, tmp_path, option, code, message):
    Image.fromarray(np.zeros((16, 64), np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((64, 64, 4), np.uint8)).save(tmp_path / "clear.png")
    result = glassine("generate", controlled, "a cat", *FAST, "--control", option, "-o", "cat.png")
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (code, True), result.stderr
    assert not (tmp_path / "cat.png").exists()


def test_a_net_by_the_path_of_its_package(glassine, controlled, edges, tmp_path):
    for name, net in (("name", "canny"), ("path", controlled / "ControlNet_canny.mlpackage")):
        result = glassine("generate", controlled, "a cat", *FAST, "--control", f"{net}=edges.png", "-o", f"{name}.png")
        assert result.exit_code == 0, result.stderr
    assert np.array_equal(pixels(tmp_path / "name.png"), pixels(tmp_path / "path.png"))


def test_a_model_without_control(glassine, tiny_folder, edges):
    result = glassine("generate", tiny_folder, "a cat", *FAST, "--control", "canny=edges.png")
    assert result.exit_code == 1
    assert (
        'no control net "canny", and none at all; convert it first: glassine convert NET.safetensors' in result.stderr
    )
