"""The portable engine: precision, overflow, inputs, memory, fusion, devices, and what it says when it cannot."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from glassine.errors import EngineError, MissingDependency, PackageError
from glassine.runtime.engine import EngineOptions, contract, open_engine
from glassine.runtime.engine.portable.executor import PortableEngine
from glassine.runtime.engine.portable.fusion import fuse
from glassine.runtime.engine.portable.program import read_package

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 8, 4, 4)).astype(np.float32)


def types_of(path, *, fused: bool) -> list[str]:
    body = read_package(path).function().body
    return [op.type for op in (fuse(body) if fused else body).operations if op.type != "const"]


# Precision


def test_fp16_rounds_after_every_operation(run):
    def build(x):
        half = mb.cast(x=x, dtype="fp16")
        return mb.cast(x=mb.mul(x=mb.add(x=half, y=np.float16(1)), y=half), dtype="fp32")

    x = RNG.standard_normal(1000).astype(np.float32)
    h = x.astype(np.float16)
    np.testing.assert_array_equal(run(build, precision="fp16", x=x)[0], ((h + np.float16(1)) * h).astype(np.float32))
    np.testing.assert_allclose(run(build, precision="fp32", x=x)[0], (x + 1) * x, rtol=2e-7)


def test_fp16_keeps_what_the_program_computes_in_float32(run):
    x = np.full(4, 1e5, np.float32)  # beyond float16
    np.testing.assert_array_equal(run(lambda x: mb.add(x=x, y=np.float32(1)), precision="fp16", x=x)[0], x + 1)


def test_overflow_names_the_first_operation_and_its_value(package):
    def build(x):
        half = mb.cast(x=x, dtype="fp16", name="to_half")
        squared = mb.square(x=mb.add(x=half, y=half, name="harmless"), name="too_big")
        return mb.cast(x=mb.sqrt(x=squared, name="after"), dtype="fp32")

    x = np.array([1, -200], np.float32)
    path = package(build, x=x)
    message = r"operation 'too_big' \(square\) overflows float16: it computed 160000, the largest float16 is 65504"
    with pytest.raises(EngineError, match=message):
        PortableEngine(path, precision="fp16").predict(x=x)
    np.testing.assert_array_equal(PortableEngine(path).predict(x=x)["out0"], [2, 400])


def test_infinite_constants_are_no_overflow(run):
    mask = np.array([0, -np.inf], np.float16)

    def build(x):
        scores = mb.add(x=mb.cast(x=x, dtype="fp16"), y=mask)
        return mb.cast(x=mb.softmax(x=scores, axis=-1), dtype="fp32")

    np.testing.assert_array_equal(run(build, precision="fp16", x=np.ones((3, 2), np.float32))[0], [[1, 0]] * 3)


def test_an_input_beyond_float16_is_named(package):
    path = package(lambda x: mb.relu(x=x), half=True, opset=ct.target.iOS16, x=X[:, 0, 0])
    with pytest.raises(EngineError, match="overflows float16: it computed 100000"):
        PortableEngine(path, precision="fp16").predict(x=np.full((2, 4), 1e5, np.float32))


# Inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"expected the inputs \['x'\], got \[\]; missing \['x'\]"),
        ({"x": X, "y": X}, r"unknown \['y'\]"),
        ({"x": X[:1]}, r'input "x" has shape \(1, 8, 4, 4\), expected \(2, 8, 4, 4\)'),
    ],
)
def test_wrong_inputs_are_named(package, inputs, message):
    engine = PortableEngine(package(lambda x: mb.relu(x=x), x=X))
    with pytest.raises(EngineError, match=message):
        engine.predict(**inputs)


def test_floats_are_refused_where_integers_are_expected(package):
    engine = PortableEngine(package(lambda x: mb.add(x=x, y=np.int32(1)), x=np.arange(3, dtype=np.int32)))
    with pytest.raises(EngineError, match=r'input "x" has dtype float32, expected integers \(int32\)'):
        engine.predict(x=np.ones(3, np.float32))
    np.testing.assert_array_equal(engine.predict(x=np.arange(3))["out0"], [1, 2, 3])


def test_inputs_may_be_any_float_and_any_strides(package):
    engine = PortableEngine(package(lambda x: mb.relu(x=x), x=X))
    for x in (X.astype(np.float64), X.astype(np.float16), np.asfortranarray(X)):
        np.testing.assert_allclose(engine.predict(x=x)["out0"], np.maximum(x, 0), rtol=1e-7)


def test_results_do_not_change_under_the_caller(package):
    engine = PortableEngine(package(lambda x: mb.add(x=x, y=np.float32(1)), x=X))
    first = engine.predict(x=X)["out0"]
    engine.predict(x=X + 5)
    np.testing.assert_array_equal(first, X + 1)


def test_an_input_returned_as_it_is_is_a_copy(package):
    x = X.copy()
    result = PortableEngine(package(lambda x: mb.identity(x=x), x=X)).predict(x=x)["out0"]
    x[:] = 0
    np.testing.assert_array_equal(result, X)


# What it cannot do


def test_unknown_operations_are_counted(package):
    boxes, scores = np.ones((1, 3, 4), np.float32), np.ones((1, 3, 2), np.float32)

    def build(boxes, scores):
        return mb.non_maximum_suppression(
            boxes=boxes, scores=scores, iou_threshold=0.5, score_threshold=0.1, max_boxes=2, per_class_suppression=False
        )[0]

    path = package(build, opset=ct.target.iOS15, boxes=boxes, scores=scores)
    with pytest.raises(EngineError, match="does not have these operations: non_maximum_suppression x1;"):
        PortableEngine(path)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "is not available to PyTorch"), ("mps", "is not available to PyTorch"), ("warp", "is unknown")],
)
def test_absent_devices_are_named(package, device, message):
    if device != "warp" and getattr(torch, "cuda" if device == "cuda" else "mps").is_available():
        pytest.skip(f"{device} is here")
    with pytest.raises(EngineError, match=f'device "{device}" {message}'):
        PortableEngine(package(lambda x: mb.relu(x=x), x=X), device=device)


def test_failures_inside_an_operation_name_it(package):
    indices = np.array([9], np.int32)
    path = package(lambda x: mb.gather(x=x, indices=indices, axis=0, name="look_up"), opset=ct.target.iOS16, x=X)
    with pytest.raises(EngineError, match=r"operation 'look_up' \(gather\) failed on shapes .*out of range"):
        PortableEngine(path).predict(x=X)


def test_open_engine_chooses(package, monkeypatch, tmp_path):
    path = package(lambda x: mb.relu(x=x), x=X)
    engine = open_engine(path)
    assert engine.realised.engine == "portable"
    assert engine.realised.precision == "fp32"
    assert engine.realised.load_seconds > 0
    assert open_engine(path, EngineOptions(precision="fp16")).realised.precision == "fp16"
    with pytest.raises(PackageError, match=r"not a model package \(no Manifest.json\)"):
        open_engine(tmp_path)
    with pytest.raises(EngineError, match="Core ML runs on macOS only, this is linux; use --engine portable"):
        open_engine(path, EngineOptions(engine="coreml"))
    monkeypatch.setattr(contract.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'glassine\[portable\]'"):
        open_engine(path)


# Fusion


def group_norm(x, *, twice: bool = False):
    grouped = mb.reshape(x=x, shape=[2, 4, 2, 4, 4])
    centred = mb.sub(x=grouped, y=mb.reduce_mean(x=grouped, axes=[2, 3, 4], keep_dims=True))
    variance = mb.reduce_mean(x=mb.square(x=centred), axes=[2, 3, 4], keep_dims=True)
    normal = mb.real_div(x=centred, y=mb.sqrt(x=mb.add(x=variance, y=np.float32(1e-5))))
    result = mb.batch_norm(
        x=mb.reshape(x=normal, shape=[2, 8, 4, 4]),
        mean=np.full(8, 0.3, np.float32),
        variance=np.full(8, 1.5, np.float32),
        gamma=np.arange(8, dtype=np.float32),
        beta=np.ones(8, np.float32),
    )
    return [result, variance] if twice else result


def attention(x, *, turned: bool, masked: bool, scaled: bool):
    q, k, v = (mb.mul(x=x, y=np.float32(n)) for n in (0.5, 1.5, 1))
    scores = mb.matmul(x=q, y=k, transpose_x=turned, transpose_y=not turned)
    scores = mb.mul(x=scores, y=np.float32(0.7)) if scaled else scores
    scores = mb.add(x=scores, y=np.triu(np.full((4, 4), -1e4, np.float32), 1)) if masked else scores
    weights = mb.softmax(x=scores, axis=-1)
    return mb.matmul(x=v, y=weights, transpose_y=True) if turned else mb.matmul(x=weights, y=v)


def split_attention(x):
    tokens = mb.reshape(x=x, shape=[2, 8, 1, 16])
    keys = mb.transpose(x=tokens, perm=[0, 3, 2, 1])
    scores = mb.einsum(values=(keys, tokens), equation="nchw,nwhu->nchu")
    return mb.einsum(values=(tokens, mb.softmax(x=scores, axis=1)), equation="nchw,nwhu->nchu")


FUSED = {
    "group_norm": (group_norm, "glassine_group_norm"),
    "split_attention": (split_attention, "glassine_split_attention"),
    **{
        f"attention turned={t} masked={m} scaled={s}": (
            lambda x, t=t, m=m, s=s: attention(x, turned=t, masked=m, scaled=s),
            "glassine_attention",
        )
        for t in (False, True)
        for m in (False, True)
        for s in (False, True)
    },
}


@pytest.mark.parametrize("name", FUSED)
def test_fusing_changes_nothing_but_rounding(package, monkeypatch, name):
    build, kind = FUSED[name]
    path = package(build, x=X)
    assert kind in types_of(path, fused=True)
    assert not {"softmax", "real_div"} & set(types_of(path, fused=True))
    fused = PortableEngine(path).predict(x=X)["out0"]
    monkeypatch.setattr("glassine.runtime.engine.portable.executor.fuse", lambda body: body)
    plain = PortableEngine(path).predict(x=X)["out0"]
    np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=2e-6)  # measured: 1.2e-8 beyond rtol


def test_what_is_read_elsewhere_is_not_fused(package):
    path = package(lambda x: group_norm(x, twice=True), x=X)
    assert "glassine_group_norm" not in types_of(path, fused=True)


def test_fp16_runs_unfused(package, monkeypatch):
    def refuse(body):
        raise AssertionError("fused in fp16")

    monkeypatch.setattr("glassine.runtime.engine.portable.executor.fuse", refuse)
    PortableEngine(package(group_norm, x=X), precision="fp16").predict(x=X)


# Memory

MEMORY = """
import gc, resource, sys
import numpy as np, torch
from glassine.runtime.engine.portable.executor import PortableEngine

def resident():
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 1e6

torch.ones(100, 100) @ torch.ones(100, 100)
before = resident()
engine = PortableEngine(sys.argv[1])
loaded = resident() - before
x = np.ones((1, 2048), np.float32)
engine.predict(x=x)
base = resident() - before
for _ in range(3):
    engine.predict(x=x)
# Not ru_maxrss: that begins with what the parent held when it forked.
with open("/proc/self/status") as f:
    peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / 1e6 - before
print(loaded, base, resident() - before, peak)
"""


@pytest.mark.skipif(
    not hasattr(np, "memmap") or not __import__("sys").platform.startswith("linux"), reason="reads /proc"
)
def test_weights_are_held_once(package, python):
    weights = [RNG.standard_normal((2048, 2048)).astype(np.float16) for _ in range(12)]  # 101 MB, 201 MB as float32

    def build(x):
        h = mb.cast(x=x, dtype="fp16")
        for w in weights:
            h = mb.linear(x=h, weight=w, bias=np.zeros(2048, np.float16))
        return mb.cast(x=h, dtype="fp32")

    path = package(build, x=np.ones((1, 2048), np.float32))
    loaded, after_one, after_many, peak = map(float, python(MEMORY, path).split())
    dense = 12 * 2048 * 2048 * 4 / 1e6
    assert loaded < dense + 60  # measured 248 MB for 201 MB of weights
    assert after_one < dense + 90  # buffers of the matrix products
    assert after_many < after_one + 20
    assert peak < dense + 140  # the pages of the file in use, 64 MB at most
