"""The compile cache: the children run glassine's own trial on a Core ML of a few lines (tests/support/light_trial.py),
with one test through the portable stand-in. Faults are what Core ML has been seen to do.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb

from glassine.errors import EngineError
from glassine.runtime.engine import EngineOptions, open_engine, trial
from glassine.runtime.engine import cache as module
from glassine.runtime.engine.cache import Cache, Entry, Ready, Wanted, prepare
from glassine.runtime.engine.contract import TensorSpec

LIGHT = Path(__file__).parents[2] / "support" / "light_trial.py"
INPUTS = (TensorSpec("x", (2, 3), "float32"), TensorSpec("ids", (1, 77), "int32"))

OPEN = """
import sys
from pathlib import Path
from glassine.runtime.engine import trial
from glassine.runtime.engine.cache import Cache, Wanted
light, faults, root, package = sys.argv[1:]
trial.TRIAL = (sys.executable, light, faults)
ready = Cache(Path(root)).ready(Wanted(package=Path(package), units="cpu_and_ne", inputs=()))
print(ready.model, ready.units)
"""

FALLBACK = """
import sys
import numpy as np
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.engine.portable import proxy

proxy.install(trial_faults={"load CPU_AND_NE": "killed"})
said = []
for _ in range(2):
    said.clear()
    engine = open_engine(sys.argv[1], EngineOptions(engine="coreml", compute_units="cpu_and_ne", tell=said.append))
    assert engine.realised.device == "cpu_and_gpu"
    (notice,) = engine.realised.notices
    assert "runs on cpu_and_gpu: cpu_and_ne crashed when loading (it was ended by SIGKILL)" in notice, notice
    assert engine.predict(x=np.ones((1, 2), np.float32))["out0"].tolist() == [[3.0]]
assert said == [], said  # remembered: no child was started
print("done")
"""


def write_package(path: Path, weights: bytes = b"w" * 100) -> Path:
    data = path / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    (path / "Manifest.json").write_text("{}")
    (data / "model.mlmodel").write_bytes(b"graph")
    (data / "weights" / "weight.bin").write_bytes(weights)
    return path


@pytest.fixture(autouse=True)
def _log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHT_TRIAL_LOG", str(tmp_path))


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    return write_package(tmp_path / "Unet.mlpackage")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ready(package, faults, units=..., ...) -> Ready, from the cache in tmp_path / "cache"."""

    def call(package: Path, faults: dict[str, str] | None = None, **asked) -> Ready:
        monkeypatch.setattr(trial, "TRIAL", (sys.executable, str(LIGHT), json.dumps(faults if faults else {})))
        asked = {"units": "cpu_and_ne", "inputs": INPUTS, "timeout": 60.0, **asked}
        return Cache(tmp_path / "cache").ready(Wanted(package=package, **asked))

    return call


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch):
    def forbid() -> None:
        monkeypatch.setattr(module, "attempt", lambda *_: pytest.fail("a child was started"))

    return forbid


def whole(model: Path, package: Path) -> bool:
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    return all((model / path).read_bytes() == (package / path).read_bytes() for path in files)


def compilations(package: Path) -> int:
    return len((package.parent / "compilations").read_text().split())


def left_over(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith(("workshop-", "."))]


def test_a_package_is_compiled_once_and_then_only_looked_up(ready, unet, tmp_path, no_child):
    said: list[str] = []
    first = ready(unet, tell=said.append)
    assert (first.units, first.notices) == ("cpu_and_ne", ())
    assert whole(first.model, unet)
    assert [words.split(": ")[1] for words in said] == [
        f"{doing} on cpu_and_ne" for doing in ("compiling", "loading", "predicting once")
    ]
    no_child()
    (tmp_path / "cache" / "locks").rename(tmp_path / "away")  # nor a lock
    assert ready(unet) == first
    assert not (tmp_path / "cache" / "locks").exists()
    assert left_over(tmp_path / "cache") == []


def test_nobody_waits_for_what_was_given_up(ready, unet, tmp_path):
    done = threading.Event()
    said: list[str] = []

    def tell(words: str) -> None:
        said.append(words)
        if "loading" in words:
            done.set()

    with pytest.raises(EngineError, match=r"Unet.mlpackage: given up while loading on cpu_and_ne"):
        ready(unet, {"load CPU_AND_NE": "hangs"}, tell=tell, given_up=done.is_set)
    assert left_over(tmp_path / "cache") == []
    assert ready(unet).units == "cpu_and_ne"  # nothing is remembered of it


def test_nor_for_what_another_process_compiles(ready, unet, tmp_path):
    ready(unet)
    (key,) = Cache(tmp_path / "cache").entries()
    lock = os.open(tmp_path / "cache" / "locks" / key, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    said: list[str] = []
    with pytest.raises(EngineError, match="given up while another process compiled it"):
        ready(unet, units="cpu_and_gpu", tell=said.append, given_up=lambda: bool(said))
    assert said == ["Unet.mlpackage: waiting for another process"]
    os.close(lock)
    assert ready(unet, units="cpu_and_gpu").units == "cpu_and_gpu"


def test_content_is_the_key(ready, unet, tmp_path):
    first = ready(unet)
    copy = Path(shutil.copytree(unet, tmp_path / "elsewhere" / "Other.mlpackage"))
    assert ready(copy) == first
    assert compilations(unet) == 1
    (unet / "Data/com.apple.CoreML/weights/weight.bin").write_bytes(b"v" * 100)
    second = ready(unet)
    assert second.model != first.model
    assert whole(second.model, unet)
    assert not first.model.exists()  # what the same package made before goes


def test_big_files_are_hashed_once(tmp_path, monkeypatch):
    package = write_package(tmp_path / "Big.mlpackage", b"w" * (1 << 20))
    store = Cache(tmp_path / "cache")
    content = store._content(package)
    weights = package / "Data/com.apple.CoreML/weights/weight.bin"
    opened = []
    path_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest, **kw: opened.append(self) or path_open(self, *rest, **kw))
    assert store._content(package) == content
    assert weights not in opened
    weights.write_bytes(b"v" * (1 << 20))
    assert store._content(package) != content
    assert weights in opened


def test_another_build_of_the_system_is_another_model(ready, unet, monkeypatch):
    first = ready(unet)
    monkeypatch.setattr(module, "os_build", lambda: "25A1")
    second = ready(unet)
    assert second.model.parent.name.endswith("-25A1")
    assert whole(second.model, unet)
    assert not first.model.exists()


@pytest.mark.parametrize(
    ("where", "fault", "words"),
    [
        ("load", "killed", "crashed when loading (it was ended by SIGKILL; it said: Core ML's last words)"),
        (
            "predict",
            "killed",
            "crashed at the first prediction (it was ended by SIGKILL; it said: Core ML's last words)",
        ),
        ("load", "hangs", "hung when loading (no answer in 8 s)"),
        ("load", "refused", "refused when loading (ANECCompile() FAILED (11))"),
        ("predict", "nan", "not finite at the first prediction (out0 came out NaN or infinite)"),
    ],
)
def test_a_unit_that_fails_gives_way_to_the_next(ready, unet, where, fault, words):
    timeout = 8.0 if fault == "hangs" else 60.0
    first = ready(unet, {f"{where} CPU_AND_NE": fault}, timeout=timeout)
    assert first.units == "cpu_and_gpu"
    assert first.notices == (
        f"Unet.mlpackage runs on cpu_and_gpu: cpu_and_ne {words}. This is remembered; "
        "'glassine cache warm FOLDER --retry' tries again",
    )
    again = ready(unet, retry=True)
    assert (again.units, again.notices) == ("cpu_and_ne", ())
    assert compilations(unet) == 1


def test_what_failed_is_not_tried_again(ready, unet, no_child):
    first = ready(unet, {"load CPU_AND_NE": "killed"})
    no_child()
    assert ready(unet) == first


def test_no_unit_is_left(ready, unet, no_child):
    faults = {"load ALL": "refused", "load CPU_AND_GPU": "killed", "predict CPU_ONLY": "nan"}
    for _ in range(2):
        with pytest.raises(EngineError) as error:
            ready(unet, faults, units="all")
        for words in ("all refused when loading", "cpu_and_gpu crashed", "cpu_only not finite", "--engine portable"):
            assert words in str(error.value)
        no_child()


def test_functions_are_tried_each_for_itself(ready, unet):
    ready(unet, function="size_64x64")
    second = ready(unet, {"load CPU_AND_NE": "killed"}, function="size_96x64")
    assert second.units == "cpu_and_gpu"
    assert ready(unet, function="size_64x64").units == "cpu_and_ne"
    assert compilations(unet) == 1


def test_a_compiler_that_crashes_is_not_called_again(ready, unet):
    with pytest.raises(EngineError, match=r"compiling it crashed .it was ended by SIGKILL"):
        ready(unet, {"compile": "killed"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attempt", lambda *_: pytest.fail("a child was started"))
        with pytest.raises(EngineError, match="--retry"):
            ready(unet)
    assert whole(ready(unet, retry=True).model, unet)


def test_a_package_that_cannot_be_compiled_says_why(ready, unet):
    with pytest.raises(EngineError, match=r"compiling it refused .ANECCompile"):
        ready(unet, {"compile": "refused"})
    assert whole(ready(unet).model, unet)  # an answer that costs little is asked for again


def test_a_full_disk(ready, unet, tmp_path, monkeypatch):
    for fault in ("compile", "load CPU_AND_NE"):
        with pytest.raises(EngineError, match=r"the disk is full, so .*GLASSINE_CACHE"):
            ready(unet, {fault: "full"})
    assert left_over(tmp_path / "cache") == []
    assert ready(unet).units == "cpu_and_ne"  # it was not the unit's fault
    other = write_package(tmp_path / "Vae.mlpackage")
    (other / "Manifest.json").write_text("{ }")
    (other / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"other")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000, 0))
    with pytest.raises(EngineError, match=r"needs 0.00 GB in .*, 0.00 GB are free"):
        ready(other)


def test_room_is_made_of_what_is_of_no_use(ready, unet, tmp_path, monkeypatch):
    gone = write_package(tmp_path / "Gone.mlpackage", b"g" * 100)
    useless, kept = ready(gone), ready(unet)
    shutil.rmtree(gone)
    other = write_package(tmp_path / "Vae.mlpackage", b"v" * 100)

    def usage(_: Path):
        return shutil._ntuple_diskusage(1000, 1000, 0 if useless.model.exists() else 1000)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    assert whole(ready(other).model, other)
    assert not useless.model.exists()
    assert kept.model.exists()


def test_a_cache_that_cannot_be_written(unet, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setattr(module, "cache_root", lambda: blocked / "cache")
    monkeypatch.setattr(trial, "TRIAL", (sys.executable, str(LIGHT), "{}"))
    scratch = tmp_path / "scratch"
    made = prepare(Wanted(package=unet, units="cpu_and_ne", inputs=INPUTS), scratch)
    assert made.model.is_relative_to(scratch)
    assert whole(made.model, unet)
    (notice,) = made.notices
    assert "cannot be written" in notice
    assert notice.endswith("compiled for this run only")


def test_a_damaged_entry_is_made_again(ready, unet):
    first = ready(unet)
    (first.model / "Data/com.apple.CoreML/weights/weight.bin").write_bytes(b"w")
    assert whole(ready(unet).model, unet)
    (first.model.parent / "entry.json").write_text('{"source": 1}')
    assert ready(unet) == first
    assert compilations(unet) == 3


def test_what_was_compiled_before_is_tried_where_it_lies(ready, tmp_path):
    model = tmp_path / "Unet.mlmodelc"
    model.mkdir()
    (model / "coremldata.bin").write_bytes(b"compiled")
    made = ready(model, {"load CPU_AND_NE": "killed"})
    assert (made.model, made.units) == (model, "cpu_and_gpu")
    assert not (tmp_path / "compilations").exists()


def start(unet: Path, root: Path, faults: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, LIGHT, json.dumps(faults), root, unet]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)


def test_eight_processes_compile_once(unet, tmp_path):
    running = [start(unet, tmp_path / "cache", {"compile": "slow 0.05"}) for _ in range(8)]
    answers = {process.communicate()[0] for process in running}
    assert len(answers) == 1
    assert answers.pop().endswith(" cpu_and_ne\n")
    assert compilations(unet) == 1


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_at_random_moments_loses_nothing(ready, unet, tmp_path, kills):
    chance = random.Random(7)
    faults = {"compile": "slow 0.05", "load CPU_AND_NE": "slow 0.2", "predict CPU_AND_NE": "slow 0.2"}
    for _ in range(kills):
        process = start(unet, tmp_path / "cache", faults)
        time.sleep(chance.uniform(0.3, 1.8))
        process.kill()
        process.communicate()
        if chance.random() < 0.3:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # so that some kills come early again
    made = ready(unet, retry=True)
    assert made.units == "cpu_and_ne"
    assert whole(made.model, unet)
    assert Entry.read(made.model.parent) is not None


def test_a_child_does_not_outlive_its_parent(unet, tmp_path):
    process = start(unet, tmp_path / "cache", {"load CPU_AND_NE": "hangs"})
    pids = tmp_path / "pids"
    while not pids.is_file() or not pids.read_text().endswith("\n"):
        time.sleep(0.05)
    child = int(pids.read_text())
    process.kill()
    process.communicate()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the child is still there after 30 s")


def test_the_core_ml_engine_falls_back_through_the_stand_in(python, package):
    path = package(lambda x: mb.linear(x=x, weight=np.ones((1, 2), np.float32), bias=np.ones(1, np.float32)),
                   x=np.ones((1, 2), np.float32))  # fmt: skip
    assert python(FALLBACK, path).endswith("done\n")


@pytest.mark.coreml
@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
@pytest.mark.parametrize("units", ["cpu_only", "cpu_and_gpu", "cpu_and_ne"])
def test_core_ml_itself_compiles_once_into_the_cache(package, tmp_path, monkeypatch, no_child, units):
    monkeypatch.setenv("GLASSINE_CACHE", str(tmp_path / "cache"))
    x = np.ones((1, 2), np.float32)
    path = package(lambda x: mb.linear(x=x, weight=np.ones((1, 2), np.float32)), opset=ct.target.iOS16, x=x)
    options = EngineOptions(engine="coreml", compute_units=units)
    engine = open_engine(path, options)
    assert engine.predict(x=x)["out0"].tolist() == [[2.0]]
    (entry,) = Cache(tmp_path / "cache").entries().values()
    assert entry is not None
    assert entry.build == module.os_build()
    assert entry.trials[engine.realised.device].passed
    engine.close()
    no_child()
    again = open_engine(path, options)
    assert again.realised.device == engine.realised.device
    assert again.predict(x=x)["out0"].tolist() == [[2.0]]
