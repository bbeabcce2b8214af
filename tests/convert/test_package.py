"""The package writer: every byte of weight.bin, and that a conversion is complete or did not happen."""

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

from glassine.convert import package as package_module
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.names import Source
from glassine.convert.package import replacing, write_package
from glassine.convert.program import Description, Plan, Requests, Weight, lower
from glassine.convert.weights import Arrays, FileWeights
from glassine.errors import CheckpointError, ConversionError, PackageError
from glassine.models import mil as mb
from glassine.models.layers import build

rng = np.random.default_rng(0)
SHAPES = {"conv.weight": (16, 4, 3, 3), "conv.bias": (16,), "norm.weight": (16,), "out.weight": (5, 16), "tiny": (4,)}
ARRAYS = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def network(weights, scale=1.0):
    def body(x):
        y = mb.conv(x=x, weight=weights("conv.weight", (16, 4, 3, 3)), bias=weights("conv.bias", (16,)))
        beta = np.linspace(0, 1, 16, dtype=np.float16)
        y = mb.layer_norm(x=y, axes=[1], gamma=weights("norm.weight", (16,)), beta=beta, epsilon=np.float16(1e-5))
        y = mb.conv(x=y, weight=weights("out.weight", (5, 16, 1, 1), scale=scale))
        y = mb.mul(x=mb.slice_by_index(x=y, begin=[0, 0, 0, 0], end=[1, 4, 6, 6]), y=weights("tiny", (1, 4, 1, 1)))
        return {"y": y}

    return build({"x": ((1, 4, 8, 8), np.float16)}, body)


@pytest.fixture(scope="module")
def lowered():
    return lower(network(Requests(SHAPES)), Description(author="A", summary="S", features={"x": "X"}))


def blob(path: Path) -> bytes:
    return (path / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_weight_bin_is_what_coremltools_own_writer_writes(lowered, tmp_path):
    write_package(tmp_path / "a.mlpackage", lowered, Arrays(ARRAYS))
    writer = _BlobStorageWriter(str(tmp_path / "theirs.bin"))
    for record in lowered.plan.records:
        if isinstance(record.content, Weight):
            half = ARRAYS[record.content.name].astype(np.float16).reshape(-1)
        else:
            half = np.frombuffer(record.content, np.float16)
        assert writer.write_fp16_data(half.view(np.uint16)) == record.offset
    del writer
    assert blob(tmp_path / "a.mlpackage") == (tmp_path / "theirs.bin").read_bytes()


def test_every_weight_goes_to_the_file_and_constants_do_as_in_coremltools(lowered):
    contents = [record.content for record in lowered.plan.records]
    assert [c.name for c in contents if isinstance(c, Weight)] == list(SHAPES)
    assert [c for c in contents if isinstance(c, bytes)] == [np.linspace(0, 1, 16, dtype=np.float16).tobytes()]
    assert lowered.plan.parameters == sum(array.size for array in ARRAYS.values())


def test_coremltools_loads_the_package_and_finds_the_weights(lowered, tmp_path):
    path = tmp_path / "a.mlpackage"
    write_package(path, lowered, Arrays(ARRAYS))
    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    assert spec == ct.utils.load_spec(str(path))
    assert (spec.description.metadata.author, spec.description.metadata.shortDescription) == ("A", "S")
    assert spec.description.input[0].shortDescription == "X"
    reader = _BlobStorageReader(str(path / "Data/com.apple.CoreML/weights/weight.bin"))
    for record, weight in lowered.plan.weights():
        stored = np.array(reader.read_fp16_data(record.offset), np.uint16).view(np.float16)
        np.testing.assert_array_equal(stored, ARRAYS[weight.name].astype(np.float16).reshape(-1))
    assert lowered.inputs == {"x": ((1, 4, 8, 8), "float16")}
    assert lowered.outputs == {"y": ((1, 4, 6, 6), "float32")}


def test_the_reloaded_program_holds_the_weights(lowered, tmp_path):
    from coremltools.converters.mil.frontend.milproto.load import load

    path = tmp_path / "a.mlpackage"
    write_package(path, lowered, Arrays(ARRAYS))
    spec = ct.utils.load_spec(str(path))
    weights_dir = str(path / "Data/com.apple.CoreML/weights")
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights_dir)
    convs = program.functions["main"].find_ops(op_type="conv")
    np.testing.assert_array_equal(convs[0].weight.val, ARRAYS["conv.weight"].astype(np.float16))
    np.testing.assert_array_equal(convs[1].weight.val[:, :, 0, 0], ARRAYS["out.weight"].astype(np.float16))


def test_the_model_is_the_one_coremltools_would_make(oracle):
    program = network(Requests(SHAPES))
    lowered = lower(program)
    assert (oracle.read(lowered.model), lowered.plan) == oracle.exported(program)


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_package(tmp_path / f"{name}.mlpackage", lower(network(Requests(SHAPES))), Arrays(ARRAYS))
    assert tree(tmp_path / "a.mlpackage") == tree(tmp_path / "b.mlpackage")


TORCH = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@pytest.mark.parametrize("scale", [1.0, 40**-0.5])
@pytest.mark.parametrize("dtype", TORCH)
def test_every_source_dtype_is_stored_as_torch_casts_it(checkpoints, tmp_path, monkeypatch, dtype, scale):
    monkeypatch.setattr(package_module, "_CHUNK", 128)  # several pieces per tensor, and a rest
    path = checkpoints.write_safetensors(tmp_path / "m.safetensors", ARRAYS, dtype=dtype)
    checkpoint = open_checkpoint(path)
    weights = FileWeights(checkpoint, {name: Source(name) for name in SHAPES})
    out = tmp_path / "a.mlpackage"
    plan = lower(network(Requests(weights.shapes), scale)).plan
    write_package(out, lower(network(Requests(weights.shapes), scale)), weights)
    data = blob(out)
    for record, weight in plan.weights():
        tensor = checkpoint.tensors[weight.name]
        raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        source = torch.frombuffer(bytearray(raw), dtype=TORCH[dtype])
        if weight.scale != 1.0:
            source = source.float() * torch.tensor(weight.scale, dtype=torch.float32)
        expected = source.to(torch.float16).numpy().tobytes()
        assert data[record.data_offset : record.data_offset + record.nbytes] == expected, weight


def test_thirds_of_a_stacked_matrix_and_a_transposed_one(checkpoints, tmp_path):
    stacked = rng.normal(size=(12, 5)).astype(np.float16)
    path = checkpoints.write_safetensors(tmp_path / "m.safetensors", {"qkv": stacked, "p": stacked})
    table = {letter: Source("qkv", third=i) for i, letter in enumerate("qkv")} | {"p": Source("p", transposed=True)}
    weights = FileWeights(open_checkpoint(path), table)
    assert dict(weights.shapes) == {"q": (4, 5), "k": (4, 5), "v": (4, 5), "p": (5, 12)}
    for i, letter in enumerate("qkv"):
        np.testing.assert_array_equal(weights.read(letter, 0, 20), stacked[4 * i : 4 * i + 4].reshape(-1))
        span = weights.span(letter)
        assert path.read_bytes()[span.offset : span.offset + span.nbytes] == stacked[4 * i : 4 * i + 4].tobytes()
    assert weights.span("p") is None
    np.testing.assert_array_equal(weights.read("p", 7, 60), stacked.T.reshape(-1)[7:])


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(checkpoints, tmp_path, lowered, dtype, value):
    arrays = {name: array.copy() for name, array in ARRAYS.items()}
    arrays["conv.weight"][7, 2, 1, 0] = value
    path = checkpoints.write_safetensors(tmp_path / "m.safetensors", arrays, dtype=dtype)
    weights = FileWeights(open_checkpoint(path), {name: Source(name) for name in SHAPES})
    with pytest.raises(ConversionError) as caught:
        write_package(tmp_path / "a.mlpackage", lowered, weights)
    assert f'm.safetensors: tensor "conv.weight": the value at (7, 2, 1, 0) is {value}' in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (65520.0, False), (-7e4, False), (65504.0, True)])
def test_fp16_overflow_is_named(tmp_path, lowered, value, fits):
    arrays = ARRAYS | {"out.weight": np.full((5, 16), 1.0, np.float32)}
    arrays["out.weight"][3, 11] = value
    if fits:
        return write_package(tmp_path / "a.mlpackage", lowered, Arrays(arrays))
    with pytest.raises(ConversionError, match=r"memory: tensor \"out.weight\": the value .* at \(3, 11\) is outside"):
        write_package(tmp_path / "a.mlpackage", lowered, Arrays(arrays))
    return None


def test_a_value_that_only_the_scale_makes_too_large(tmp_path):
    arrays = ARRAYS | {"out.weight": np.full((5, 16), 60000.0, np.float32)}
    with pytest.raises(ConversionError, match=r"the value 60000 x 2.0 at \(0, 0\)"):
        write_package(tmp_path / "a.mlpackage", lower(network(Requests(SHAPES), 2.0)), Arrays(arrays))


def test_a_float32_record_keeps_float32(tmp_path):
    def linear(x):
        weight = Requests(SHAPES)("out.weight", (5, 16), dtype=np.float32)
        return {"y": mb.linear(x=x, weight=weight, bias=np.zeros(5, np.float32))}

    made = lower(build({"x": ((1, 16), np.float32)}, linear))
    write_package(tmp_path / "a.mlpackage", made, Arrays(ARRAYS))
    (record, _) = next(made.plan.weights())
    assert blob(tmp_path / "a.mlpackage")[record.data_offset : made.plan.file_size].startswith(
        ARRAYS["out.weight"].tobytes()
    )


def test_requests_name_everything_that_does_not_fit():
    requests = Requests({"a": (4, 3, 1, 1), "b": (4,)})
    requests("a", (4, 3))
    requests("b", (5,))
    requests("c", (1,))
    with pytest.raises(ConversionError, match=r"m: 1 weights are missing: c \(1,\)"):
        requests.check("m")
    with pytest.raises(ConversionError, match="asks for this weight twice"):
        requests("a", (4, 3))
    misshapen = Requests({"b": (4,)})
    misshapen("b", (5,))
    with pytest.raises(ConversionError, match=r"b is \(4,\), expected \(5,\)"):
        misshapen.check("m")


def test_a_folded_weight_is_refused():
    def fold(weights, change):
        def linear(x):
            weight = change(weights("out.weight", (5, 16)))
            return {"y": mb.linear(x=x, weight=weight, bias=np.zeros(5, np.float16))}

        return build({"x": ((1, 16), np.float16)}, linear)

    with pytest.raises(ConversionError, match="would fold a weight"):
        lower(fold(Requests(), lambda w: mb.mul(x=w, y=np.float16(2))))
    with pytest.raises(ConversionError, match="a weight was changed before it reached the graph"):
        lower(fold(Requests(), lambda w: w * np.float16(2)))
    with pytest.raises(ConversionError, match="a weight was changed before it reached the graph"):
        lower(fold(Requests(), lambda w: w[::-1]))
    assert lower(fold(Requests(), lambda w: w.reshape(16, 5).reshape(5, 16))).plan.parameters == 80


def test_a_plan_shares_equal_literals_and_aligns_records():
    plan = Plan()
    first = plan.place(b"abc", (3,), "uint8")
    assert (first, plan.place(b"abc", (3,), "uint8"), plan.place(b"abd", (3,), "uint8")) == (64, 64, 192)
    assert plan.file_size == 192 + 64 + 3


# Complete or not at all.


class Fails(Arrays):
    """Weights that stop in the middle."""

    def __init__(self, error):
        super().__init__(ARRAYS)
        self.error = error

    def read(self, name, start, stop):
        if name == "out.weight":
            raise self.error
        return super().read(name, start, stop)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), PackageError),
        (CheckpointError("the file became shorter"), CheckpointError),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_what_was_there(lowered, tmp_path, error, raised, existing):
    path = tmp_path / "a.mlpackage"
    if existing:
        write_package(path, lowered, Arrays(ARRAYS))
    before = tree(tmp_path)
    with pytest.raises(raised, match="No space left on device" if raised is PackageError else None):
        write_package(path, lowered, Fails(error), overwrite=True)
    assert tree(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["a.mlpackage"] if existing else [])


STEPS = ["mkdir", "rename", "write_bytes", "write_text", "rmtree", "pwrite", "ftruncate"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_call_leaves_a_whole_package_or_none(lowered, tmp_path, monkeypatch, step, error, existing):
    """Every call of every kind that writes fails once; the old package or the new one is there then, whole."""
    path = tmp_path / "out" / "a.mlpackage"
    old = lower(network(Requests(SHAPES)), Description(author="old"))
    write_package(tmp_path / "old.mlpackage", old, Arrays(ARRAYS))
    write_package(tmp_path / "new.mlpackage", lowered, Arrays(ARRAYS))
    whole = [tree(tmp_path / "new.mlpackage"), tree(tmp_path / "old.mlpackage") if existing else {}]
    owner = {"rmtree": shutil, "pwrite": os, "ftruncate": os}.get(step, Path)
    real = getattr(owner, step)
    for victim in range(60):
        path.parent.mkdir(exist_ok=True)
        if existing:
            shutil.copytree(tmp_path / "old.mlpackage", path)
        count = 0

        def fails(*args, victim=victim, **kwargs):
            nonlocal count
            count += 1
            if count == victim + 1:
                raise error
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, fails)
            with contextlib.suppress(KeyboardInterrupt, PackageError):
                write_package(path, lowered, Arrays(ARRAYS), overwrite=True)
        assert tree(path) in whole
        if step != "rmtree":  # where cleaning up was the victim, the next conversion cleans up
            assert {entry.name for entry in path.parent.iterdir()} <= {"a.mlpackage"}
        shutil.rmtree(path.parent)
        if count <= victim:
            break  # every call has been the victim once
    assert count <= victim


def test_a_conversion_killed_between_the_renames_is_undone(tmp_path):
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "old").write_text("old")
    (tmp_path / ".a.partial" / "x").mkdir(parents=True)
    with contextlib.suppress(RuntimeError), replacing(tmp_path / "a", overwrite=True) as fresh:
        assert list(fresh.iterdir()) == []
        assert (tmp_path / "a" / "old").read_text() == "old"
        raise RuntimeError
    assert tree(tmp_path) == {"a/old": b"old"}


def test_two_conversions_to_one_place(tmp_path):
    with (
        replacing(tmp_path / "a", overwrite=False),
        pytest.raises(PackageError, match="another conversion is writing here"),
        replacing(tmp_path / "a", overwrite=False),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_conversion_left_is_removed(lowered, tmp_path):
    left = tmp_path / ".a.mlpackage.partial"
    (left / "Data").mkdir(parents=True)
    (left / "Data" / "half").write_text("x")
    lock = os.open(left, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.close(lock)  # as the end of its process does
    write_package(tmp_path / "a.mlpackage", lowered, Arrays(ARRAYS))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mlpackage"]
    assert "Data/half" not in tree(tmp_path / "a.mlpackage")


def test_an_existing_package_is_refused_without_overwrite(lowered, tmp_path):
    write_package(tmp_path / "a.mlpackage", lowered, Arrays(ARRAYS))
    with pytest.raises(PackageError, match="--overwrite"):
        write_package(tmp_path / "a.mlpackage", lowered, Arrays(ARRAYS))


def test_something_else_is_never_replaced(lowered, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    with pytest.raises(PackageError, match="is no model package, so it is not replaced"):
        write_package(tmp_path / "photos", lowered, Arrays(ARRAYS), overwrite=True)
    assert (tmp_path / "photos" / "cat.png").read_text() == "cat"


def test_a_full_disk_is_refused_before_anything_is_written(lowered, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(PackageError, match=r"GB are needed here and 0\.00 GB are free"):
        write_package(tmp_path / "a.mlpackage", lowered, Arrays(ARRAYS))
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_is_noticed(checkpoints, tmp_path, lowered):
    path = checkpoints.write_safetensors(tmp_path / "m.safetensors", ARRAYS, dtype="F16")
    weights = FileWeights(open_checkpoint(path), {name: Source(name) for name in SHAPES})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="the file became shorter while it was read"):
        write_package(tmp_path / "a.mlpackage", lowered, weights)
