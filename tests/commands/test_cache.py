"""`glassine cache` on a converted tiny model; the children run on a Core ML of a few lines."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from glassine.manifest import Manifest
from glassine.runtime.engine import cache as module
from glassine.runtime.engine import trial
from glassine.runtime.tuned import Choice, Tuning, place_of, programs_of, write

LIGHT = Path(__file__).parents[1] / "support" / "light_trial.py"


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """faults({...}) plants them in the children; without a call there are none. The cache is empty."""
    monkeypatch.setenv("GLASSINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "coremltools.libcoremlpython", ModuleType("stand-in"))

    def plant(planted: dict[str, str]) -> None:
        monkeypatch.setattr(trial, "TRIAL", (sys.executable, str(LIGHT), json.dumps(planted)))

    plant({})
    return plant


def test_warm_list_and_clear(glassine, faults, tiny_folder, monkeypatch):
    packages = ["TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage", "VAEEncoder.mlpackage"]
    faults({"load CPU_AND_NE": "killed"})
    warmed = glassine("cache", "warm", tiny_folder, "--units", "cpu_and_ne", "--json")
    assert {one["package"]: one["units"] for one in json.loads(warmed.stdout)["packages"]} == dict.fromkeys(
        packages, "cpu_and_gpu"
    )
    assert "note: Unet.mlpackage runs on cpu_and_gpu: cpu_and_ne crashed when loading" in warmed.stderr
    faults({})
    again = glassine("cache", "warm", tiny_folder, "--units", "cpu_and_ne")
    assert "Unet.mlpackage: cpu_and_gpu" in again.stdout  # remembered
    again = glassine("cache", "warm", tiny_folder, "--units", "cpu_and_ne", "--retry")
    assert "Unet.mlpackage: cpu_and_ne" in again.stdout
    assert "note:" not in again.stderr

    listed = json.loads(glassine("cache", "list", "--json").stdout)
    assert sorted(Path(entry["source"]).name for entry in listed["entries"]) == packages
    assert {entry["state"] for entry in listed["entries"]} == {"ready"}
    assert {json.dumps(entry["units"]) for entry in listed["entries"]} == {
        '{"cpu_and_gpu": "passed", "cpu_and_ne": "passed"}'
    }
    unet = sum(path.stat().st_size for path in (tiny_folder / "Unet.mlpackage").rglob("*") if path.is_file())
    assert listed["bytes"] > unet

    nothing = json.loads(glassine("cache", "clear", "--stale", "--json").stdout)
    assert (nothing["removed"], nothing["bytes"]) == ({}, 0)
    monkeypatch.setattr(module, "os_build", lambda: "25A1")
    assert "of another system" in glassine("cache", "list").stdout
    stale = json.loads(glassine("cache", "clear", "--stale", "--json").stdout)
    assert len(stale["removed"]) == 4
    assert stale["bytes"] == listed["bytes"]
    assert glassine("cache", "list").stdout.endswith("0 compiled models, 0.00 GB\n")


def test_clear_leaves_what_is_being_compiled(glassine, faults, tiny_folder):
    glassine("cache", "warm", tiny_folder)
    store = module.Cache(module.cache_root())
    key = next(iter(store.entries()))
    with store._locked(key, None):
        left = json.loads(glassine("cache", "clear", "--json").stdout)
    assert left["busy"] == [key]
    assert list(store.entries()) == [key]


def test_a_model_that_no_unit_runs_is_an_error(glassine, faults, tiny_folder):
    faults({"predict CPU_ONLY": "nan"})
    result = glassine("cache", "warm", tiny_folder, "--units", "cpu_only")
    assert result.exit_code == 1
    assert "no compute unit runs it: cpu_only not finite at the first prediction" in result.stderr


def test_an_empty_cache(glassine, faults):
    assert "0 compiled models" in glassine("cache", "list").stdout
    assert glassine("cache", "clear").exit_code == 0


@pytest.mark.skipif(sys.platform == "darwin", reason="there it works")
def test_warm_needs_core_ml(glassine, faults, tiny_folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "coremltools.libcoremlpython")
    result = glassine("cache", "warm", tiny_folder)
    assert result.exit_code == 1
    assert "Core ML runs on macOS only" in result.stderr


def test_warm_warms_what_was_tuned(glassine, faults, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSINE_CONFIG", str(tmp_path / "config"))
    manifest = Manifest.read(tiny_folder)
    programs = programs_of(tiny_folder, manifest.parts["unet"])
    choice = Choice(role="unet", units="cpu_and_gpu", device=None, programs=programs, why="")
    place = place_of(tiny_folder, manifest, (64, 64), "coreml")
    write(place, Tuning(model="tiny", size=(64, 64), machine="", date="", choices={"unet": choice}))
    warmed = json.loads(glassine("cache", "warm", tiny_folder, "--json").stdout)
    assert {one["package"]: one["units"] for one in warmed["packages"]} == {
        "TextEncoder.mlpackage": "all", "Unet.mlpackage": "cpu_and_gpu",
        "VAEDecoder.mlpackage": "all", "VAEEncoder.mlpackage": "all",
    }  # fmt: skip
    said = json.loads(glassine("cache", "warm", tiny_folder, "--units", "cpu_only", "--json").stdout)
    assert {one["units"] for one in said["packages"]} == {"cpu_only"}
