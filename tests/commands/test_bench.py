"""`glassine bench` as a user runs it: on children with planned delays and faults, on Core ML's stand-in, and as it is.

The stub's clock moves only when it is told to: figures are compared with what was planned, on however busy a machine.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from glassine.runtime.bench import folder as module
from glassine.runtime.bench import timing
from glassine.runtime.bench.report import Report, schema
from glassine.runtime.machine import this_machine

SUPPORT = Path(__file__).parents[1] / "support"
PARTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
QUICK = ("--engine", "coreml", "--runs", 10, "--warmup", 0)


@pytest.fixture
def plan(monkeypatch):
    """plan({"cpu_and_ne": 0.2}): what the children do; tests/support/bench_child.py."""

    def plant(planned: dict) -> None:
        monkeypatch.setattr(timing, "CHILD", (sys.executable, str(SUPPORT / "bench_child.py"), json.dumps(planned)))

    return plant


@pytest.fixture
def mac(monkeypatch):
    """The machine is an M1 with room enough."""
    machine = dataclasses.replace(this_machine(), chip="Apple M1", cores=8, available=1 << 34)
    monkeypatch.setattr(module, "this_machine", lambda: machine)


def read(path: Path) -> Report:
    Draft202012Validator(schema()).validate(json.loads(path.read_text()))
    return Report.read(path)


def test_figures_are_those_that_were_planned(glassine, plan, mac, tiny_folder, tmp_path):
    plan({"cpu_and_ne": 0.2, "cpu_and_gpu": 0.4, "cpu_and_ne TextEncoder": 0.01, "load": 3.0})
    result = glassine("bench", tiny_folder, *QUICK, "--units", "ane,gpu", "--part", "unet", "--part", "text_encoder",
                      "--steps", 20, "--json", "a.json", "--chart", "a.png", "--chart", "a.svg")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = read(tmp_path / "a.json")
    text, unet = report.parts
    assert (text.role, unet.role, unet.order) == ("text_encoder", "unet", "in turns")
    ane, gpu = unet.figures
    assert (ane.median, gpu.median) == (pytest.approx(0.2), pytest.approx(0.4))
    assert text.of("ane").median == pytest.approx(0.01)
    assert (ane.low, ane.high) == (pytest.approx(0.198), pytest.approx(0.202))
    assert (ane.cold_load, ane.warm_load, ane.first) == (30.0, 3.0, pytest.approx(0.2))
    assert len(ane.samples) == len(gpu.samples) == 10
    flops = unet.about["work"]["flops"]
    assert ane.roof["tflops"] == pytest.approx(flops / 0.2 / 1e12)
    assert ane.roof["share"] == pytest.approx(
        max(flops / 11e12, unet.about["work"]["weight_bytes"] / 68.25e9) / 0.2, rel=0.05
    )
    assert (ane.roof["peak_tflops"], gpu.roof["peak_tflops"]) == (11.0, pytest.approx(2.6))
    assert ane.warnings == ()
    drawn = report.pictures.of("gpu")
    assert drawn.median == pytest.approx(20 * 0.4)
    assert drawn.images_per_minute == pytest.approx(7.5)
    assert drawn.stages["denoise"] == pytest.approx(20 * 0.4)
    assert report.pictures.about == {"steps": 20}
    assert report.settings["asked"] == ["ane", "gpu"]
    for said in ("unet", "  ane *", "200 ms (198-202) n=10", "400 ms (396-404) n=10", "a picture, 20 steps",
                 "8.00 s (8.00-8.00) n=10", "7.50",
                 "limits, 2.60 TFLOP/s, 68.2 GB/s: published, M1, GPU with 8"):  # fmt: skip
        assert said in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 1920
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_one_unit_s_failure_costs_no_other_figure(glassine, plan, mac, tiny_folder, tmp_path):
    plan(
        {"cpu_and_ne": 0.2, "cpu_and_ne Unet": "killed", "cpu_and_gpu": "runs cpu_only", "cpu_only": 0.4, "all": "nan"}
    )
    result = glassine("bench", tiny_folder, *QUICK, "--units", "ane,gpu,all", "--part", "unet", "--part", "vae_decoder",
                      "--pictures", 0, "--json", "a.json")  # fmt: skip
    assert result.exit_code == 1
    assert "not everything could be measured: unet, vae_decoder" in result.stderr
    unet, decoder = read(tmp_path / "a.json").parts
    assert sorted(unet.failures) == ["all", "ane"]
    assert sorted(decoder.failures) == ["all"]
    assert [one.asked for one in unet.figures] == ["gpu"]
    assert [one.asked for one in decoder.figures] == ["ane", "gpu"]
    assert unet.figures[0].device == "cpu_only"
    flat = " ".join(result.stdout.split())
    for said in (
        "failed: unet on ane: crashed while calling it for the first time (it was ended by SIGKILL; it said: Core ML's",
        "failed: unet on all: y came out NaN or infinite; 'glassine verify FOLDER SOURCE --locate' finds where",
        "cpu, not gpu",
        "note: Unet.mlpackage runs on cpu_only",
    ):
        assert said in flat


def test_a_missing_or_damaged_package_costs_no_other_figure(glassine, plan, mac, tiny_folder, tmp_path):
    plan({"cpu_and_ne": 0.2})
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / "VAEDecoder.mlpackage")
    (folder / "VAEEncoder.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(b"not a model")
    parts = ("--part", "vae_decoder", "--part", "vae_encoder", "--part", "unet")
    result = glassine("bench", folder, *QUICK, "--units", "ane", *parts, "--pictures", 0, "--json", "a.json")
    assert result.exit_code == 1
    assert "not everything could be measured: vae_decoder; see above" in result.stderr
    by_role = {part.role: part for part in read(tmp_path / "a.json").parts}
    assert by_role["unet"].of("ane").median == pytest.approx(0.2)
    assert "VAEDecoder.mlpackage is not there" in by_role["vae_decoder"].failures["ane"]
    assert by_role["vae_encoder"].of("ane").roof is None  # the stub runs anything
    assert "note: vae_encoder: its work cannot be counted: " in result.stdout


def test_contenders_that_memory_does_not_hold_at_once_run_one_after_the_other(
    glassine, plan, mac, tiny_folder, tmp_path, monkeypatch
):
    plan({"cpu_and_ne": 0.2, "cpu_and_gpu": 0.4})
    small = dataclasses.replace(module.this_machine(), available=1000)
    monkeypatch.setattr(module, "this_machine", lambda: small)
    glassine("bench", tiny_folder, *QUICK, "--units", "cpu_and_ne, gpu", "--part", "unet", "--pictures", 0, "--no-cold",
             "--json", "a.json")  # fmt: skip
    (unet,) = read(tmp_path / "a.json").parts
    assert unet.order == "one after the other"
    gaps = np.diff(unet.of("gpu").at)
    assert max(gaps) < 0.41  # no call between turns that is left out
    assert unet.of("ane").cold_load is None


def test_quality_and_another_batch(glassine, plan, mac, tiny_folder, tmp_path):
    plan({"cpu_and_ne": 0.2, "cpu_and_ne Single": 0.15})
    other = tmp_path / "single"
    shutil.copytree(tiny_folder, other)
    (other / "Unet.mlpackage").rename(other / "Single.mlpackage")
    manifest = json.loads((other / "glassine.json").read_text())
    manifest["batch"], manifest["parts"]["unet"]["file"] = 1, "Single.mlpackage"
    (other / "glassine.json").write_text(json.dumps(manifest))
    unet = ("bench", tiny_folder, *QUICK, "--units", "ane", "--part", "unet")
    result = glassine(*unet, "--quality", "--other-batch", other, "--json", "a.json")
    assert result.exit_code == 0, result.stderr
    report = read(tmp_path / "a.json")
    (batched,) = report.batching
    assert batched["rows"] == [1, 2]
    assert batched["medians"] == [pytest.approx(0.15), pytest.approx(0.2)]
    assert batched["ratio"] == pytest.approx(1.5)
    assert "the UNet with 2 rows a call is 1.50 times as fast a row as with 1" in " ".join(result.stdout.split())
    # The stub's latents go from -1 to 1, and are 0.01 off on Core ML: 40 dB.
    assert report.pictures.of("ane").quality["psnr"] == pytest.approx(40.0, abs=0.01)
    refused = glassine(*unet, "--pictures", 0, "--other-batch", tiny_folder)
    assert refused.exit_code == 1
    assert "expected the same weights as" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--runs", 9), 1, "--runs 9: at least 10 are measured; from 10 runs on, the 97.5 % interval"),
        (("--pictures", 3), 1, "--pictures 3: at least 10 are measured"),
        (("--units", "ane,tpu"), 1, "--units ane,tpu: expected some of ane, gpu, cpu, all"),
        (("--part", "unet", "--part", "moon"), 1, "the model has no moon, only text_encoder, unet"),
        (("--size", "96x96"), 1, "converted for 64x64; take one of these for --size"),
        (("--steps", 0), 2, "0 is not in the range"),
        (("--chart", "a.jpg"), 1, "a.jpg: a chart is a .png or .svg file"),
        (("--chart", "nothing/a.png"), 1, "nothing/a.png: cannot be written"),
        (("--json", "nothing/a.json"), 1, "nothing/a.json: cannot be written"),
        (("--other-batch", "nothing", "--part", "unet"), 1, "nothing: no glassine.json here"),
        (("--other-batch", "nothing", "--part", "vae_decoder"), 1, "--other-batch: is about the UNet"),
        (("second",), 2, "one model at a time"),
        (("--quality", "--pictures", 0), 1, "--quality: is about whole pictures"),
        (("--energy",), 1, "powermetrics"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_takes_time(
    glassine, plan, tiny_folder, arguments, code, said, monkeypatch
):
    monkeypatch.setattr(timing, "child", lambda *_: pytest.fail("a child was started"))
    monkeypatch.setenv("PATH", "")
    result = glassine("bench", tiny_folder, "--engine", "coreml", *arguments)
    assert result.exit_code == code
    assert said in result.stderr


@pytest.mark.parametrize("option", ["--json", "--chart"])
def test_a_file_that_is_there_is_not_replaced(glassine, tiny_folder, tmp_path, option):
    (tmp_path / "a.png").touch()
    result = glassine("bench", tiny_folder, option, "a.png")
    assert (result.exit_code, "a.png: exists" in result.stderr, "--overwrite" in result.stderr) == (1, True, True)
    (tmp_path / "a.json").write_text("{}")
    compared = glassine("bench", "compare", "a.json", "a.json", "--json", "a.json")
    assert "a.json: exists" in compared.stderr


@pytest.mark.parametrize("option", ["--json", "--chart"])
def test_a_full_disk_leaves_the_table(glassine, plan, tiny_folder, tmp_path, monkeypatch, option):
    plan({"cpu_and_ne": 0.1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("glassine.runtime.bench.report.os.replace", full)
    result = glassine(
        "bench", tiny_folder, *QUICK, "--units", "ane", "--part", "unet", "--pictures", 0, option, "a.png"
    )
    assert result.exit_code == 1
    assert "a.png: cannot be written (No space left on device)" in result.stderr
    assert "100 ms" in result.stdout
    assert not list(tmp_path.glob("*a.png"))


def test_a_chart_without_matplotlib_is_refused(glassine, tiny_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    result = glassine("bench", tiny_folder, "--chart", "a.png")
    assert result.exit_code == 1
    assert "charts need matplotlib; install it with: pip install 'glassine[chart]'" in result.stderr


def test_the_stand_in_for_core_ml(glassine, tiny_folder, tmp_path, monkeypatch):
    faults = json.dumps({"load CPU_AND_NE": "killed"})
    monkeypatch.setattr(timing, "CHILD", (sys.executable, str(SUPPORT / "bench_proxy.py"), faults))
    result = glassine("bench", tiny_folder, *QUICK, "--units", "ane", "--part", "text_encoder", "--pictures", 0,
                      "--no-cold", "--json", "a.json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (text,) = read(tmp_path / "a.json").parts
    (one,) = text.figures
    assert (one.asked, one.engine, one.device) == ("ane", "coreml", "cpu_and_gpu")
    assert one.cold_load is None
    assert one.placement == {"neural_engine": 0.0, "gpu": pytest.approx(1.0), "cpu": 0.0}
    (notice,) = one.notices
    assert "runs on cpu_and_gpu: cpu_and_ne crashed when loading" in notice
    assert "gpu, not ane: GPU 100%" in result.stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="there it measures Core ML")
def test_off_a_mac_the_portable_engine_is_measured_and_that_is_said(glassine, tiny_folder, tmp_path):
    result = glassine("bench", tiny_folder, "--part", "text_encoder", "--runs", 10, "--warmup", 0, "--pictures", 0,
                      "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "this measures the portable engine (PyTorch)" in result.stderr
    raw = json.loads(result.stdout)
    Draft202012Validator(schema()).validate(raw)
    (one,) = raw["parts"][0]["figures"]
    assert (one["asked"], one["engine"], one["device"], one["precision"]) == ("cpu", "portable", "cpu", "fp32")
    assert one["cold_load"] is None
    assert one["roof"]["source"].startswith("measured in this run, PyTorch on cpu")
    assert raw["machine"]["before"]["load"] != []


@pytest.mark.coreml
@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
def test_a_mac_measures_core_ml(glassine, tiny_folder, tmp_path):
    result = glassine("bench", tiny_folder, "--units", "ane,gpu", "--runs", 10, "--part", "unet", "--steps", 4,
                      "--quality", "--json", "a.json")  # fmt: skip
    report = read(tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    assert report.machine["chip"].startswith("Apple ")
    for one in report.parts[0].figures:
        assert one.engine == "coreml"
        assert one.cold_load > one.warm_load > 0
        assert one.peak_bytes > one.base_bytes > 10e6
        assert one.memory == "physical footprint"
        assert sum(one.placement.values()) == pytest.approx(1.0, abs=0.01)
        if "Virtual" not in report.machine["chip"] and one.device != "cpu_only":
            assert one.roof["peak_gigabytes"] is not None
    for one in report.pictures.figures:
        assert one.quality["psnr"] > 20


def test_compare_shows_ratios(glassine, tmp_path):
    spec = importlib.util.spec_from_file_location("glassine_tests_bench_reports", SUPPORT / "bench_reports.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for name, scale in (("before", 1.0), ("after", 0.5), ("same", 1.001)):
        (tmp_path / f"{name}.json").write_text(made.report(scale).text())
    result = glassine("bench", "compare", "before.json", "after.json", "same.json", "--json", "c.json")
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("unet on ane"))
    assert "200 ms" in line
    assert "0.50x (0.49 to 0.51)" in line
    assert "no difference" in line
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert json.loads((tmp_path / "c.json").read_text())["files"] == ["before", "after", "same"]
    (tmp_path / "broken.json").write_text(made.report().text()[:-100])
    for files, code, said in (
        (("before.json", "broken.json"), 1, "broken.json: cannot be read"),
        (("before.json", "nothing.json"), 1, "nothing.json: cannot be read"),
        (("before.json",), 2, "two files or more"),
        ((), 2, "two files or more"),
        (("before.json", "after.json", "--runs", 30), 2, "compare takes files, --json and --overwrite, no other"),
        (("before.json", "after.json", "--chart", "a.png"), 2, "compare takes files, --json and --overwrite, no other"),
    ):
        refused = glassine("bench", "compare", *files)
        assert refused.exit_code == code
        assert said in refused.stderr
