"""Networks of the user's: small ones made here, in ONNX and in Core ML's format, whose answers are known."""

import builtins
import sys

import numpy as np
import pytest
from scipy import ndimage

from glassine.errors import EngineError, MissingDependency, RequestError
from glassine.runtime.engine import EngineOptions
from glassine.runtime.preprocess import Preprocess, hint
from glassine.runtime.preprocess.ade20k import ADE20K
from glassine.runtime.preprocess.network import Network, open_network

# coremltools leaves its temporary packages to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIDES = {"any": ("h", "w"), "fixed": (64, 96)}


@pytest.fixture
def onnx_file(tmp_path):
    """Write a network of one 1x1 convolution: onnx_file(weight (O, 3), bias (O,), sides=, stride=, last=, dtype=)."""
    onnx = pytest.importorskip("onnx", reason="needs the dev extra")
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    from onnx import TensorProto, helper, numpy_helper

    def write(weight, bias, *, sides="any", stride=1, last=False, dtype="float32", squeeze=False):
        kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
        shape = (1, *SIDES[sides], 3) if last else (1, 3, *SIDES[sides])
        nodes = [helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT)]
        value = "float"
        if last:
            nodes.append(helper.make_node("Transpose", [value], ["first"], perm=[0, 3, 1, 2]))
            value = "first"
        nodes.append(helper.make_node("Conv", [value, "weight", "bias"], ["mapped"], strides=[stride, stride]))
        value = "mapped"
        if squeeze:
            nodes.append(helper.make_node("Squeeze", [value, "axis"], ["out"]))
        elif last:
            nodes.append(helper.make_node("Transpose", [value], ["out"], perm=[0, 2, 3, 1]))
        else:
            nodes.append(helper.make_node("Identity", [value], ["out"]))
        tensors = {
            "weight": np.asarray(weight, np.float32)[:, :, None, None],
            "bias": np.asarray(bias, np.float32),
            "axis": np.array([1], np.int64),
        }
        graph = helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("image", kinds[dtype], shape)],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, (None,) * (3 if squeeze else 4))],
            [numpy_helper.from_array(value, name) for name, value in tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        path = tmp_path / f"net_{len(list(tmp_path.glob('*.onnx')))}.onnx"
        onnx.save(model, str(path))
        return path

    return write


@pytest.fixture
def package(tmp_path):
    """Write the same as an .mlpackage of 64x96 pixels, with arrays or with an image as its input."""

    def write(weight, bias, *, image=False):
        import coremltools as ct
        from coremltools.converters.mil.mil import Builder as mb

        @mb.program(input_specs=[mb.TensorSpec((1, 3, 64, 96))], opset_version=ct.target.iOS16)
        def program(image):
            kernel = np.asarray(weight, np.float32)[:, :, None, None]
            return mb.conv(x=image, weight=kernel, bias=np.asarray(bias, np.float32), name="out")

        inputs = [ct.ImageType("image", (1, 3, 64, 96))] if image else None
        model = ct.convert(program, inputs=inputs, convert_to="mlprogram", compute_precision=ct.precision.FLOAT32)
        path = tmp_path / f"net{'_image' if image else ''}.mlpackage"
        model.save(str(path))
        return path

    return write


def normalised(pixels, how):
    x = pixels.astype(np.float64)
    return {"imagenet": (x / 255 - MEAN) / STD, "signed": x / 127.5 - 1, "unit": x / 255, "bytes": x}[how]


@pytest.mark.parametrize("how", ["imagenet", "signed", "unit", "bytes"])
@pytest.mark.parametrize(("last", "dtype"), [(False, "float32"), (True, "float32"), (False, "float16")])
def test_the_network_sees_normalised_colours(onnx_file, drawing, how, last, dtype):
    weight = np.random.default_rng(1).normal(size=(4, 3))
    network = open_network(onnx_file(weight, [1, 2, 3, 4], last=last, dtype=dtype))
    expected = np.moveaxis(normalised(drawing, how) @ weight.T + [1, 2, 3, 4], -1, 0)
    error = np.abs(network(drawing, normal=how) - expected).max() / np.abs(expected).max()
    assert error < (1e-6 if dtype == "float32" else 1e-3)  # measured 2e-7, 4e-4


def test_a_network_of_bytes(onnx_file, drawing):
    network = open_network(onnx_file(np.eye(3), np.zeros(3), dtype="uint8", last=True))
    assert np.array_equal(network(drawing, normal="bytes"), np.moveaxis(drawing, -1, 0))


def test_the_margin_of_a_multiple_is_cut_off(onnx_file, drawing):
    network = open_network(onnx_file(np.eye(3), np.zeros(3)))
    assert np.array_equal(network(drawing, normal="bytes", multiple=32), np.moveaxis(drawing, -1, 0))
    coarse = open_network(onnx_file(np.eye(3), np.zeros(3), stride=4))(drawing, normal="bytes", multiple=32)
    assert np.array_equal(coarse, np.moveaxis(drawing[::4, :130:4], -1, 0)[:, :, : round(130 / 4)])


def test_a_network_of_one_size_sees_the_picture_stretched(onnx_file, photograph):
    network = open_network(onnx_file(np.eye(3), np.zeros(3), sides="fixed"))
    seen = network(photograph, normal="bytes")
    assert seen.shape == (3, 64, 96)
    whole = ndimage.zoom(photograph.astype(float), (64 / 300, 96 / 451, 1), order=1, grid_mode=True, mode="nearest")
    assert np.abs(seen - np.moveaxis(whole, -1, 0)).mean() < 8  # measured 4.9: another filter, the same place


def test_a_package_on_our_engine_is_the_same_network(package, onnx_file, photograph):
    weight, bias = np.random.default_rng(2).normal(size=(2, 3)), [0.5, -0.5]
    ours = open_network(package(weight, bias), EngineOptions(engine="portable"))(photograph, normal="unit")
    theirs = open_network(onnx_file(weight, bias, sides="fixed"))(photograph, normal="unit")
    assert np.abs(ours - theirs).max() < 1e-6  # measured 2e-7


def test_depth_is_stretched_over_0_to_255_with_near_white(onnx_file, drawing):
    red = np.array([[2.0, 0, 0]])  # "near" grows with red
    how = {"input": "bytes"}
    made = hint(drawing[:, :128], (128, 96), Preprocess(name="depth", model=onnx_file(red, [7]), settings=how))
    r = drawing[:, :128, 0].astype(float)
    assert np.array_equal(made.pixels, np.rint((r - r.min()) / (r.max() - r.min()) * 255)[..., None].repeat(3, -1))
    metres = Preprocess(name="depth", model=onnx_file(-red, [7]), settings={**how, "near": "low"})
    assert np.array_equal(hint(drawing[:, :128], (128, 96), metres).pixels, made.pixels)
    flat = Preprocess(name="depth", model=onnx_file(0 * red, [7]), settings=how)
    assert not hint(drawing[:, :128], (128, 96), flat).pixels.any()


def test_a_label_map_without_a_channel_axis_is_read(onnx_file, drawing):
    how = Preprocess(name="depth", model=onnx_file(np.array([[1.0, 0, 0]]), [0], squeeze=True))
    assert len(np.unique(hint(drawing[:, :128], (128, 96), how).pixels)) > 2


def test_normals_become_unit_length_colours(onnx_file, drawing):
    pixels = drawing[:, :128]
    signed = Preprocess(name="normal", model=onnx_file(2 * np.eye(3), [0, 0, 0]), settings={"input": "signed"})
    n = pixels / 127.5 - 1
    expected = 127.5 * (n / np.linalg.norm(n, axis=-1, keepdims=True) + 1)
    assert np.abs(hint(pixels, (128, 96), signed).pixels - expected).max() <= 0.5 + 1e-3
    unit = Preprocess(
        name="normal", model=onnx_file(np.eye(3), [0, 0, 0]), settings={"input": "unit", "output": "unit"}
    )
    assert np.abs(hint(pixels, (128, 96), unit).pixels - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda x: 255 * np.clip(x, 0, 1)),
        ({"lines": "dark"}, lambda x: 255 - 255 * np.clip(x, 0, 1)),
        ({"output": "bytes"}, lambda x: np.clip(x, 0, 255)),
        ({"output": "logits"}, lambda x: 255 / (1 + np.exp(-x))),
    ],
)
def test_soft_edges_are_scaled_as_said(onnx_file, drawing, settings, expected):
    pixels = drawing[:, :128]
    how = Preprocess(name="softedge", model=onnx_file(np.array([[0, 3.0, 0]]), [-1]), settings=settings)
    wanted = expected(3.0 * pixels[..., 1] / 255 - 1)
    assert np.abs(hint(pixels, (128, 96), how).pixels[..., 0] - wanted).max() <= 0.5 + 1e-4


def test_segments_have_the_colours_of_ade20k(onnx_file, drawing):
    pixels = drawing[:, :128]
    weight = np.random.default_rng(3).normal(size=(150, 3))
    logits = normalised(pixels, "imagenet") @ weight.T
    how = Preprocess(name="segment", model=onnx_file(weight, np.zeros(150)))
    assert np.array_equal(hint(pixels, (128, 96), how).pixels, ADE20K[logits.argmax(axis=-1)])
    assert len(np.unique(logits.argmax(axis=-1))) >= 3


def test_segments_from_classes(onnx_file):
    classes = np.repeat(np.arange(150, dtype=np.uint8).reshape(10, 15), 8, axis=0).repeat(8, axis=1)
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[..., 0] = classes
    how = Preprocess(name="segment", model=onnx_file([[1, 0, 0]], [0]), settings={"input": "bytes"})
    assert np.array_equal(hint(pixels, (120, 80), how).pixels, ADE20K[classes])
    with pytest.raises(EngineError, match="classes from 1 to 150, expected whole numbers from 0 to 149"):
        hint(
            pixels,
            (120, 80),
            Preprocess(name="segment", model=onnx_file([[1, 0, 0]], [1]), settings={"input": "bytes"}),
        )


def test_the_palette_is_150_colours_in_their_order():
    assert ADE20K.shape == (150, 3)
    known = {0: (120, 120, 120), 2: (6, 230, 230), 12: (150, 5, 61), 21: (61, 230, 250), 149: (92, 0, 255)}
    assert {index: tuple(int(v) for v in ADE20K[index]) for index in known} == known  # wall, sky, person, water, flag
    assert len({tuple(c) for c in ADE20K}) == 149  # classes 6 and 48 are both (140, 140, 140), by their authors


def test_networks_that_do_not_fit_are_refused(onnx_file, tmp_path, drawing):
    with pytest.raises(RequestError, match="expected a network as FILE"):
        open_network(tmp_path / "depth.pth")
    with pytest.raises(RequestError, match="no such file"):
        open_network(tmp_path / "depth.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"bad\.onnx: onnxruntime cannot load it"):
        open_network(tmp_path / "bad.onnx")
    three = onnx_file(np.eye(3), np.zeros(3))
    with pytest.raises(EngineError, match="its output has 3 channels, expected one"):
        hint(drawing, (64, 64), Preprocess(name="depth", model=three))
    two = onnx_file(np.ones((2, 3)), np.zeros(2))
    with pytest.raises(EngineError, match="2 channels, expected 3: the normal's x, y and z"):
        hint(drawing, (64, 64), Preprocess(name="normal", model=two))
    with pytest.raises(EngineError, match="its output holds NaN or infinity"):
        hint(drawing, (64, 64), Preprocess(name="depth", model=onnx_file([[np.inf, 0, 0]], [0])))


def test_inputs_that_are_no_picture_are_refused(tmp_path):
    network = Network("n", (1, 3, None, None), "float32", lambda batch: batch.sum(axis=(1, 2, 3)))
    with pytest.raises(EngineError, match=r"its output has shape \(1,\)"):
        network(np.zeros((8, 8, 3), np.uint8), normal="unit")


def test_without_onnxruntime_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "depth.onnx").touch()
    with pytest.raises(MissingDependency, match=r"pip install 'glassine\[onnx\]'"):
        open_network(tmp_path / "depth.onnx")


def test_a_package_with_an_image_input_is_core_mls(package, drawing, monkeypatch):
    path = package([[1, 0, 0]], [0], image=True)
    if sys.platform != "darwin":
        with pytest.raises(EngineError, match='input "image" is an image, which only Core ML on a Mac takes'):
            open_network(path)

    class Stub:
        """Stands where coremltools' model is on a Mac: a PIL image in, here (height, width) of it out."""

        def __init__(self, path):
            pass

        def predict(self, inputs):
            pixels = np.asarray(inputs["image"])
            assert pixels.shape == (64, 96, 3)
            assert pixels.dtype == np.uint8
            return {"out": pixels[None, None, ..., 0].astype(np.float32)}

    import coremltools.models

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", Stub)
    pixels = np.ascontiguousarray(drawing[:64, :96])
    assert np.array_equal(open_network(path)(pixels, normal="imagenet"), pixels[None, ..., 0])
