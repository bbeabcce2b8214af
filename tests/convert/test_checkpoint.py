"""The header reader: what it accepts equals what the format's own library accepts, and every refusal says why."""

import json
import pickle
import struct

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassine.convert.checkpoint import open_checkpoint, read_header
from glassine.errors import CheckpointError


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F16", shape=(2,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name: str = "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_tensors_and_metadata_are_read_as_they_stand(write):
    header = {"__metadata__": {"a": "b"}, "x": entry(shape=[1, 2], offsets=[4, 8]), "y": entry("F32", [1], [0, 4])}
    path = write(raw(header, bytes(8)))
    tensors, metadata = read_header(path)
    data = path.stat().st_size - 8
    assert metadata == {"a": "b"}
    assert {t.key: (t.dtype, t.shape, t.offset, t.nbytes) for t in tensors.values()} == {
        "x": ("F16", (1, 2), data + 4, 4),
        "y": ("F32", (1,), data, 4),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file, or truncated"),
        (b"\x05", "not a safetensors file, or truncated"),
        (struct.pack("<Q", 1 << 62) + b"{}", "header of 4611686018427387904 bytes and has 10 bytes in all"),
        (struct.pack("<Q", 100) + b'{"x": 1', "header of 100 bytes and has 15 bytes"),
        (raw(b"[1, 2]"), "not a safetensors file"),
        (raw(b'{"x": '), "not JSON"),
        (raw(b'{"\xff": 1}'), "not JSON"),
        (raw(b'{"a":' + b"[" * 100_000), "not JSON"),
        (raw(b'{"x": {}, "x": {}}'), '"x" stands there twice'),
        (raw({"x": 3}), 'tensor "x" has no dtype, shape and data_offsets'),
        (raw({"x": {"dtype": "F16", "shape": [2]}}), "has no dtype, shape and data_offsets"),
        (raw({"x": entry("F17")}), "unknown dtype 'F17'"),
        (raw({"x": entry(["F16"])}), "unknown dtype"),
        (raw({"x": entry(shape=[-2])}), "shape [-2]"),
        (raw({"x": entry(shape=[2.0])}), "shape [2.0]"),
        (raw({"x": entry(shape=[True])}), "shape [True]"),
        (raw({"x": entry(shape=[1 << 70])}), "shape [1180591620717411303424]"),
        (raw({"x": entry(offsets=[4, 0])}), "data_offsets [4, 0]"),
        (raw({"x": entry(offsets=[0, 4, 8])}), "data_offsets [0, 4, 8]"),
        (raw({"x": entry(offsets=[-4, 0])}), "data_offsets [-4, 0]"),
        (raw({"x": entry(shape=[3])}, bytes(4)), "needs 6 bytes, its data_offsets [0, 4] hold 4"),
        (raw({"x": entry()}, bytes(2)), "(2 are missing); download it again"),
        (raw({"x": entry()}, bytes(6)), "2 bytes behind the last tensor belong to none"),
        (raw({"x": entry(), "y": entry(offsets=[2, 6])}, bytes(6)), 'tensor "y" overlaps "x"'),
        (raw({"x": entry(), "y": entry(offsets=[8, 12])}, bytes(12)), 'tensor "y" leaves a gap behind "x"'),
        (raw({"__metadata__": {"a": 1}}), "__metadata__ is not a map of strings"),
        (raw({"__metadata__": []}), "__metadata__ is not a map of strings"),
    ],
)
def test_a_bad_header_is_refused_and_says_why(write, content, message):
    path = write(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["zip", "legacy", "plain"])
def test_a_pickle_is_refused_by_content_and_never_opened(tmp_path, name):
    path = tmp_path / "model.safetensors"  # whatever it calls itself
    if name == "plain":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=name == "zip")
    with pytest.raises(CheckpointError, match=r"pickle.*can run any program.*\.safetensors version") as caught:
        open_checkpoint(path)
    assert "--allow-pickle" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    ],
)
def test_things_that_downloads_leave_are_named(write, content, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(content))


@pytest.mark.parametrize("length", [60, 640, 1152])  # 60 is "<", 640 begins like a pickle of protocol 2, 1152 of 4
def test_a_header_whose_length_looks_like_another_format_is_read(write, length):
    text = json.dumps({"x": entry(shape=[0], offsets=[0, 0])}).encode()
    assert read_header(write(raw(text + b" " * (length - len(text)))))[0]["x"].nbytes == 0


def test_a_missing_file_and_an_empty_folder_say_what_was_expected(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="expected a diffusers folder"):
        open_checkpoint(tmp_path)


headers = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]),
    st.one_of(
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F16", "F32", "U8", "BF16", "X"]),
                "shape": st.lists(st.integers(0, 4), max_size=2),
                "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2),
            }
        ),
        st.integers(),
        st.dictionaries(st.sampled_from(["dtype", "shape", "k"]), st.text(max_size=3)),
    ),
    max_size=3,
)


@settings(max_examples=400, deadline=None)
@given(header=headers, size=st.integers(0, 24), cut=st.integers(0, 30))
def test_any_header_is_read_as_the_library_reads_it_or_refused(header, size, cut, tmp_path_factory):
    content = raw(header, bytes(size))
    content = content[: len(content) - cut] if cut > 25 else content
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        with safetensors.safe_open(path, "np") as theirs:
            expected = {key: tuple(theirs.get_slice(key).get_shape()) for key in theirs.keys()}  # noqa: SIM118
    except Exception:  # its errors are of several kinds
        expected = None
    try:
        ours = {key: tensor.shape for key, tensor in read_header(path)[0].items()}
    except CheckpointError:
        ours = None
    assert ours == expected


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=80))
def test_any_bytes_are_read_or_refused_with_our_error(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(content)
    try:
        tensors, _ = read_header(path)
    except CheckpointError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(content) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F32", torch.float32),
        ("F64", torch.float64),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
    ],
)
def test_every_code_of_a_dtype_decodes_as_torch_decodes_it(write, dtype, torch_dtype):
    size = torch.empty(0, dtype=torch_dtype).element_size()
    if size <= 2:
        data = np.arange(256**size, dtype=f"<u{size}").tobytes()
    else:
        data = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    count = len(data) // size
    tensors, _ = read_header(write(raw({"x": entry(dtype, [count], [0, len(data)])}, data)))
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the codes
        ours = tensors["x"].read().astype(np.float64)
    theirs = torch.frombuffer(bytearray(data), dtype=torch_dtype).double().numpy()
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs))
    np.testing.assert_array_equal(tensors["x"].read(5, 9), tensors["x"].read()[5:9])


def test_integers_are_no_weights(write):
    tensors, _ = read_header(write(raw({"x": entry("I8", [4])}, bytes(4))))
    with pytest.raises(CheckpointError, match="has dtype I8, expected one of F16"):
        tensors["x"].read()


def shard(folder, name, keys, value=0):
    header = {key: entry(offsets=[4 * i, 4 * i + 4]) for i, key in enumerate(keys)}
    (folder / name).write_bytes(raw(header, bytes([value]) * 4 * len(keys)))


@pytest.fixture
def sharded(tmp_path):
    unet = tmp_path / "unet"
    unet.mkdir()
    shard(unet, "one.safetensors", ["a", "b"])
    shard(unet, "two.safetensors", ["c"])
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}

    def write_index(**changes):
        index = {"metadata": {}, "weight_map": weight_map | changes}
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return write_index


def test_shards_are_one_part(sharded):
    checkpoint = open_checkpoint(sharded())
    assert sorted(checkpoint.tensors) == ["unet/a", "unet/b", "unet/c"]
    assert [path.name for path in checkpoint.files] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": "two.safetensors"}, "promises d, no shard holds them"),
        ({"c": "../two.safetensors"}, 'names the shard "../two.safetensors", which is not a file of this folder'),
        ({"c": "three.safetensors"}, 'names the shard "three.safetensors"'),
        ({"b": "two.safetensors"}, "one.safetensors holds b, the index says otherwise"),
        ({"b": 3}, "expected a weight_map"),
    ],
)
def test_a_lying_index_is_refused(sharded, changes, message):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded(**changes))
    assert message in str(caught.value)


def test_the_fp16_variant_is_taken_where_it_is_the_only_one(tmp_path):
    (tmp_path / "vae").mkdir()
    shard(tmp_path / "vae", "diffusion_pytorch_model.fp16.safetensors", ["a"])
    assert [path.name for path in open_checkpoint(tmp_path).files] == ["diffusion_pytorch_model.fp16.safetensors"]
    shard(tmp_path / "vae", "diffusion_pytorch_model.safetensors", ["a"])
    assert [path.name for path in open_checkpoint(tmp_path).files] == ["diffusion_pytorch_model.safetensors"]


def test_a_folder_of_pickles_says_what_to_do(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"found diffusion_pytorch_model.bin.*can run any program"):
        open_checkpoint(tmp_path)
