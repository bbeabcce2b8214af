"""Layers to arrays: where they lie, what is seen of them, and the maps made of that."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.change_map import blurred
from glassine.runtime.collage import Collage, Layer, arrange, combined, strengths, visible_weights
from glassine.runtime.collage_project import collage_of, read_project, recorded, replayed
from glassine.runtime.compose import over
from glassine.runtime.metadata import Record
from glassine.runtime.openraster import Layer as Drawn
from glassine.runtime.openraster import read_openraster, save_openraster

RNG = np.random.default_rng(11)
RED, BLUE = (220, 30, 30), (40, 60, 220)


def block(width: int, height: int, colour: tuple[int, int, int] = RED, alpha: int = 255) -> np.ndarray:
    """A picture of one colour, (height, width, 4)."""
    return np.tile(np.array([*colour, alpha], np.uint8), (height, width, 1))


def random(width: int, height: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 4), np.uint8)


def test_visible_weights_are_those_of_over():
    """Soft edges count once: 128 of 255 is 128, not 64."""
    layers = [random(24, 16) for _ in range(3)]
    ground = np.dstack([random(24, 16)[..., :3], np.full((16, 24), 255, np.uint8)])
    visible, behind = visible_weights([layer[..., 3] / np.float32(255) for layer in layers])
    np.testing.assert_allclose(visible.sum(axis=0) + behind, 1, atol=3e-7)
    mixed = sum(weight[..., None] * layer[..., :3] for weight, layer in zip(visible, layers, strict=True))
    mixed = mixed + behind[..., None] * ground[..., :3]
    np.testing.assert_allclose(mixed, over([ground, *layers])[..., :3], atol=0.5 + 1e-4)
    assert visible_weights([np.full((1, 1), 128 / 255, np.float32)])[0][0, 0, 0] == np.float32(128 / 255)


def test_the_combined_map_is_laid_layer_by_layer():
    """c = sum of v c is the same as laying constants over each other; pairs of v and c have no order."""
    alphas = [RNG.random((8, 8)).astype(np.float32) for _ in range(4)]
    values = [0.9, 0.0, 0.35, 1.0]
    visible, behind = visible_weights(alphas)
    laid = np.full((8, 8), 0.6)
    for alpha, value in zip(alphas, values, strict=True):
        laid = laid * (1 - alpha) + value * alpha
    made = combined(visible, values, behind, 0.6)
    np.testing.assert_allclose(made, laid, atol=3e-7)  # measured 1.2e-7
    for order in itertools.permutations(range(4)):
        other = combined(visible[list(order)], [values[i] for i in order], behind, 0.6)
        np.testing.assert_allclose(other, made, atol=3e-7)


def test_a_layer_lies_where_it_is_said():
    picture = random(10, 6)
    picture[..., 3] = 255
    arranged = arrange(Collage([Layer(picture, x=5, y=9)], background="#102030"), 32, 24)
    expected = np.tile(np.array([16, 32, 48], np.uint8), (24, 32, 1))
    expected[9:15, 5:15] = picture[..., :3]
    np.testing.assert_array_equal(arranged.pixels, expected)
    np.testing.assert_array_equal(arranged.visible[0] == 1, (expected != (16, 32, 48)).any(axis=-1))


@pytest.mark.parametrize(("x", "y"), [(-4, -3), (28, 20), (-4, 20), (0, 0)])
def test_what_sticks_out_is_cut(x, y):
    picture = block(10, 8)
    seen = arrange(Collage([Layer(picture, x=x, y=y)], blur=0), 32, 24).visible[0]
    expected = np.zeros((24, 32), np.float32)
    expected[max(0, y) : y + 8, max(0, x) : x + 10] = 1
    np.testing.assert_array_equal(seen, expected)


def test_the_size_of_a_layer():
    def box(**said):
        rows, columns = np.nonzero(arrange(Collage([Layer(block(10, 20), **said)]), 64, 64).visible[0])
        return columns.min(), rows.min(), columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()

    assert box(x=3, y=4) == (3, 4, 10, 20)
    assert box(x=3, y=4, width=20) == (3, 4, 20, 40)
    assert box(x=3, y=4, height=10) == (3, 4, 5, 10)
    assert box(x=3, y=4, width=30, height=10) == (3, 4, 30, 10)
    # Quarter turns are exact, around the centre, clockwise.
    assert box(x=13, y=4, rotation=90) == (8, 9, 20, 10)


def test_turning_is_clockwise():
    picture = block(16, 16)
    picture[:8, :8, :3] = BLUE  # the left upper quarter
    turned = arrange(Collage([Layer(picture, rotation=90)]), 16, 16).pixels
    assert turned[4, 12].tolist() == list(BLUE)
    assert turned[4, 4].tolist() == list(RED)
    assert arrange(Collage([Layer(picture, rotation=-90)]), 16, 16).pixels[12, 4].tolist() == list(BLUE)
    np.testing.assert_array_equal(arrange(Collage([Layer(picture, rotation=360)]), 16, 16).pixels, picture[..., :3])


def test_a_slanted_layer_keeps_its_area_and_colour():
    arranged = arrange(Collage([Layer(block(20, 20), x=22, y=22, rotation=30)], background="white"), 64, 64)
    assert arranged.visible[0].sum() == pytest.approx(400, rel=0.02)
    inside = arranged.visible[0] == 1
    assert inside.sum() > 300
    np.testing.assert_array_equal(arranged.pixels[inside], np.broadcast_to(RED, (inside.sum(), 3)))
    rows, columns = np.nonzero(arranged.visible[0] > 0.5)
    assert (rows.mean(), columns.mean()) == (pytest.approx(31.5, abs=0.3), pytest.approx(31.5, abs=0.3))


def test_opacity_lets_see_what_is_behind():
    layers = [Layer(block(16, 16, RED)), Layer(block(16, 16, BLUE), opacity=0.25)]
    arranged = arrange(Collage(layers), 16, 16)
    np.testing.assert_array_equal(arranged.visible, np.stack([np.full((16, 16), share) for share in (0.75, 0.25)]))
    assert arranged.pixels[0, 0].tolist() == np.rint(0.75 * np.array(RED) + 0.25 * np.array(BLUE)).tolist()


def test_auto_strengths():
    """Of a layer that takes half of the canvas, as the paper's interface chooses them."""
    half = [Layer(block(32, 16)), Layer(block(32, 16), y=40)]
    back, front = arrange(Collage(half), 64, 64).strengths
    assert (back.attract, back.repel, back.change, back.control) == pytest.approx((0.4, 0.65, 0.6, 0.6))
    assert (front.attract, front.repel, front.change, front.control) == pytest.approx((0.4, 0.65, 0.4, 0.6))
    assert strengths(1.0, front=False) == pytest.approx((0.2, 0.4, 0.7, 0.3))
    said = Layer(block(32, 16), attract=0.0, repel=2.0, change=0.0, control=1.0)
    assert arrange(Collage([said]), 64, 64).strengths == ((0.0, 2.0, 0.0, 1.0),)


def test_the_background_changes_like_what_changes_most():
    layers = [Layer(block(16, 16), change=0.3), Layer(block(16, 16), x=24, change=0.7)]
    assert arrange(Collage(layers, blur=0), 64, 64).change[40, 40] == np.float32(0.7)
    assert arrange(Collage(layers, blur=0, background_change=0.0), 64, 64).change[40, 40] == 0


def test_maps_of_a_collage():
    layers = [Layer(block(32, 64), change=0.2, control=0.9), Layer(block(16, 16), x=8, y=8, change=1.0, control=0.0)]
    arranged = arrange(Collage(layers, background_change=0.5, blur=0), 64, 64)
    change, control = np.full((64, 64), 0.5, np.float32), np.zeros((64, 64), np.float32)
    change[:, :32], control[:, :32] = 0.2, 0.9
    change[8:24, 8:24], control[8:24, 8:24] = 1.0, 0.0
    np.testing.assert_array_equal(arranged.change, change)
    np.testing.assert_array_equal(arranged.control, control)
    soft = arrange(Collage(layers, background_change=0.5, blur=3), 64, 64)
    np.testing.assert_array_equal(soft.change, blurred(change, 3))
    np.testing.assert_array_equal(soft.control, control)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 12), st.integers(0, 2**32 - 1))
def test_blur_is_a_gaussian(height, width, sigma, seed):
    scipy = pytest.importorskip("scipy.ndimage")
    change = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    reach = int(np.ceil(3 * sigma))
    expected = scipy.gaussian_filter(change.astype(np.float64), sigma, mode="nearest", radius=reach)
    np.testing.assert_allclose(blurred(change, sigma), expected, atol=2e-6)


def test_blur_ends_three_sigmas_away():
    change = np.zeros((8, 64), np.float32)
    change[:, :32] = 1
    soft = blurred(change, 4)
    assert soft[:, 32 + 12 :].max() == 0
    assert soft[:, : 32 - 12].min() > 1 - 1e-6
    assert 0 < soft[0, 32 + 11] < soft[0, 32] < 0.5 < soft[0, 31]
    np.testing.assert_array_equal(blurred(change, 0), change)
    constant = np.full((8, 8), 0.3, np.float32)
    assert blurred(constant, 5) is constant


def test_a_canvas_of_another_size_is_scaled():
    layer = Layer(block(20, 10), x=10, y=20)
    small = arrange(Collage([layer], canvas=(64, 64), blur=0), 128, 128)
    rows, columns = np.nonzero(small.visible[0])
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (40, 60, 20, 60)
    assert small.strengths == arrange(Collage([layer], blur=0), 64, 64).strengths


def test_drawing_again_on_an_earlier_picture():
    """What has change 0 is as the earlier picture shows it, all else as its layer does."""
    earlier = random(64, 64)[..., :3]
    layers = [Layer(block(32, 64, RED), change=0.0), Layer(block(16, 16, BLUE), x=24, y=8, change=0.6)]
    arranged = arrange(Collage(layers, previous=earlier, background_change=0.0, blur=0), 64, 64)
    expected = earlier.copy()
    expected[8:24, 24:40] = BLUE
    np.testing.assert_array_equal(arranged.pixels, expected)
    live = np.zeros((64, 64), bool)
    live[8:24, 24:40] = True
    np.testing.assert_array_equal(arranged.change > 0, live)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Collage([]), "a collage without layers"),
        (lambda: Layer(block(8, 8), "a cup", change=1.2), 'layer "a cup": change is 1.2, expected 0 to 1'),
        (lambda: Layer("cup.png", opacity=-1), "layer cup.png: opacity is -1"),
        (lambda: Layer("cup.png", x=float("nan")), "x is nan"),
        (lambda: Layer("cup.png", repel=11), "repel is 11, expected 0 to 10"),
        (lambda: Layer("cup.png", width=0), "width is 0, expected 1 to 16384"),
        (lambda: Collage([Layer("a.png")], blur=-1), "blur is -1 pixels"),
        (lambda: Collage([Layer("a.png")], background_change=2), "background_change is 2"),
        (lambda: Collage([Layer("a.png")], canvas=(0, 4)), r"canvas is \(0, 4\)"),
        (lambda: arrange(Collage([Layer(block(8, 8), "a cup", x=64)]), 64, 64), "lies outside of the canvas of 64x64"),
        (lambda: arrange(Collage([Layer(block(8, 8, alpha=0))]), 64, 64), "is transparent everywhere"),
        (
            lambda: arrange(Collage([Layer(block(8, 8))], canvas=(64, 32)), 64, 64),
            "64x32, the model 64x64, which is an",
        ),
        (lambda: arrange(Collage([Layer("nowhere.png")]), 64, 64), r"nowhere\.png: no such file"),
        (
            lambda: arrange(Collage([Layer(block(8, 8))], previous=block(8, 8)), 64, 64),
            "is 8x8, the model 64x64; expected a picture",
        ),
        (lambda: arrange(Collage([Layer(block(8, 8))], background="nowhere"), 64, 64), "background 'nowhere'"),
    ],
)
def test_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_what_is_covered_is_said():
    layers = [Layer(block(8, 8), "a cup"), Layer(block(32, 32))]
    assert arrange(Collage(layers), 32, 32).notices == ('layer "a cup" is covered by those in front of it',)


# Files.


@pytest.fixture
def scene(tmp_path) -> Path:
    """A project with two pictures beside it."""
    Image.fromarray(block(10, 10, RED)).save(tmp_path / "star.png")
    Image.fromarray(block(12, 6, BLUE)).save(tmp_path / "circle.png")
    project = {
        "prompt": "a red star and a blue circle",
        "seed": 3,
        "model": "tiny",
        "size": [64, 48],
        "background": "#102030",
        "blur": 0,
        "layers": [
            {"image": "star.png", "words": "a red star", "x": 4, "rotation": 15},
            {"image": "circle.png", "words": "a blue circle", "x": 20, "change": 0, "repel": 0.5, "occurrence": 1},
        ],
    }
    (tmp_path / "project.json").write_text(json.dumps(project))
    return tmp_path


def test_a_project(scene):
    project = read_project(scene / "project.json")
    assert project.settings == {"prompt": "a red star and a blue circle", "seed": 3}
    assert (project.model, project.size) == (scene / "tiny", (64, 48))
    star = Layer(scene / "star.png", "a red star", x=4, rotation=15)
    circle = Layer(scene / "circle.png", "a blue circle", x=20, change=0, repel=0.5, occurrence=1)
    assert project.collage == Collage([star, circle], background="#102030", blur=0)
    assert read_project(scene) == project  # the folder
    assert read_project(scene, "another").settings == {"prompt": "another", "seed": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layrs": []}, r"unknown fields \['layrs'\]; a project has model, size, layers, background"),
        ({"layers": "star.png"}, '"layers": expected a list of objects'),
        ({"layers": []}, "without layers"),
        ({"layers": [{"words": "a"}]}, 'layer 1: no "image"'),
        (
            {"layers": [{"image": "star.png", "left": 3}]},
            r"layer 1: unknown fields \['left'\]; a layer has image, words",
        ),
        ({"layers": [{"image": "star.png", "x": "3"}]}, "\"x\" is '3', expected a number"),
        ({"layers": [{"image": "star.png", "x": True}]}, "\"x\" is 'True', expected a number"),
        ({"layers": [{"image": "star.png", "words": 3}]}, "\"words\" is '3', expected a text"),
        ({"layers": [{"image": "star.png", "occurrence": 1.0}]}, "expected a whole number"),
        ({"layers": [{"image": 3}]}, "expected the path of a picture"),
        ({"size": [64]}, r'"size" is \[64\], expected \[width, height\]'),
        ({"model": 3}, "\"model\" is '3', expected a text"),
        ({"blur": "soft"}, '"blur" is'),
    ],
)
def test_a_damaged_project(scene, change, message):
    path = scene / "project.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RequestError, match=message):
        read_project(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_what_is_no_project(tmp_path, text):
    (tmp_path / "scene.json").write_text(text)
    with pytest.raises(RequestError, match=r"scene\.json: (cannot be read|expected one JSON object)"):
        read_project(tmp_path / "scene.json")
    with pytest.raises(RequestError, match=r"has neither project\.json nor layers\.ora"):
        read_project(tmp_path)


def record_of(collage: Collage) -> Record:
    """What is read back from a picture of the collage."""
    text = json.dumps(recorded(collage), allow_nan=False)
    return Record(written_by="glassine", request={}, size=None, model={}, inputs={}, collage=json.loads(text))


def test_a_record_makes_the_same_collage(scene):
    collage = read_project(scene).collage
    assert replayed(record_of(collage), scene) == collage
    assert str(scene) not in json.dumps(recorded(collage))  # no folders in a picture that is passed on
    changed = replace(collage, previous=scene / "star.png", background=scene / "circle.png", canvas=(64, 48))
    assert replayed(record_of(changed), scene) == changed


def test_a_record_whose_files_have_changed(scene):
    record = record_of(read_project(scene).collage)
    Image.fromarray(block(10, 10, BLUE)).save(scene / "star.png")
    with pytest.raises(RequestError, match=r"star\.png: changed since"):
        replayed(record, scene)
    with pytest.raises(RequestError, match="was an array in Python"):
        replayed(record_of(Collage([Layer(block(4, 4))])), scene)
    with pytest.raises(RequestError, match="this picture is no collage"):
        replayed(replace(record, collage=None), scene)


@pytest.mark.parametrize("image", [3, "red", {"name": 3}, ["x"], {"name": "../../star.png", "sha256": "0"}])
def test_hostile_records(scene, image):
    record = replace(record_of(read_project(scene).collage), collage={"layers": [{"image": image}]})
    if image == "red":  # a colour is a picture of that colour only for backgrounds
        with pytest.raises(RequestError):
            arrange(replayed(record, scene), 64, 48)
        return
    with pytest.raises(RequestError):
        replayed(record, scene)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["layers", "image", "x", "words", "canvas", "blur", "background"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_json_is_a_collage_or_refused(raw):
    if isinstance(raw, dict):
        with contextlib.suppress(RequestError):
            collage_of(raw, lambda value, what: np.zeros((4, 4, 4), np.uint8))


# OpenRaster.


def test_a_drawing_is_a_collage(tmp_path):
    ground = np.dstack([random(64, 48)[..., :3], np.full((48, 64), 255, np.uint8)])
    star, note = np.zeros((48, 64, 4), np.uint8), np.zeros((48, 64, 4), np.uint8)
    star[10:20, 5:15] = (*RED, 255)
    note[:4, :4] = 255
    drawn = [
        Drawn(name="paper", pixels=ground),
        Drawn(name=" A red Star", pixels=star),
        Drawn(name="note", pixels=note),
        Drawn(name="hidden", pixels=note, visible=False),
    ]
    save_openraster(tmp_path / "layers.ora", drawn)
    with pytest.raises(RequestError, match="has no prompt; give one with --prompt"):
        read_project(tmp_path / "layers.ora")
    for path in (tmp_path, tmp_path / "layers.ora"):
        project = read_project(path, "a (red:1.2) star on paper")
        assert project.collage.canvas == (64, 48)
        assert [layer.words for layer in project.collage.layers] == ["A red Star", ""]
        assert project.notices == ('layer "note": its name is not in the prompt, so no words are drawn where it lies',)
        np.testing.assert_array_equal(arrange(project.collage, 64, 48).pixels, over([ground, star, note])[..., :3])


def stack_file(path: Path, xml: str, pictures: dict[str, np.ndarray]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("stack.xml", xml)
        for name, pixels in pictures.items():
            with archive.open(name, "w") as file:
                Image.fromarray(pixels).save(file, format="PNG")
    return path


def test_groups_offsets_and_opacity(tmp_path):
    xml = """<image w="40" h="30"><stack>
      <layer name="front" src="data/a.png" x="3" y="4" opacity="0.5"/>
      <stack name="group" x="10" y="5" opacity="0.5" visibility="hidden">
        <layer name="inner" src="data/a.png" x="1" y="2" opacity="0.5"/></stack>
      <layer name="back" src="data/b.png"/></stack></image>"""
    pictures = {"data/a.png": block(4, 5, RED), "data/b.png": block(6, 7, BLUE)}
    layers, canvas = read_openraster(stack_file(tmp_path / "x.ora", xml, pictures))
    assert canvas == (40, 30)
    said = [(layer.name, layer.x, layer.y, layer.opacity, layer.visible) for layer in layers]
    assert said == [("back", 0, 0, 1.0, True), ("inner", 11, 7, 0.25, False), ("front", 3, 4, 0.5, True)]
    np.testing.assert_array_equal(layers[0].pixels, pictures["data/b.png"])


@pytest.mark.parametrize(
    "xml",
    [
        "<image",
        "<image/>",
        '<image w="4" h="4"><stack/></image>',
        '<image w="4" h="4"><stack><layer src="missing.png"/></stack></image>',
        '<image w="4" h="4"><stack><layer src="data/a.png" x="left"/></stack></image>',
        '<image><stack><layer src="data/a.png"/></stack></image>',
        '<image w="4" h="4"><stack><layer src="data/a.png" composite-op="svg:multiply"/></stack></image>',
        '<image w="4" h="4">' + "<stack>" * 3000 + "</stack>" * 3000 + "</image>",
        '<image w="4" h="4"><stack><layer src="stack.xml"/></stack></image>',
        '<!DOCTYPE x [<!ENTITY a "aa">]><image w="4" h="4"><stack><layer name="&a;" src="data/a.png"/></stack></image>',
    ],
)
def test_damaged_drawings(tmp_path, xml):
    path = stack_file(tmp_path / "x.ora", xml, {"data/a.png": block(4, 4)})
    with pytest.raises(RequestError, match=re.escape(str(path))):
        read_openraster(path)
    with pytest.raises(RequestError, match="no such file"):
        read_openraster(tmp_path / "y.ora")
    (tmp_path / "z.ora").write_bytes(b"PK\x03\x04nonsense")
    with pytest.raises(RequestError, match="cannot be read"):
        read_openraster(tmp_path / "z.ora")
