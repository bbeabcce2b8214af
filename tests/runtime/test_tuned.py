"""What `glassine tune` has stored decides which package plays a part, and where; what the user says wins."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from glassine.errors import PackageError
from glassine.manifest import Manifest
from glassine.runtime import pipeline, tuned
from glassine.runtime.engine import EngineOptions, Realised
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.steering import in_calls
from glassine.runtime.tuned import Choice, Tuning, place_of, programs_of

SIZE = (64, 64)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the model: what is stored for it is stored for the original too, as they are one model."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def opened(monkeypatch):
    """What is opened: the package's name -> its options."""
    found = {}

    def opening(path, options):
        found[path.stem] = options
        realised = Realised(engine="none", device="", precision="", load_seconds=0.0)
        return SimpleNamespace(realised=realised, close=lambda: None)

    monkeypatch.setattr(pipeline, "open_engine", opening)
    return found


@pytest.fixture(autouse=True)
def _config(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSINE_CONFIG", str(tmp_path / "config"))


def store(folder, *, engine="coreml", place=None, **choices):
    """Store choices as (units, device, role that plays it)."""
    manifest = Manifest.read(folder)
    found = {
        role: Choice(role=plays, units=units, device=device, programs=programs_of(folder, manifest.parts[plays]),
                     why="measured")
        for role, (units, device, plays) in choices.items()
    }  # fmt: skip
    place = place_of(folder, manifest, SIZE, engine) if place is None else place
    tuned.write(place, Tuning(model="tiny", size=SIZE, machine="a Mac", date="2026-01-01", choices=found))
    return place


def load(folder, **how):
    """Load every part; what there is to say."""
    with Pipeline.load(folder, EngineOptions(engine="coreml", **how)) as pipe:
        for role in ("text_encoder", "unet", "vae_decoder"):
            pipe.engine(role)
        return pipe.notices


def units(opened):
    return {name: options.compute_units for name, options in opened.items()}


def test_every_part_runs_where_it_was_found_to_be_fast(folder, tiny_folder, opened):
    store(folder, unet=("cpu_and_ne", None, "unet"), vae_decoder=("cpu_and_gpu", None, "vae_decoder"))
    expected = {"TextEncoder": None, "Unet": "cpu_and_ne", "VAEDecoder": "cpu_and_gpu"}
    assert load(folder) == ()
    assert units(opened) == expected
    opened.clear()
    load(tiny_folder)  # another folder with the same model
    assert units(opened) == expected


def test_what_the_user_says_wins_for_all_parts(folder, opened):
    store(folder, unet=("cpu_and_ne", None, "unet"))
    load(folder, compute_units="cpu_only")
    assert units(opened) == dict.fromkeys(("TextEncoder", "Unet", "VAEDecoder"), "cpu_only")


@pytest.mark.parametrize("said", [{"device": "cpu"}, {"precision": "fp16"}])
def test_a_device_or_precision_that_is_said_leaves_nothing_tuned(folder, opened, said):
    store(folder, engine="portable", unet=(None, "mps", "unet"))
    with Pipeline.load(folder, EngineOptions(engine="portable", **said)) as pipe:
        assert pipe.choices.tuning is None
        pipe.engine("unet")
    assert opened["Unet"].device == said.get("device")


def test_the_engines_are_apart(folder, opened):
    store(folder, engine="portable", unet=(None, "mps", "unet"))
    load(folder)
    assert opened["Unet"].device is None
    with Pipeline.load(folder, EngineOptions(engine="portable")) as pipe:
        pipe.engine("unet")
    assert opened["Unet"].device == "mps"


@pytest.mark.parametrize("what", ["os_build", "chip"])
def test_another_chip_or_system_is_another_machine(folder, monkeypatch, what):
    here = place_of(folder, Manifest.read(folder), SIZE, "coreml")
    assert place_of(folder, Manifest.read(folder), SIZE, "portable") != here
    monkeypatch.setattr(tuned, what, lambda: {"os_build": "25A1", "chip": "Apple M9"}[what])
    assert place_of(folder, Manifest.read(folder), SIZE, "coreml") != here


def test_models_are_told_apart_by_content(folder):
    manifest = Manifest.read(folder)
    places = {place_of(folder, manifest, SIZE, "coreml")}
    for change in ({"source_sha256": "0" * 64}, {"attention": "split"}, {"palette": "6"}):
        unet = replace(manifest.parts["unet"], **change)
        places.add(place_of(folder, replace(manifest, parts={**manifest.parts, "unet": unet}), SIZE, "coreml"))
    assert len(places) == 4
    # What others converted does not say what it was made of: then its programs do.
    unet = replace(manifest.parts["unet"], source_sha256="")
    foreign = replace(manifest, name="other", parts={"unet": unet})
    place = place_of(folder, foreign, SIZE, "coreml")
    change_program(folder)
    assert place_of(folder, foreign, SIZE, "coreml") != place


def change_program(folder):
    program = folder / "Unet.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    data = program.read_bytes()
    program.unlink()
    program.write_bytes(data.replace(b"glassine.role", b"glassine.rolf", 1))


def test_a_package_that_changed_is_not_used_and_said(folder, opened):
    store(folder, unet=("cpu_and_ne", None, "unet"), vae_decoder=("cpu_and_gpu", None, "vae_decoder"))
    change_program(folder)
    (notice,) = load(folder)
    assert notice == (
        "unet: what 'glassine tune' chose (unet) is not what was measured; it is not used: tune the model again"
    )
    assert units(opened) == {"TextEncoder": None, "Unet": None, "VAEDecoder": "cpu_and_gpu"}


def test_another_form_plays_the_part_while_it_is_there(folder, opened):
    manifest = Manifest.read(folder)
    shutil.copytree(folder / "Unet.mlpackage", folder / "Other.mlpackage")
    other = replace(manifest.parts["unet"], file="Other.mlpackage", role="tuned_unet")
    replace(manifest, parts={**manifest.parts, "tuned_unet": other}).write(folder)
    store(folder, unet=("cpu_and_gpu", None, "tuned_unet"))
    load(folder)
    assert units(opened) == {"TextEncoder": None, "Other": "cpu_and_gpu", "VAEDecoder": None}
    opened.clear()
    manifest.write(folder)
    (notice,) = load(folder)
    assert notice.startswith("unet: what 'glassine tune' chose (tuned_unet) is not in this folder")
    assert units(opened) == dict.fromkeys(("TextEncoder", "Unet", "VAEDecoder"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: text.replace('"format_version": 1', '"format_version": 2'),
        lambda text: text.replace("cpu_and_ne", "warp_drive"),
        lambda text: json.dumps({**json.loads(text), "choices": {"unet": {"role": "unet"}}}),
        lambda text: text.replace('"why"', '"wherefore"'),
    ],
)
def test_a_damaged_file_is_not_used_and_said(folder, opened, damage):
    place = store(folder, unet=("cpu_and_ne", None, "unet"))
    place.write_text(damage(place.read_text()))
    (notice,) = load(folder)
    assert notice.startswith(f"{place}: cannot be read (")
    assert notice.endswith("'glassine tune' the model again")
    assert units(opened) == dict.fromkeys(("TextEncoder", "Unet", "VAEDecoder"))


def test_a_settings_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "config").write_text("")
    with pytest.raises(PackageError, match=r"cannot be written .*set GLASSINE_CONFIG"):
        store(folder, unet=("cpu_and_ne", None, "unet"))


@pytest.mark.parametrize(("rows", "count"), [(1, 2), (2, 1), (2, 3), (3, 3), (4, 9)])
def test_rows_go_through_a_network_in_calls_of_its_own(rows, count):
    random = np.random.default_rng(0)
    arrays = {"sample": random.random((count, 4, 2, 2)), "timestep": random.random(count)}
    buffer = np.empty((rows, 4, 2, 2))

    def predict(**given):
        assert all(len(array) == rows for array in given.values())
        buffer[:] = given["sample"] * given["timestep"][:, None, None, None]
        return {"noise_pred": buffer}

    made = in_calls(predict, rows, arrays)["noise_pred"]
    np.testing.assert_array_equal(made, arrays["sample"] * arrays["timestep"][:, None, None, None])
