"""coremltools predicting through the portable engine, and the Core ML engine on top of it, each in its own process:
`install` changes coremltools for good.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb

X = np.arange(6, dtype=np.float32).reshape(2, 3)
LIGHT = Path(__file__).parents[2] / "support" / "light_trial.py"
SUITE = Path(__file__).parents[2] / "acceptance" / "coremltools_suite.py"

PREDICT = """
import sys
import numpy as np
from glassine.runtime.engine.portable import proxy

assert not proxy.installed()
if sys.argv[2] == "before":
    proxy.install()
import coremltools as ct
if sys.argv[2] == "after":
    proxy.install()
assert proxy.installed()
x = np.arange(6, dtype=np.float32).reshape(2, 3)
expected = (x @ np.arange(12, dtype=np.float32).reshape(4, 3).T) + 1

model = ct.models.MLModel(sys.argv[1])
np.testing.assert_array_equal(model.predict({"x": x})["out0"], expected)
assert [list(y) for y in model.predict([{"x": x}, {"x": x}])] == [["out0"], ["out0"]]
assert model.load_duration_in_nano_seconds > 0
assert model.last_predict_duration_in_nano_seconds > 0

hints = {"specializationStrategy": ct.SpecializationStrategy.FastPrediction}
compiled = ct.models.utils.compile_model(sys.argv[1])
model = ct.models.CompiledMLModel(compiled, ct.ComputeUnit.CPU_AND_NE, optimization_hints=hints)
np.testing.assert_array_equal(model.predict({"x": x.astype(np.float16)})["out0"], expected)

for data, message in (({}, "'x' is required"), ({"x": x[:1]}, "the model expects (2, 3)")):
    try:
        model.predict(data)
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
print("done")
"""

STATE = """
import sys
import numpy as np
from glassine.runtime.engine.portable import proxy

proxy.install()
import coremltools as ct
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

specs = [mb.TensorSpec((2,)), mb.StateTensorSpec((2,), dtype=types.fp16)]
@mb.program(input_specs=specs, opset_version=ct.target.iOS18)
def program(x, total):
    now = mb.add(x=mb.cast(x=x, dtype="fp16"), y=mb.read_state(input=total))
    return mb.cast(x=mb.coreml_update_state(state=total, value=now), dtype="fp32")

model = ct.convert(program, minimum_deployment_target=ct.target.iOS18)
(name,) = model.predict({"x": np.zeros(2)}, model.make_state())
a, b = model.make_state(), model.make_state()
x = np.array([1, 2], np.float32)
sums = [model.predict({"x": x}, state)[name].tolist() for state in (a, a, b, a)]
assert sums == [[1, 2], [2, 4], [1, 2], [3, 6]], sums
a.write_state("total", np.array([10, 20], np.float16))
assert a.read_state("total").tolist() == [10, 20]
assert model.predict({"x": x}, a)[name].tolist() == [11, 22]
print("done")
"""

ENGINE = """
import sys
import numpy as np
from glassine.errors import EngineError
from glassine.runtime.engine import EngineOptions, open_engine, trial
from glassine.runtime.engine.portable import proxy

proxy.install()
trial.TRIAL = (sys.executable, sys.argv[2], "{}")
import coremltools.models

asked = []
load = proxy._MLModelProxy.__init__
def recorded(self, path, units, function="", hints=None, asset=None):
    asked.append((path.rpartition(".")[2], units))
    load(self, path, units, function, hints, asset)
proxy._MLModelProxy.__init__ = recorded

x = np.arange(6, dtype=np.float32).reshape(2, 3)
for units in ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only"):
    engine = open_engine(sys.argv[1], EngineOptions(engine="coreml", compute_units=units))
    result = engine.predict(x=np.asfortranarray(x.astype(np.float64)))["out0"]
    np.testing.assert_array_equal(result, (x @ np.arange(12, dtype=np.float32).reshape(4, 3).T) + 1)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    assert (engine.realised.engine, engine.realised.device) == ("coreml", units)
    engine.close()
assert asked == [("mlmodelc", unit) for unit in ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")], asked

engine = open_engine(sys.argv[1], EngineOptions(engine="coreml"))
for data, message in ((dict(), "missing ['x']"), (dict(x=x.T), "expected (2, 3)")):
    try:
        engine.predict(**data)
    except EngineError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

# What was compiled before is loaded where it lies, and stays there.
import pathlib, shutil, tempfile
before = pathlib.Path(tempfile.mkdtemp()) / "linear.mlmodelc"
shutil.copytree(proxy._MLModelProxy.compileModel(sys.argv[1]), before)
(before / "coremldata.bin").touch()
asked.clear()
def recorded_whole(self, path, *rest):
    asked.append(path)
    load(self, path, *rest)
proxy._MLModelProxy.__init__ = recorded_whole
engine = open_engine(before, EngineOptions(engine="coreml"))
assert asked == [str(before)], asked
np.testing.assert_array_equal(engine.predict(x=x)["out0"], result)
engine.close()
assert before.is_dir()
shutil.rmtree(before.parent)

def refuse(*arguments):
    raise RuntimeError("the Neural Engine's compiler said no")
proxy._MLModelProxy.__init__ = refuse
try:
    open_engine(sys.argv[1], EngineOptions(engine="coreml"))
except EngineError as error:
    assert "Core ML cannot load it on all (the Neural Engine's compiler said no)" in str(error), error
else:
    raise AssertionError("not refused")
print("done")
"""


@pytest.fixture
def linear(package):
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    return package(lambda x: mb.linear(x=x, weight=weight, bias=np.ones(4, np.float32)), x=X)


@pytest.mark.parametrize("when", ["before", "after"])
def test_coremltools_predicts(python, linear, when):
    assert python(PREDICT, linear, when).endswith("done\n")


def test_states_live_between_predictions(python):
    assert python(STATE).endswith("done\n")


def test_the_core_ml_engine_keeps_the_contract(python, linear):
    assert python(ENGINE, linear, LIGHT).endswith("done\n")


@pytest.mark.coreml
@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
def test_core_ml_itself_agrees_with_the_portable_engine(package):
    from glassine.runtime.engine import EngineOptions, open_engine

    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 12
    path = package(lambda x: mb.softmax(x=mb.linear(x=x, weight=weight)), opset=ct.target.iOS16, x=X)
    theirs = open_engine(path, EngineOptions(engine="coreml", compute_units="cpu_only")).predict(x=X)["out0"]
    np.testing.assert_allclose(
        theirs, open_engine(path, EngineOptions(engine="portable")).predict(x=X)["out0"], atol=1e-3
    )


def test_a_slice_of_coremltools_own_suite(tmp_path):
    """One test in fifty of the files that hold the operations of Stable Diffusion; all of it is the acceptance test."""
    files = ["conv", "linear", "normalization", "elementwise_binary", "elementwise_unary", "tensor_transformation"]
    command = [sys.executable, "-W", "ignore", SUITE, "--every=50", f"--json={tmp_path}/result.json"]
    command += [f"iOS14/test_{name}.py" for name in files]
    command += ["iOS16/test_constexpr_ops.py", "iOS17/test_scatter_gather.py", "iOS18/test_transformers.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert not result["failures"]
    assert result["outcomes"]["passed, run"] >= 30  # 43 when written
