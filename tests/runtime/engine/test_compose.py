"""Engines made of engines: what each gets and returns, by name and layout."""

import numpy as np
import pytest

from glassine.errors import EngineError
from glassine.runtime.engine import Realised, TensorSpec
from glassine.runtime.engine.compose import Chain, Renamed
from glassine.runtime.engine.contract import check_inputs


class Stub:
    """An engine that computes with a function."""

    def __init__(self, inputs, outputs, compute):
        self.inputs = {name: TensorSpec(name, shape, dtype) for name, (shape, dtype) in inputs.items()}
        self.outputs = {name: TensorSpec(name, (), "float32") for name in outputs}
        self.realised = Realised(engine="stub", device="cpu", precision="fp32", load_seconds=0.5)
        self.compute, self.open = compute, True

    def predict(self, **arrays):
        return self.compute(**check_inputs("stub", self.inputs, arrays))

    def close(self):
        self.open = False


FLOATS = ((2,), "float32")


def test_a_chain_hands_on_what_later_chunks_need():
    first = Stub({"x": FLOATS, "t": FLOATS}, ["h", "skip"], lambda x, t: {"h": x + t, "skip": x})
    second = Stub({"h": FLOATS, "c": FLOATS}, ["h"], lambda h, c: {"h": h * c})  # the same name, made anew
    third = Stub({"h": FLOATS, "skip": FLOATS, "t": FLOATS}, ["out"], lambda h, skip, t: {"out": h - skip + 10 * t})
    chain = Chain([first, second, third])
    assert set(chain.inputs) == {"x", "t", "c"}
    assert set(chain.outputs) == {"out"}
    assert chain.realised.load_seconds == 1.5
    x, t, c = np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([5.0, 6.0])
    result = chain.predict(x=x, t=t, c=c)
    assert list(result) == ["out"]
    assert np.array_equal(result["out"], (x + t) * c - x + 10 * t)
    with pytest.raises(EngineError, match=r"missing \['c'\]"):
        chain.predict(x=x, t=t)
    with pytest.raises(EngineError, match=r"no inputs \['y'\], only \['c', 't', 'x'\]"):
        chain.predict(x=x, t=t, c=c, y=c)
    chain.close()
    assert not any(stage.open for stage in (first, second, third))


def test_names_and_layouts():
    def compute(**arrays):
        return {"var_1": arrays["context"].sum(axis=(1, 2)), "kept": arrays["ids"] + arrays["residual"]}

    engine = Stub(
        {
            "context": ((2, 7, 3), "float16"), "ids": ((12,), "int32"), "time": ((1,), "float32"),
            "residual": ((12,), "float32"),
        },
        ["var_1", "kept"], compute,
    )  # fmt: skip
    seen = {}
    engine.compute = lambda **arrays: (seen.update(arrays), compute(**arrays))[1]
    renamed = Renamed(engine, {"states": "context", "time_ids": "ids", "t": "time"}, {"out": "var_1"}, ["residual"])
    assert set(renamed.inputs) == {"states", "time_ids", "t"}
    assert set(renamed.outputs) == {"out", "kept"}
    states = np.random.default_rng(0).standard_normal((2, 3, 1, 7)).astype(np.float32)
    ids = np.arange(12, dtype=np.float32).reshape(2, 6)
    result = renamed.predict(states=states, time_ids=ids, t=np.array([5.0, 5.0], np.float32))
    assert np.array_equal(seen["context"], states[:, :, 0].transpose(0, 2, 1))
    assert seen["ids"].dtype == np.int32
    assert np.array_equal(seen["time"], [5.0])
    assert np.array_equal(seen["residual"], np.zeros(12))
    assert np.array_equal(result["kept"], ids.reshape(-1))
    assert set(result) == {"out", "kept"}
    renamed.close()
    assert not engine.open


def test_a_layout_that_does_not_fit_is_the_packages_to_refuse():
    engine = Stub({"x": ((2, 3), "float32")}, ["y"], lambda x: {"y": x})
    with pytest.raises(EngineError, match=r'input "x" has shape \(7,\), expected \(2, 3\)'):
        Renamed(engine, {}, {}).predict(x=np.zeros(7, np.float32))
