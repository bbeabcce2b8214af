"""Reading packages: what is read is what was written, and nothing a package says is believed unchecked."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.optimize import _utils as reference

from glassine.errors import EngineError, PackageError
from glassine.runtime.engine.portable import proto
from glassine.runtime.engine.portable.executor import PortableEngine
from glassine.runtime.engine.portable.program import read_package
from glassine.runtime.engine.portable.summary import summarise
from glassine.runtime.engine.portable.weights import WeightFile, unpack_bits

X = np.ones((2, 3, 8, 8), np.float32)
W = np.arange(5 * 3 * 3 * 3, dtype=np.float32).reshape(5, 3, 3, 3)


@pytest.fixture
def convolution(package):
    return package(lambda x: mb.conv(x=x, weight=W, bias=np.arange(5, dtype=np.float32), name="my_conv"), x=X)


def model_file(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def weight_file(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def rewrite(package: Path, change) -> None:
    model = proto.load().Model()
    model.ParseFromString(model_file(package).read_bytes())
    (function,) = model.mlProgram.functions.values()
    change(model, function, function.block_specializations[function.opset])
    model_file(package).write_bytes(model.SerializeToString())


def test_reading_imports_neither_coremltools_nor_torch(python, convolution):
    program = """
import sys
from glassine.runtime.engine.portable.program import read_package
from glassine.runtime.engine.portable.summary import summarise
summary = summarise(read_package(sys.argv[1]))
print(summary.operations["conv"], {"torch", "coremltools"} & set(sys.modules))
import coremltools.proto.Model_pb2
from glassine.runtime.engine.portable import proto
assert coremltools.proto.Model_pb2.Model is proto.load().Model  # the two meet in one process
"""
    assert python(program, convolution) == "1 set()\n"


def test_a_package_reads_as_written(convolution):
    program = read_package(convolution)
    function = program.function()
    (conv,) = [op for op in function.body.operations if op.type == "conv"]
    constants = {op.outputs[0].name: op.attributes["val"] for op in function.body.operations if op.type == "const"}
    assert conv.name == "my_conv"
    assert conv.outputs[0].type.shape == (2, 5, 6, 6)
    weight = constants[conv.inputs["weight"][0]]
    assert weight.file is not None
    np.testing.assert_array_equal(weight.array(), W)
    assert str(constants[conv.inputs["pad_type"][0]].array()) == "valid"
    assert [(f.name, f.shape, f.dtype) for f in function.inputs] == [("x", X.shape, "float32")]


def test_an_unknown_function_is_named(convolution):
    with pytest.raises(EngineError, match=r"no function 'other'; it has \['main'\]"):
        PortableEngine(convolution, function="other")


def test_summary_counts(package):
    def build(x, y):
        h = mb.conv(x=x, weight=W, bias=np.arange(5, dtype=np.float32), pad_type="same")
        h = mb.matmul(x=mb.reshape(x=h, shape=[2, 5, 64]), y=y)
        return mb.scaled_dot_product_attention(query=h, key=h, value=h)

    summary = summarise(read_package(package(build, x=X, y=np.ones((2, 64, 7), np.float32))))
    assert summary.operations == {
        "conv": 1,
        "reshape": 1,
        "matmul": 1,
        "scaled_dot_product_attention": 1,
        "identity": 1,
    }
    assert summary.parameters == W.size + 5
    convolved, multiplied, attended = 2 * 5 * 64 * 27, 2 * 5 * 7 * 64, 2 * 5 * 5 * (7 + 7)
    assert summary.flops == 2 * (convolved + multiplied + attended)
    assert summary.unsized == 0
    assert summary.weight_bytes["float32"] == (W.size + 5) * 4
    assert summary.precision == "float32"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_bits_unpack_as_coremltools_packs_them(bits, count):
    elements = np.random.default_rng(bits * count).integers(0, 2**bits, count).astype(np.uint8)
    packed = reference.pack_elements_into_bits(elements, bits)
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), elements)


def test_signed_nibbles():
    elements = np.arange(-8, 8).astype(np.int8)
    packed = reference.pack_elements_into_bits(elements, 4)
    np.testing.assert_array_equal(unpack_bits(packed, 4, 16, signed=True), elements)


# What a damaged or hostile package may say, and what the answer must contain.
def point_outside(model, function, block):
    value = next(op.attributes["val"] for op in block.operations if op.attributes["val"].HasField("blobFileValue"))
    value.blobFileValue.offset = 1 << 40


def misalign(model, function, block):
    value = next(op.attributes["val"] for op in block.operations if op.attributes["val"].HasField("blobFileValue"))
    value.blobFileValue.offset += 4


def claim_more(model, function, block):
    value = next(op.attributes["val"] for op in block.operations if op.attributes["val"].HasField("blobFileValue"))
    value.type.tensorType.dimensions[0].constant.size = 1 << 40


def claim_another_dtype(model, function, block):
    value = next(op.attributes["val"] for op in block.operations if op.attributes["val"].HasField("blobFileValue"))
    value.type.tensorType.dataType = 10


def leave_the_package(model, function, block):
    value = next(op.attributes["val"] for op in block.operations if op.attributes["val"].HasField("blobFileValue"))
    value.blobFileValue.fileName = "@model_path/../../../../etc/passwd"


def read_an_absolute_path(model, function, block):
    value = next(op.attributes["val"] for op in block.operations if op.attributes["val"].HasField("blobFileValue"))
    value.blobFileValue.fileName = "/etc/passwd"


def name_no_file(model, function, block):
    value = next(op.attributes["val"] for op in block.operations if op.attributes["val"].HasField("blobFileValue"))
    value.blobFileValue.fileName = "@model_path/weights/other.bin"


def read_before_it_is_made(model, function, block):
    conv = next(op for op in block.operations if op.type == "conv")
    conv.inputs["x"].arguments[0].name = "nobody"


def return_what_nobody_makes(model, function, block):
    block.outputs[0] = "nobody"


def shorten_a_literal(model, function, block):
    value = next(
        op.attributes["val"] for op in block.operations if len(op.attributes["val"].type.tensorType.dimensions)
    )
    value.immediateValue.tensor.ints.values.append(3)


def forget_the_block(model, function, block):
    function.opset = "CoreML99"


DAMAGE = [
    (point_outside, PackageError, "is not inside the file of"),
    (misalign, PackageError, "is not inside the file of"),
    (claim_more, PackageError, "expected .* for float32"),
    (claim_another_dtype, PackageError, "dtype code 2, expected 0xdeadbeef and 1"),
    (leave_the_package, PackageError, "expected '@model_path/weights/weight.bin'"),
    (read_an_absolute_path, PackageError, "expected '@model_path/weights/weight.bin'"),
    (name_no_file, PackageError, "weights/other.bin is missing"),
    (read_before_it_is_made, PackageError, "reads 'nobody' as 'x', which nothing before it computes"),
    (return_what_nobody_makes, PackageError, r"nothing computes the outputs \['nobody'\]"),
    (shorten_a_literal, PackageError, "is damaged"),
    (forget_the_block, PackageError, "no block for its opset 'CoreML99'"),
]


@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*case, id=case[0].__name__) for case in DAMAGE])
def test_damage_is_refused(convolution, change, error, message):
    rewrite(convolution, change)
    with pytest.raises(error, match=message):
        PortableEngine(convolution)


def test_records_that_lie_are_refused(convolution):
    path = weight_file(convolution)
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 64 + 16, len(data))  # the first record's data start: beyond the end
    path.write_bytes(data)
    with pytest.raises(PackageError, match=r"points to bytes \d+ to \d+ of a file of"):
        PortableEngine(convolution)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\0" * 4096])
def test_files_that_are_no_weights_are_refused(tmp_path, content):
    path = tmp_path / "weight.bin"
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"cannot be read|not a Core ML weight file of version 2"):
        WeightFile(path)


def test_a_truncated_weight_file_is_refused(convolution):
    path = weight_file(convolution)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PackageError, match="of a file of 200"):
        PortableEngine(convolution)


def test_weights_behind_a_link_out_of_the_package_are_refused(convolution, tmp_path):
    path = weight_file(convolution)
    shutil.move(path, tmp_path / "elsewhere.bin")
    path.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(PackageError, match="outside the package; do not use this package"):
        PortableEngine(convolution)


def test_a_manifest_that_leaves_the_package_is_refused(convolution, tmp_path):
    (tmp_path / "evil.mlmodel").write_bytes(model_file(convolution).read_bytes())
    manifest = json.loads((convolution / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../evil.mlmodel"
    (convolution / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match="outside the package"):
        read_package(convolution)


def test_what_is_no_model_is_refused(convolution):
    model_file(convolution).write_bytes(b"\xff" * 100)
    with pytest.raises(PackageError, match="not a Core ML model"):
        read_package(convolution)
    with pytest.raises(PackageError, match="not a model package"):
        read_package(convolution / "Data")
    with pytest.raises(EngineError, match=r"expected an ML Program in an \.mlpackage folder, got a single file"):
        read_package(model_file(convolution))


def test_another_kind_of_model_is_refused(convolution):
    rewrite(convolution, lambda model, function, block: model.neuralNetwork.SetInParent())
    with pytest.raises(EngineError, match="expected an ML Program, got neuralNetwork"):
        read_package(convolution)


def test_constants_know_their_size(convolution):
    sizes = {
        op.name: op.attributes["val"].stored_bytes
        for op in read_package(convolution).function().body.operations
        if op.type == "const"
    }
    assert W.nbytes in sizes.values()


def give_an_axis_two_values(model, function, block):
    strides = next(op for op in block.operations if op.outputs and op.outputs[0].name.endswith("groups_0"))
    tensor = strides.attributes["val"]
    tensor.type.tensorType.rank = 1
    tensor.type.tensorType.dimensions.add().constant.size = 2
    tensor.immediateValue.tensor.ints.values.append(1)


def test_parameters_of_a_wrong_form_are_refused(convolution):
    rewrite(convolution, give_an_axis_two_values)
    with pytest.raises(PackageError, match=r"operation 'my_conv' \(conv\): its parameter 'groups' is no int"):
        PortableEngine(convolution)


def test_palettes_with_too_few_indices_are_refused(package):
    def build(x):
        indices = np.zeros(48, np.uint8)
        return mb.mul(
            x=x, y=mb.constexpr_lut_to_dense(indices=indices, lut=W.ravel()[:16], shape=np.array([96], np.uint32))
        )

    path = package(build, opset=ct.target.iOS16, x=np.ones(96, np.float32))

    def claim_a_terabyte(model, function, block):
        op = next(op for op in block.operations if op.type == "constexpr_lut_to_dense")
        op.attributes["shape"].immediateValue.tensor.bytes.values = np.array([2**31], np.uint32).tobytes()

    PortableEngine(path)
    rewrite(path, claim_a_terabyte)
    with pytest.raises(PackageError, match="48 bytes cannot hold 2147483648 elements of 4 bits"):
        PortableEngine(path)
