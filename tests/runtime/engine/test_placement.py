"""Where operations run: what the rules say of programs made for them, and Core ML's plan through the stand-in."""

from __future__ import annotations

import json

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb

from glassine.errors import EngineError
from glassine.runtime.engine.placement import placement, predict
from glassine.runtime.engine.portable.program import read_package

HALF = np.ones((1, 4, 8, 8), np.float16)
KERNEL = np.ones((4, 4, 3, 3), np.float16)


def convolution(x):
    return mb.conv(x=x, weight=KERNEL, pad_type="same", name="convolved")


def shaped(*shape):
    """Two reshapes between which the tensor has this shape."""

    def build(x):
        there = mb.relu(x=mb.reshape(x=x, shape=shape, name="there"), name="work")
        return mb.reshape(x=there, shape=x.shape, name="back")

    return build


def gathers(x):
    return mb.gather(x=convolution(x), indices=np.array([0, 2], np.int32), axis=1, name="gathered")


def best(x):
    values, indices = mb.topk(x=convolution(x), k=2, axis=1, name="best")
    return mb.relu(x=values, name="after"), mb.cast(x=indices, dtype="fp16", name="which")


def branches(x):
    return mb.cond(pred=np.bool_(True), _true_fn=lambda: mb.relu(x=x, name="yes"), _false_fn=lambda: x, name="either")


FLOAT = "computes in float32"
# Name -> build, inputs, {the result of every operation that is not the Neural Engine's: a word of the reason}.
PROGRAMS = {
    "a convolution": (convolution, HALF, {}),
    "edges in float32": (
        lambda x: mb.cast(x=convolution(mb.cast(x=x, dtype="fp16", name="in")), dtype="fp32", name="out"),
        HALF.astype(np.float32),
        {"in": FLOAT, "out": FLOAT, "out0": FLOAT},
    ),
    "gather": (gathers, HALF, {"gathered": "a gather (gather)"}),
    "topk": (best, HALF, {"best_0": "sorting (topk)", "which": "computes in int32"}),
    "a side that is too long": (
        shaped(1, 4, 1, 16386),
        np.ones((1, 4, 2, 8193), np.float16),
        dict.fromkeys(("there", "work", "back"), "a side of 16386, at most 16384"),
    ),
    "the longest side": (shaped(1, 4, 1, 16384), np.ones((1, 4, 2, 8192), np.float16), {}),
    "many channels": (shaped(1, 32768, 1, 2), np.ones((1, 4, 2, 8192), np.float16), {}),
    "rank 5": (shaped(1, 2, 2, 8, 8), HALF, {}),
    "whole numbers": (
        lambda x: mb.add(x=x, y=np.int32(1), name="sum"),
        np.ones((2, 3), np.int32),
        {"sum": "computes in int32", "out0": "computes in int32"},
    ),
}


@pytest.fixture(params=PROGRAMS)
def case(request, package):
    build, x, left = PROGRAMS[request.param]
    return package(build, x=x, opset=ct.target.iOS17), left


def test_the_rules_find_what_leaves_the_neural_engine(case):
    path, left = case
    found = placement(path, "cpu_and_ne")
    assert found.source == "prediction"
    assert {each.name for each in found.operations if each.unit == "cpu"} == set(left)
    assert {each.unit for each in found.operations} <= {"neural_engine", "cpu"}
    for each in found.operations:
        assert each.reason.startswith(left.get(each.name, "")), each
        assert bool(each.reason) == (each.name in left)
    assert sum(each.cost for each in found.operations) == pytest.approx(1)


PLAN = """
import json, sys
from pathlib import Path
from glassine.runtime.engine.portable import plan, proxy
proxy.install()
from glassine.runtime.engine.placement import placement, predict
from glassine.runtime.engine.portable.program import read_package
for package, elsewhere, units in json.loads(sys.argv[1]):
    plan.ELSEWHERE.clear()
    plan.ELSEWHERE.update(elsewhere)
    found, predicted = placement(Path(package), units), predict(read_package(package), units)
    said = [[[o.name, o.type, o.unit, o.reason] for o in where.operations] for where in (found, predicted)]
    print(json.dumps([found.source, *said, sum(o.cost for o in found.operations)]))
"""


@pytest.fixture
def plans(python):
    """plans([(package, {result: unit}, units), ...]) -> (source, plan, prediction, cost) each, by the stand-in."""
    return lambda jobs: [json.loads(line) for line in python(PLAN, json.dumps(jobs)).splitlines()]


def test_the_prediction_is_the_plan(package, plans):
    jobs = [
        (str(package(build, x=x, opset=ct.target.iOS17)), dict.fromkeys(left, "cpu"), "cpu_and_ne")
        for build, x, left in PROGRAMS.values()
    ]
    for source, plan, predicted, cost in plans(jobs):
        assert source == "plan"
        assert plan == predicted
        assert cost == pytest.approx(1)


def test_units_without_the_neural_engine_and_plans_the_rules_do_not_explain(package, plans):
    path = str(package(gathers, x=HALF, opset=ct.target.iOS17))
    gpu, cpu, strange = plans([(path, {}, "cpu_and_gpu"), (path, {}, "cpu_only"), (path, {"convolved": "gpu"}, "all")])
    for (_, plan, predicted, _), unit in ((gpu, "gpu"), (cpu, "cpu")):
        assert plan == predicted
        assert {(each[2], each[3]) for each in plan} == {(unit, "")}  # nothing has left what was not asked for
    shown = {name: (unit, reason) for name, _, unit, reason in strange[1]}
    assert shown["convolved"] == ("gpu", "not known")
    assert shown["gathered"] == ("neural_engine", "")


def test_what_is_inside_a_branch_is_placed_too(package):
    found = placement(package(branches, x=HALF, opset=ct.target.iOS17), "all")
    units = {each.name: (each.unit, each.reason) for each in found.operations}
    assert units["yes"] == ("neural_engine", "")
    assert units["either"] == ("gpu", "control flow (cond)")


def test_weights_that_are_too_big_keep_everything_off(package, monkeypatch):
    path = package(convolution, x=HALF, opset=ct.target.iOS17)
    program = read_package(path)
    monkeypatch.setattr("glassine.runtime.engine.placement.MAX_WEIGHTS", 100)
    found = predict(program, "cpu_and_ne")
    assert {each.unit for each in found.operations} == {"cpu"}
    assert all("weight.bin has" in each.reason for each in found.operations)


def test_a_function_that_is_not_there_is_named(package):
    with pytest.raises(EngineError, match="no function 'other'"):
        placement(package(convolution, x=HALF), "all", "other")


@pytest.mark.coreml
def test_core_ml_has_a_plan(package):
    """On a Mac: every operation of the plan is one of the program's, and Core ML takes a convolution in float16."""
    path = package(convolution, x=HALF, opset=ct.target.iOS17)
    found, predicted = placement(path, "cpu_and_ne"), predict(read_package(path), "cpu_and_ne")
    assert found.source == "plan"
    assert "conv" in {each.type for each in found.operations}
    assert {each.name for each in predicted.operations} & {each.name for each in found.operations}
