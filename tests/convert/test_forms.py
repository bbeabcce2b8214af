"""Other forms of a folder's UNet: they draw the same, share its weights, and get and lose every LoRA with it."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glassine.commands import demo
from glassine.convert import forms as form_writer
from glassine.convert import swap
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.forms import drop_forms, form_of, keep_form, write_forms
from glassine.convert.lora import LoraFile
from glassine.convert.swap import change_loras, variant
from glassine.errors import PackageError
from glassine.manifest import TUNED, WEIGHT_FILE, Manifest
from glassine.runtime import tuned
from glassine.runtime.control import Control
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.tuned import Choice, Tuning

TINY = Path(swap.__file__).parents[1] / "models" / "tiny"
LCM = LoraFile(TINY / "tiny_lcm_lora.safetensors", 0.8, 0.0)
SIZES = ((64, 64), (96, 64))
CLOSE = 2e-3  # measured 4e-4 at most, of latents up to 1.8
FIRST = SIZES[0]
ROLE = f"{TUNED}unet"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tiny model at two sizes; read only."""
    folder = tmp_path_factory.mktemp("forms") / "model"
    convert_checkpoint(TINY / "tiny.safetensors", folder, ConvertOptions(sizes=SIZES, tokenizer=TINY))
    return folder


@pytest.fixture
def model(converted, tmp_path):
    """A copy that may be changed; its hard links are kept."""
    shutil.copytree(converted, tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


def forms(folder):
    manifest = Manifest.read(folder)
    own = form_of(manifest.parts["unet"], manifest.tokens)
    last = "channels_last"
    return {
        "own": own,
        "einsum 1": replace(own, rows=1, attention="einsum", layout=last),
        "split 1": replace(own, rows=1),
        "sdpa 2": replace(own, attention="sdpa", layout=last),
    }


def quiet(progress):
    pass


def contents(folder):
    """Name -> digest of every file of the model."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder, package):
    return folder / f"{package}.mlpackage" / WEIGHT_FILE


def choose(folder, size, role, place="unet"):
    """Draw with this part from now on, in the place of the UNet, or of another part."""
    manifest = Manifest.read(folder)
    part = manifest.part(role, size)
    choice = Choice(role=role, units=None, device="cpu", programs=tuned.programs_of(folder, part), why="")
    found = Tuning(model="tiny", size=size, machine="", date="", choices={place: choice})
    tuned.write(tuned.place_of(folder, manifest, size, "portable"), found)


def latents(folder, size=FIRST, **settings):
    """What is drawn, and the packages and rows that drew it."""
    with Pipeline.load(folder, EngineOptions(engine="portable"), size=size) as pipe:
        request = Request(prompt="a red circle", steps=2, seed=5, **settings)
        made = pipe.run(request).finish().latents
        assert pipe.notices == ()
        return made, pipe.choices.of("unet", pipe.manifest.part("unet", size)).part


@pytest.fixture(autouse=True)
def _config(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSINE_CONFIG", str(tmp_path / "config"))


def test_candidates_leave_the_folder_as_it_is(model):
    before = contents(model)
    place = model / ".glassine" / "tune"
    place.mkdir(parents=True)
    wanted = [form for name, form in forms(model).items() if name != "own"]
    made = write_forms(model, FIRST, "unet", wanted, place, quiet)
    assert {name: digest for name, digest in contents(model).items() if not name.startswith(".glassine")} == before
    for form, part in made.items():
        assert part.inputs["sample"][0] == (form.rows, 4, 8, 8)
        assert (part.attention, part.layout) == (form.attention, form.layout)
        assert (place / part.file / "Manifest.json").is_file()
    # One weight file for all of them: the queries that sdpa scales by itself lie behind the UNet's own weights.
    assert len({(place / part.file / WEIGHT_FILE).stat().st_ino for part in made.values()}) == 1
    own, extended = weights(model, "Unet").read_bytes(), (place / made[wanted[0]].file / WEIGHT_FILE).read_bytes()
    assert extended[64 : len(own)] == own[64:]
    assert len(extended) > len(own)


def test_forms_without_weights_of_their_own_are_links(model):
    place = model / ".glassine" / "tune"
    place.mkdir(parents=True)
    (part,) = write_forms(model, FIRST, "unet", [forms(model)["split 1"]], place, quiet).values()
    assert (place / part.file / WEIGHT_FILE).samefile(weights(model, "Unet"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("einsum 1", {}, marks=pytest.mark.slow),
        ("split 1", {}),
        ("split 1", {"guidance_scale": 1.0}),
        ("sdpa 2", {}),
    ],
)
def test_another_form_draws_the_same(model, name, settings):
    plain, part = latents(model, **settings)
    assert part.role == "unet"
    keep_form(model, FIRST, "unet", forms(model)[name], quiet)
    choose(model, FIRST, ROLE)
    other, part = latents(model, **settings)
    assert part.file == "TunedUnet.mlpackage"
    assert part.inputs["sample"][0][0] == forms(model)[name].rows
    assert np.abs(other - plain).max() < CLOSE
    assert not np.array_equal(other, plain)  # it was another program


def test_keeping_another_form_takes_the_place_of_the_first(model):
    before = contents(model)
    sizes = []
    for name in ("sdpa 2", "split 1", "sdpa 2", "einsum 1"):
        part = keep_form(model, FIRST, "unet", forms(model)[name], quiet)
        assert part.attention == name.split()[0]
        assert Manifest.read(model).parts[ROLE].inputs == part.inputs
        assert weights(model, "TunedUnet").samefile(weights(model, "Unet"))
        sizes.append(weights(model, "Unet").stat().st_size)
    assert sizes[0] == sizes[2] > sizes[3] > sizes[1]  # what a form has put behind the weights goes with it
    drop_forms(model, FIRST)
    assert contents(model) == before
    drop_forms(model, FIRST)  # nothing is there, nothing happens


@pytest.mark.parametrize("first", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)])
def test_what_another_size_reads_stays_until_that_goes(model, first):
    """Both sizes share a weight file, and the form of the second reads what the first has put there."""
    before = contents(model)
    plain, _ = latents(model, SIZES[1])
    for size in SIZES:
        keep_form(model, size, "unet", forms(model)["sdpa 2"], quiet)
    drop_forms(model, first)
    (last,) = set(SIZES) - {first}
    if last == SIZES[1]:
        choose(model, SIZES[1], ROLE)
        other, part = latents(model, SIZES[1])
        assert part.file == "TunedUnet_96x64.mlpackage"
        assert np.abs(other - plain).max() < CLOSE
    drop_forms(model, last)
    assert contents(model) == before


def test_a_form_is_gone_whole_or_not_at_all(model, monkeypatch):
    """Killed while the files are renamed: the next one who reads the folder finishes it."""
    before = contents(model)
    keep_form(model, FIRST, "unet", forms(model)["sdpa 2"], quiet)
    kept = contents(model)

    def killed(*arguments):
        raise KeyboardInterrupt

    for step in ("_cut_back", "finish_swap"):
        with monkeypatch.context() as patch:
            patch.setattr(form_writer, step, killed)
            with pytest.raises(KeyboardInterrupt):
                drop_forms(model, FIRST)
        found = {name: digest for name, digest in contents(model).items() if not name.startswith(".glassine")}
        assert found == kept
    assert ROLE not in Manifest.read(model).parts  # it was decided: reading finishes it
    assert contents(model) == before


@pytest.mark.slow
def test_loras_keep_what_lies_behind_the_weights(model):
    keep_form(model, FIRST, "unet", forms(model)["sdpa 2"], quiet)
    swap.add_loras(model, [LCM])
    drop_forms(model, FIRST)
    assert ROLE not in Manifest.read(model).parts
    drawn, part = latents(model)
    assert part.file == "Unet.mlpackage"
    change_loras(model, [])
    assert np.abs(drawn - latents(model)[0]).max() > 0.05  # measured 1.3: the LoRA was in it, and is not


def test_every_size_has_its_own(model):
    keep_form(model, SIZES[1], "unet", forms(model)["einsum 1"], quiet)
    manifest = Manifest.read(model)
    assert manifest.part(ROLE, FIRST) is None
    assert manifest.part(ROLE, SIZES[1]).inputs["sample"][0] == (1, 4, 8, 12)
    plain, _ = latents(model, SIZES[1])
    choose(model, SIZES[1], ROLE)
    other, part = latents(model, SIZES[1])
    assert part.file == "TunedUnet_96x64.mlpackage"
    assert np.abs(other - plain).max() < CLOSE
    assert manifest.sizes == SIZES


@pytest.mark.parametrize("name", [pytest.param("einsum 1", marks=pytest.mark.slow), "sdpa 2"])
def test_a_lora_changes_the_form_with_the_unet(model, name):
    keep_form(model, FIRST, "unet", forms(model)[name], quiet)
    choose(model, FIRST, ROLE)
    before, files = latents(model)[0], contents(model)
    swap.add_loras(model, [LCM])
    changed, part = latents(model)
    assert part.file == "TunedUnet.mlpackage"
    assert np.abs(changed - before).max() > 0.05  # measured 1.3: the LoRA is in it
    shutil.rmtree(Path(os.environ["GLASSINE_CONFIG"]))
    plain, part = latents(model)
    assert part.file == "Unet.mlpackage"
    assert np.abs(changed - plain).max() < CLOSE
    change_loras(model, [])
    assert contents(model) | {"loras/tiny_lcm_lora.safetensors": ""} == files | {"loras/tiny_lcm_lora.safetensors": ""}


@pytest.mark.slow
def test_a_lora_in_the_prompt_changes_the_form_too(model):
    keep_form(model, FIRST, "unet", forms(model)["sdpa 2"], quiet)
    choose(model, FIRST, ROLE)
    before, _ = latents(model)
    changed, part = latents(variant(model, [LCM]))
    assert part.file == "TunedUnet.mlpackage"
    assert np.abs(changed - before).max() > 0.05  # measured 1.3
    assert np.array_equal(latents(model)[0], before)


def test_a_folder_with_loras_in_it_says_why_not(model):
    swap.add_loras(model, [LCM])
    with pytest.raises(PackageError, match="take them out first: glassine lora"):
        keep_form(model, FIRST, "unet", forms(model)["einsum 1"], quiet)


def test_a_form_that_is_gone_is_never_drawn_with(model):
    keep_form(model, FIRST, "unet", forms(model)["einsum 1"], quiet)
    choose(model, FIRST, ROLE)
    drop_forms(model, FIRST)
    with Pipeline.load(model, EngineOptions(engine="portable"), size=FIRST) as pipe:
        assert "is not in this folder" in pipe.notices[0]
        pipe.engine("unet")
        assert pipe.rows("unet") == 2


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The tiny family with control and transparency; read only."""
    return demo.convert_tiny(tmp_path_factory.mktemp("family") / "model", quiet)


def predicted(package):
    """What a UNet makes of inputs that say which row they are of, in rows."""
    engine = open_engine(package, EngineOptions(engine="portable"))
    inputs = {}
    for name, spec in engine.inputs.items():
        rows = [np.random.default_rng([*name.encode(), row]).random(spec.shape[1:]) for row in range(spec.shape[0])]
        inputs[name] = np.stack(rows).astype(np.float32)
    return engine.predict(**inputs)["noise_pred"]


@pytest.mark.parametrize(
    ("role", "attention", "rows"),
    [
        ("transparent_unet", "split", 2),
        pytest.param("controlled_unet", "sdpa", 1, marks=pytest.mark.slow),
        pytest.param("controlled_unet", "split", 2, marks=pytest.mark.slow),
        pytest.param("controlled_transparent_unet", "split", 2, marks=pytest.mark.slow),
    ],
)
def test_every_unet_has_other_forms(family, tmp_path, role, attention, rows):
    model = shutil.copytree(family, tmp_path / "model", copy_function=os.link)
    before = contents(model)
    manifest = Manifest.read(model)
    own = form_of(manifest.parts[role], manifest.tokens)
    layout = "channels_first" if attention == "split" else "channels_last"
    part = keep_form(model, manifest.sizes[0], role, replace(own, rows=rows, attention=attention, layout=layout), quiet)
    assert part.role == f"tuned_{role}"
    usual, other = predicted(model / manifest.parts[role].file), predicted(model / part.file)
    assert len(other) == rows
    assert np.abs(other - usual[:rows]).max() < CLOSE
    drop_forms(model, manifest.sizes[0])
    assert contents(model) == before


def test_control_is_drawn_with_another_form(family, tmp_path):
    """One row a call in the place of two: the residuals come in two calls too."""
    model = shutil.copytree(family, tmp_path / "model", copy_function=os.link)
    manifest = Manifest.read(model)
    canny = Control("canny", np.tile(np.uint8([[[0], [255]]]), (32, 32, 3)))

    def drawn():
        with Pipeline.load(model, EngineOptions(engine="portable")) as pipe:
            settings = {"steps": 3, "seed": 5, "controls": [canny], "output": "latent"}
            return pipe("a red star", **settings), pipe.rows("controlled_unet")

    usual, rows = drawn()
    assert rows == 2
    form = replace(form_of(manifest.parts["controlled_unet"], manifest.tokens), rows=1)
    part = keep_form(model, manifest.sizes[0], "controlled_unet", form, quiet)
    choose(model, manifest.sizes[0], part.role, "controlled_unet")
    other, rows = drawn()
    assert rows == 1
    assert np.abs(other - usual).max() < CLOSE
