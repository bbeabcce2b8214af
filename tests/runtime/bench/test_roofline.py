"""Work counted on a package of which every number is known, peaks, and where a time lies under the roof."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from glassine.runtime.bench.chips import Peak, published_peak
from glassine.runtime.bench.roofline import Work, measured_peak, position, work_of

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A 3x3 convolution of (2, 4, 8, 8) to 16 channels, its relu, and a reshape, in float32."""
    weight = np.zeros((16, 4, 3, 3), np.float32)
    program = Program()
    with Function({"x": mb.placeholder((2, 4, 8, 8), dtype=types.fp32)}, opset_version=ct.target.iOS16) as function:
        y = mb.relu(x=mb.conv(x=function.inputs["x"], weight=weight, pad_type="same"))
        function.set_outputs([mb.reshape(x=y, shape=(2, 16, 64), name="y")])
    program.add_function("main", function)
    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = tmp_path_factory.mktemp("roofline") / "conv.mlpackage"
    model.save(str(path))
    return path


def test_work_is_counted_by_hand(package):
    outputs = 2 * 16 * 8 * 8
    counted = Work(
        flops=2 * outputs * 4 * 9,
        unsized=0,
        weight_bytes=16 * 4 * 9 * 4,
        edge_bytes=(2 * 4 * 8 * 8 + outputs) * 4,
        inner_bytes=2
        * 2
        * outputs
        * 4,  # the convolution's result and relu's, written and read; a reshape moves nothing
    )
    assert work_of([package]) == counted
    assert work_of([package, package]).flops == 2 * counted.flops


def test_position_under_the_roof():
    peak = Peak(tflops=10.0, gigabytes=100.0, source="")
    heavy = Work(flops=10**12, unsized=0, weight_bytes=10**9, edge_bytes=0, inner_bytes=10**12)
    at = position(heavy, 0.4, peak)  # arithmetic: 0.1 s, memory: 0.01 s
    assert (at.bound, at.share, at.tflops, at.gigabytes) == ("arithmetic", pytest.approx(0.25), 2.5, 2.5)
    light = Work(flops=10**9, unsized=0, weight_bytes=9 * 10**9, edge_bytes=10**9, inner_bytes=0)
    at = position(light, 0.2, peak)
    assert (at.bound, at.share) == ("memory", pytest.approx(0.5))
    for unknown in (None, Peak(tflops=None, gigabytes=153.0, source="")):
        at = position(light, 0.2, unknown)
        assert (at.bound, at.share, at.gigabytes) == (None, None, pytest.approx(50.0))


@pytest.mark.parametrize(
    ("chip", "unit", "cores", "tflops", "gigabytes"),
    [
        ("Apple M1", "cpu_and_ne", None, 11.0, 68.25),
        ("Apple M1", "cpu_and_gpu", None, 2.6, 68.25),
        ("Apple M1", "cpu_and_gpu", 7, 2.6 * 7 / 8, 68.25),
        ("Apple M1 Pro", "cpu_and_gpu", None, 5.2, 200.0),  # Apple's own figures of these two
        ("Apple M1 Max", "cpu_and_gpu", None, 10.4, 400.0),
        ("Apple M1 Max", "all", None, 11.0, 400.0),
        ("Apple M2 Ultra", "cpu_and_ne", 60, 31.6, 800.0),
        ("Apple M2 Ultra", "all", 76, 31.6, 800.0),  # more than its GPU's 27.4
        ("Apple M3 Max", "cpu_and_gpu", 30, 0.41 * 30, 300.0),
        ("Apple M4", "cpu_and_ne", None, 19.0, 120.0),
        ("Apple M5", "cpu_and_gpu", None, None, 153.0),
    ],
)
def test_published_peaks(chip, unit, cores, tflops, gigabytes):
    peak = published_peak(chip, unit, cores)
    assert peak is not None
    assert peak.tflops == (None if tflops is None else pytest.approx(tflops))
    assert peak.gigabytes == gigabytes


@pytest.mark.parametrize(
    ("chip", "unit"),
    [
        ("AMD EPYC", "cpu_and_gpu"),
        ("Apple M9", "cpu_and_ne"),
        ("Apple M4 Ultra", "all"),
        ("Apple M1", "cpu_only"),
        ("", "all"),
    ],
)
def test_what_nobody_has_published_is_not_made_up(chip, unit):
    assert published_peak(chip, unit) is None


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_measured_peak_is_the_best_call_s(device, monkeypatch):
    from glassine.runtime.bench import roofline

    monkeypatch.setattr(roofline, "_SIDE", 8)
    monkeypatch.setattr(roofline, "_COPIED", 1 << 10)
    # Six calls of each, the first not counted: 1 s at best for the product, 0.5 s for the copy.
    lasting = [0.1, 3.0, 1.0, 2.0, 9.0, 4.0, 0.1, 2.0, 0.5, 1.0, 1.0, 1.0]
    times = iter(time for index, seconds in enumerate(lasting) for time in (100.0 * index, 100.0 * index + seconds))
    peak = measured_peak(device, clock=lambda: next(times))
    assert peak.tflops == pytest.approx(2 * 8**3 / 1e12)
    assert peak.gigabytes == pytest.approx(2 * (1 << 10) / 0.5 / 1e9)
    assert "measured in this run" in peak.source
