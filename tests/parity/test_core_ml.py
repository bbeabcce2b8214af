"""The second leg: Core ML beside the portable engine, on the same packages. Each test runs twice: here on the stand-in,
which proves the test, and on a Mac (-m coreml) on Core ML itself, on every choice of units that this Mac has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glassine.convert import forms
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.palettize import Palette
from glassine.manifest import Manifest
from glassine.runtime.machine import this_machine

TINY = Path(forms.__file__).parents[1] / "models" / "tiny"
CHILD = Path(__file__).parents[1] / "support" / "on_core_ml.py"
CLOSE = 40.0  # dB
MAC = pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
ON_A_MAC = pytest.param("Core ML", marks=[pytest.mark.coreml, MAC])
HERE = ["stand-in", ON_A_MAC]
SLOWLY_HERE = [pytest.param("stand-in", marks=pytest.mark.slow), ON_A_MAC]
UNITS = {"stand-in": ["cpu_and_ne"], "Core ML": ["cpu_only", "cpu_and_gpu", "cpu_and_ne", "all"]}
OLD = sys.platform == "darwin" and this_machine().version < (15,)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted(name, **options) -> a folder of the trained family, made once."""
    made = {}

    def convert(name, **options):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("core_ml") / name
            convert_checkpoint(TINY / "tiny.safetensors", made[name], ConvertOptions(tokenizer=TINY, **options))
        return made[name]

    return convert


@pytest.fixture
def run(tmp_path):
    """run(where, jobs) -> a report of each, from a process of its own with a compile cache of this test's."""

    def call(where, jobs, *, trials=True):
        environment = {"GLASSINE_CACHE": str(tmp_path / "cache"), "GLASSINE_CONFIG": str(tmp_path / "config")}
        command = [sys.executable, "-W", "ignore", str(CHILD), where, json.dumps({"trials": trials}), json.dumps(jobs)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def jobs_of(folder, where):
    """Every package of a model, on every choice of units."""
    return [
        {"package": str(folder / part.file), "function": part.about.get("function"), "units": units}
        for part in Manifest.read(folder).parts.values()
        for units in UNITS[where]
    ]


def check(report):
    """One package on one choice of units: it ran, was right, and said how long it took and where."""
    assert report["realised"] == report["units"] or report["notices"]
    assert report["psnr"] > CLOSE, report  # on the stand-in, which rounds to float16, measured 67 and more
    assert report["steady"] > 60, report  # a second call on the same inputs; equal but for the order of a GPU's sums
    assert report["load"] > 0
    assert report["predict"] > 0
    assert report["plan"]["source"] == "plan"
    assert report["plan"]["operations"] > 50
    assert report["plan"]["share"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("where", HERE)
def test_every_part_on_every_unit(converted, run, where):
    folder = converted("split", sizes=((64, 64),))
    jobs = jobs_of(folder, where)
    reports = run(where, jobs)
    assert len(reports) == len(jobs) == 4 * len(UNITS[where])
    for report in reports:
        check(report)
    # What has been compiled serves the next process, which could not compile anything.
    (again,) = run(where, jobs[:1], trials=False)
    assert again["realised"] == reports[0]["realised"]


@pytest.mark.parametrize("where", SLOWLY_HERE)
@pytest.mark.parametrize(
    "attention", ["einsum", pytest.param("sdpa", marks=pytest.mark.skipif(OLD, reason="macOS 15"))]
)
def test_the_attention_for_the_gpu(converted, run, where, attention):
    """The UNet alone: the VAE's normalisation is written for a GPU too, and overflows where all of it is float16."""
    folder = converted(attention, sizes=((64, 64),), part="unet", attention=attention, layout="channels_last")
    for report in run(where, jobs_of(folder, where)):
        check(report)


@pytest.mark.parametrize("where", SLOWLY_HERE)
def test_palettes(converted, run, where):
    folder = converted("six", sizes=((64, 64),), part="unet", palette=Palette.read("6"))
    for report in run(where, jobs_of(folder, where)):
        check(report)


@pytest.mark.parametrize("where", SLOWLY_HERE)
@pytest.mark.skipif(OLD, reason="functions need macOS 15")
def test_functions(converted, run, where):
    """Two sizes in one package: each is the one that was asked for."""
    folder = converted("functions", sizes=((64, 64), (96, 64)), part="unet", functions=True, attention="einsum",
                       layout="channels_last")  # fmt: skip
    parts = Manifest.read(folder).parts
    assert len({part.file for part in parts.values()}) == 1
    reports = run(where, jobs_of(folder, where))
    for report in reports:
        check(report)
    shapes = {tuple(report["shapes"]["noise_pred"]) for report in reports}
    assert shapes == {(2, 4, 8, 8), (2, 4, 8, 12)}


@pytest.mark.parametrize("where", SLOWLY_HERE)
def test_a_picture(converted, run, where):
    folder = converted("split", sizes=((64, 64),))
    (report,) = run(where, [{"folder": str(folder)}])
    assert report["psnr"] > 30  # four steps of float16; on the stand-in measured 52
