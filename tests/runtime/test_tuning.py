"""What `tune` tries in which order, how it judges, and how close results have to come."""

import math
from pathlib import Path

import numpy as np
import pytest

from glassine.manifest import Part
from glassine.runtime import tuning
from glassine.runtime.engine import EngineOptions
from glassine.runtime.tuning import Candidate, Tried, Way, candidates, judge, psnr_of, winner

COREML = EngineOptions(engine="coreml")


def way(form="split, batch 2", *, own=True, calls=1):
    attention = form.split(",")[0]
    part = Part(
        file="Unet.mlpackage", role="unet", inputs={}, outputs={}, parameters=0, precision="float16", source="",
        source_sha256="", attention=attention,
    )  # fmt: skip
    return Way(part=part, folder=Path(), form=form, own=own, calls=calls)


def tried(units, median, spread=0.02, *, way=None, excluded="", role="unet"):
    found = Candidate(role=role, way=way if way is not None else globals()["way"](), units=units, device=None)
    step = (median, median * (1 - spread), median * (1 + spread))
    return Tried(candidate=found, step=None if excluded == "crashed" else step, excluded=excluded)


def test_the_likeliest_come_first():
    ways = {
        "vae_decoder": [way("-")],
        "unet": [way(), way("split, batch 1", own=False), way("einsum, batch 2", own=False)],
        "control:canny": [way("-")],
        "controlled_unet": [way()],
    }
    assert [f"{c.role} {c.way.form} {c.on}" for c in candidates(ways, COREML)] == [
        "unet split, batch 2 cpu_and_ne",
        "unet split, batch 2 cpu_and_gpu",
        "unet split, batch 2 all",
        "unet split, batch 1 cpu_and_ne",
        "unet split, batch 1 cpu_and_gpu",
        "unet einsum, batch 2 cpu_and_gpu",
        "controlled_unet split, batch 2 cpu_and_ne",
        "controlled_unet split, batch 2 cpu_and_gpu",
        "controlled_unet split, batch 2 all",
        "control:canny - cpu_and_ne",
        "control:canny - cpu_and_gpu",
        "control:canny - all",
        "vae_decoder - cpu_and_ne",
        "vae_decoder - cpu_and_gpu",
        "vae_decoder - all",
        "unet split, batch 2 cpu_only",
        "controlled_unet split, batch 2 cpu_only",
        "control:canny - cpu_only",
        "vae_decoder - cpu_only",
    ]


def test_pytorchs_devices_stand_in_for_units(monkeypatch):
    monkeypatch.setattr(tuning, "devices", lambda: ["cpu", "cuda"])
    found = candidates({"unet": [way(), way("sdpa, batch 1", own=False)]}, EngineOptions(engine="portable"))
    assert [f"{c.way.form} {c.on}" for c in found] == [
        "split, batch 2 cpu",
        "split, batch 2 cuda",
        "sdpa, batch 1 cpu",
        "sdpa, batch 1 cuda",
    ]
    assert tuning.devices() == ["cpu", "cuda"]


def test_the_fastest_is_chosen():
    rows = [tried("cpu_and_ne", 0.3), tried("cpu_and_gpu", 0.2), tried("all", 0.25), tried("cpu_only", 0.9)]
    assert winner(rows) is rows[1]
    verdicts = {one.candidate.units: one.verdict for one in judge(rows)}
    assert verdicts == {
        "cpu_and_ne": "1.50 times as long",
        "cpu_and_gpu": "chosen: the fastest",
        "all": "1.25 times as long",
        "cpu_only": "4.50 times as long",
    }
    assert [one.chosen for one in judge(rows)] == [False, True, False, False]


def test_ties_go_to_the_simpler_and_to_what_saves_energy():
    other = way("einsum, batch 2", own=False)
    rows = [
        tried("cpu_only", 0.200), tried("all", 0.199), tried("cpu_and_gpu", 0.198, way=other),
        tried("cpu_and_gpu", 0.201), tried("cpu_and_ne", 0.203),
    ]  # fmt: skip
    assert winner(rows).candidate.units == "cpu_and_ne"
    assert winner(rows[:-1]) is rows[3]
    assert winner(rows[:3]) is rows[1]
    assert winner([rows[0], rows[2]]) is rows[0]
    (chosen,) = (one for one in judge(rows) if one.chosen)
    assert chosen.verdict == "chosen: as fast as einsum, batch 2 on cpu_and_gpu within the spread"
    level = {one.verdict for one in judge(rows) if not one.chosen}
    assert level == {"as fast within the spread; what is simpler or saves energy is chosen"}
    # A spread that does not reach is no tie.
    rows[-1] = tried("cpu_and_ne", 0.210)
    assert winner(rows).candidate.units == "cpu_and_gpu"


def test_what_is_wrong_is_never_chosen_and_parts_are_apart():
    rows = [
        tried("cpu_and_ne", 0.1, excluded="crashed"),
        tried("cpu_and_gpu", 0.2, excluded="its results are 3.1 dB from the reference, below 30"),
        tried("all", 0.9),
        tried("cpu_and_ne", 0.05, role="vae_decoder"),
    ]
    judged = judge(rows)
    assert [one.chosen for one in judged] == [False, False, True, True]
    assert [one.verdict for one in judged[:2]] == [rows[0].excluded, rows[1].excluded]
    assert winner(rows[:2]) is None
    assert not any(one.chosen for one in judge(rows[:2]))


def test_how_close_results_come(tmp_path):
    random = np.random.default_rng(0)
    reference = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "reference.npz", y=reference, z=reference)

    def against(**results):
        np.savez(tmp_path / "results.npz", **results)
        return psnr_of(tmp_path / "results.npz", tmp_path / "reference.npz")

    assert against(y=reference, z=reference) == math.inf
    assert against(y=reference[:1], z=reference) == math.inf  # a network of one row
    top = np.abs(reference.astype(np.float64)).max()
    noise = np.float32(0.01) * random.choice((-1, 1), reference.shape).astype(np.float32)
    assert against(y=reference + noise, z=reference) == pytest.approx(20 * math.log10(top / 0.01), abs=1e-3)
    assert against(y=reference, z=-reference) < 10
    assert against(y=reference) == -math.inf
    assert against(y=reference[..., :4], z=reference) == -math.inf
