"""Timings of engines whose delays are known, on a clock that is moved on; and of real ones, where only counts are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from glassine.errors import EngineError
from glassine.runtime.bench.timing import Effort, Failure, Pictures, Subject, Timing, time_engine, time_in_turns
from glassine.runtime.engine import EngineOptions
from glassine.runtime.pipeline import Pipeline

UNET = Path("/nowhere/Unet.mlpackage")  # the stub does not look


def on(units: str, **more) -> Subject:
    return Subject(packages=(UNET,), options=EngineOptions(engine="coreml", compute_units=units), **more)


def test_figures_are_the_stub_s_delays(plan):
    plan({"cpu_and_ne": 0.2})
    timing = time_engine(on("cpu_and_ne"), Effort(runs=20, cold=True))
    # The stub's wobble is 1 % and 2 % up and down in turns; its clock moves only when it is told to.
    assert timing.median == pytest.approx(0.2)
    assert timing.quartiles == pytest.approx((0.198, 0.202))
    assert timing.count == 20
    assert sorted({round(one, 6) for one in timing.samples}) == [0.196, 0.198, 0.2, 0.202, 0.204]
    assert timing.cold_load == pytest.approx(20.0)
    assert timing.warm_load == pytest.approx(2.0)
    assert timing.first == pytest.approx(0.2)
    assert [b - a for a, b in zip(timing.at, timing.at[1:], strict=False)] == pytest.approx(timing.samples[:-1])
    assert timing.peak_bytes >= timing.base_bytes > 10e6
    assert (timing.realised.engine, timing.realised.device) == ("coreml", "cpu_and_ne")


def test_contenders_alternate_and_settle_before_each_turn(plan):
    plan({"cpu_and_ne": 0.2, "cpu_and_gpu": 0.1})
    contenders = {"ane": on("cpu_and_ne"), "gpu": on("cpu_and_gpu")}
    results = time_in_turns(contenders, Effort(runs=12, warmup=0, turn=5))
    assert {name: result.count for name, result in results.items()} == {"ane": 12, "gpu": 12}
    assert results["ane"].median == pytest.approx(2 * results["gpu"].median)
    # Turns of 5, 5 and 2, and before each of them one call that is left out.
    gaps = [b - a for a, b in zip(results["gpu"].at, results["gpu"].at[1:], strict=False)]
    assert [index for index, gap in enumerate(gaps) if gap > 0.15] == [4, 9]


def test_a_budget_ends_early_but_not_too_early(plan):
    plan({"all": 1.0})
    assert time_engine(on("all"), Effort(runs=100, seconds=12.0, least=5)).count == 15  # in turns of five
    assert time_engine(on("all"), Effort(runs=100, seconds=0.5, least=6)).count == 10
    assert time_engine(on("all"), Effort(runs=7, seconds=100.0)).count == 7


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (
            "killed",
            r"Unet.mlpackage: crashed while calling it for the first time \(it was ended by SIGKILL; it said: Core",
        ),
        ("hangs", "Unet.mlpackage: hung: said nothing for 6 s while calling it for the first time"),
        ("nan", "Unet.mlpackage: y came out NaN or infinite"),
        ("refused", r"Unet.mlpackage: failed while loading it: ANECCompile\(\) FAILED"),
    ],
)
def test_a_failure_is_contained_and_the_others_are_timed(plan, planned, said):
    plan({"cpu_and_ne": planned, "cpu_and_gpu": 0.1})
    contenders = {"ane": on("cpu_and_ne"), "gpu": on("cpu_and_gpu")}
    results = time_in_turns(contenders, Effort(runs=10, timeout=6.0 if planned == "hangs" else 60.0))
    assert isinstance(results["gpu"], Timing)
    assert results["gpu"].median == pytest.approx(0.1)
    assert isinstance(results["ane"], Failure)
    with pytest.raises(EngineError, match=said):
        raise EngineError(results["ane"].reason)


def test_what_is_told_and_what_ran_are_handed_on(plan):
    plan({"cpu_and_ne": "runs cpu_only", "cpu_only": 3.0})
    said: list[str] = []
    (timing,) = time_in_turns({"ane": on("cpu_and_ne", name="the UNet")}, Effort(runs=2), tell=said.append).values()
    assert timing.realised.device == "cpu_only"
    assert timing.notices == ("Unet.mlpackage runs on cpu_only",)
    assert timing.median == pytest.approx(3.0, rel=0.03)
    assert said == ["the UNet: loading", "Unet.mlpackage: loading on cpu_and_ne"]


def test_a_real_picture_is_the_pipeline_s(tiny_folder, tmp_path):
    keep = tmp_path / "latents.npy"
    subject = Pictures(
        folder=tiny_folder, size=(64, 64), steps=2, keep=keep, options=EngineOptions(engine="portable", device="cpu")
    )
    (timing,) = time_in_turns({"": subject}, Effort(runs=2, warmup=0, turn=1)).values()
    assert isinstance(timing, Timing), timing
    assert [stages["evaluations"] for stages in timing.stages] == [2.0, 2.0]
    for stages, seconds in zip(timing.stages, timing.samples, strict=True):
        assert 0 < sum(stages[name] for name in ("prepare", "denoise", "decode")) < seconds
    with Pipeline.load(tiny_folder, EngineOptions(engine="portable")) as pipe:
        latents = pipe("a paper boat on a lake, number 0", seed=0, steps=2, output="latent")
    np.testing.assert_allclose(np.load(keep), latents, atol=1e-5)  # measured 0
