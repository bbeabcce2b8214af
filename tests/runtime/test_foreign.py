"""Folders that others made: what is read out of them, and that they draw as Glassine's own with the same networks."""

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coremltools.models.utils import bisect_model, rename_feature

from glassine.convert.control import Control as ConvertedControl
from glassine.convert.control import control_networks
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.errors import EngineError, PackageError
from glassine.manifest import Manifest
from glassine.runtime.control import Control
from glassine.runtime.engine.contract import COMPILED
from glassine.runtime.foreign import is_model, read_model
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request

# coremltools leaves temporary folders to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

APPLE = "Stable_Diffusion_version_runwayml_stable-diffusion-v1-5"
PYTHON = {"TextEncoder": "text_encoder", "Unet": "unet", "VAEDecoder": "vae_decoder", "VAEEncoder": "vae_encoder"}
REQUEST = Request(prompt="a paper boat", negative_prompt="blurry", steps=2, seed=3)


@pytest.fixture
def bundle(tiny_folder, tmp_path):
    """The packages and the vocabulary of a Glassine folder, as in a Swift bundle: nothing else says what they are."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("glassine.json", "*.weights.json"))
    return folder


@pytest.fixture(scope="module")
def latents(tiny_folder):
    with Pipeline.load(tiny_folder) as pipe:
        return pipe.run(REQUEST).finish().latents


def drawn(folder):
    with Pipeline.load(folder) as pipe:
        return pipe.run(REQUEST).finish().latents


def test_a_swift_bundle_draws_the_same(bundle, latents):
    assert np.array_equal(drawn(bundle), latents)


def test_everything_follows_from_the_packages(bundle, tiny_folder):
    ours, theirs = read_model(tiny_folder).manifest, read_model(bundle).manifest
    for name in ("prediction_type", "width", "height", "batch", "tokens", "latent_scale", "clip_skip", "scheduler"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.family == "sd15"
    assert set(theirs.parts) == set(ours.parts)
    for role, part in ours.parts.items():
        assert theirs.parts[role].inputs == part.inputs
        assert theirs.parts[role].outputs == part.outputs


@pytest.mark.parametrize("below", ["split_einsum/packages", "Resources", "model/original/packages"])
def test_the_layouts_of_repositories(bundle, tmp_path, latents, below):
    """Names of Apple's Python code, in the folders of a coreml-* repository, without a vocabulary."""
    root = tmp_path / "coreml-stable-diffusion-v1-5"
    place = root / below
    place.mkdir(parents=True)
    for swift, python in PYTHON.items():
        shutil.move(bundle / f"{swift}.mlpackage", place / f"{APPLE}_{python}.mlpackage")
    opened = root / "model" if below.startswith("model") else root
    assert is_model(opened)
    assert read_model(opened).vocabulary is None
    assert np.array_equal(drawn(opened), latents)


def test_one_of_several_models_is_not_chosen_silently(bundle, tmp_path):
    for name in ("original", "split_einsum"):
        shutil.copytree(bundle, tmp_path / "repository" / name / "packages")
    with pytest.raises(PackageError, match=r"several models; take one of .*original/packages, split_einsum/packages"):
        read_model(tmp_path / "repository")


def test_the_vocabulary_above_the_packages(bundle, tmp_path):
    place = tmp_path / "repository" / "packages"
    shutil.move(bundle, place)
    (place.parent / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.move(place / name, place.parent / "tokenizer" / name)
    assert read_model(tmp_path / "repository").vocabulary == place.parent / "tokenizer"


def edited(package, change):
    """Change a package's specification in place."""
    path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = ct.utils.load_spec(str(package))
    change(spec)
    path.write_bytes(spec.SerializeToString())


def test_single_inputs_and_outputs_may_have_any_name(bundle, latents):
    edited(bundle / "Unet.mlpackage", lambda spec: rename_feature(spec, "noise_pred", "var_7301"))
    edited(bundle / "VAEDecoder.mlpackage", lambda spec: rename_feature(spec, "z", "latent_in"))
    edited(bundle / "TextEncoder.mlpackage", lambda spec: rename_feature(spec, "input_ids", "tokens"))
    with Pipeline.load(bundle) as pipe:
        result = pipe.run(REQUEST).finish()
    assert np.array_equal(result.latents, latents)
    assert result.pixels.shape == (64, 64, 3)


def test_a_text_encoder_that_wants_integers(bundle, latents):
    def change(spec):
        spec.description.input[0].type.multiArrayType.dataType = 131104  # int32
        function = spec.mlProgram.functions["main"]
        function.inputs[0].type.tensorType.dataType = 23

    edited(bundle / "TextEncoder.mlpackage", change)
    assert np.array_equal(drawn(bundle), latents)


def test_a_unet_in_three_chunks(tiny_checkpoint, tmp_path, latents):
    folder = tmp_path / "chunks"
    convert_checkpoint(tiny_checkpoint, folder, ConvertOptions(sizes=((64, 64),), attention="einsum", chunks=3))
    (folder / "glassine.json").unlink()
    assert len(read_model(folder).manifest.parts["unet"].about["chunks"]) == 3
    assert len([name for name in read_model(folder).packages() if name.startswith("unet ")]) == 3
    assert np.array_equal(drawn(folder), latents)


@pytest.mark.slow  # cutting takes coremltools 25 s
def test_chunks_that_coremltools_cut(bundle, tmp_path, latents):
    bisect_model(str(bundle / "Unet.mlpackage"), str(tmp_path), check_output_correctness=False)
    shutil.rmtree(bundle / "Unet.mlpackage")
    for number in (1, 2):
        (chunk,) = tmp_path.glob(f"*chunk{number}.mlpackage")
        chunk.rename(bundle / f"UnetChunk{number}.mlpackage")
    assert read_model(bundle).manifest.parts["unet"].about["chunks"] == ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"]
    assert np.abs(drawn(bundle) - latents).max() / np.abs(latents).max() < 1e-3


def test_a_chunk_that_is_missing(bundle):
    (bundle / "Unet.mlpackage").rename(bundle / "UnetChunk2.mlpackage")
    with pytest.raises(PackageError, match="chunk 1 of the unet is missing"):
        read_model(bundle)


def test_what_is_missing_is_said(bundle, tmp_path):
    (bundle / "Unet.mlpackage").rename(bundle / "Network.mlpackage")
    with pytest.raises(PackageError, match=r"no UNet among TextEncoder\.mlpackage, .*; expected Unet\.mlpackage"):
        read_model(bundle)
    with pytest.raises(PackageError, match=r"no glassine\.json here"):
        read_model(tmp_path / "nowhere")
    assert not is_model(tmp_path)


def test_a_part_of_another_size(bundle, tmp_path):
    def change(spec):
        spec.description.input[0].type.multiArrayType.shape[:] = [1, 4, 12, 12]

    edited(bundle / "VAEDecoder.mlpackage", change)
    with pytest.raises(PackageError, match=r"reads \(1, 4, 12, 12\), the UNet draws 8x8 latent cells"):
        read_model(bundle)


def test_a_unet_made_for_control_nets_draws_without_them(bundle, latents):
    def change(spec):
        residual = spec.description.input.add()
        residual.CopyFrom(spec.description.input[0])
        residual.name = "additional_residual_0"
        function = spec.mlProgram.functions["main"]
        value = function.inputs.add()
        value.CopyFrom(next(given for given in function.inputs if given.name == spec.description.input[0].name))
        value.name = "additional_residual_0"

    edited(bundle / "Unet.mlpackage", change)
    (bundle / "Unet.mlpackage").rename(bundle / "ControlledUnet.mlpackage")
    manifest = read_model(bundle).manifest
    assert "additional_residual_0" in manifest.parts["controlled_unet"].inputs
    assert "additional_residual_0" not in manifest.parts["unet"].inputs
    assert np.array_equal(drawn(bundle), latents)


def test_stable_diffusion_2_is_told_from_its_name_or_size(tmp_path):
    folder = tmp_path / "sd2"
    cases = {
        (64, ""): "epsilon", (96, ""): "v_prediction", (96, "stabilityai/stable-diffusion-2-1-base"): "epsilon",
        (64, "stabilityai/stable-diffusion-2-1"): "v_prediction",
    }  # fmt: skip
    for (cells, version), prediction in cases.items():
        folder.mkdir()
        shapes = {"sample": [2, 4, cells, cells], "timestep": [2], "encoder_hidden_states": [2, 1024, 1, 77]}
        declare(folder / "Unet.mlmodelc", shapes, {"noise_pred": []}, version)
        declare(folder / "TextEncoder.mlmodelc", {"input_ids": [1, 77]}, {"last_hidden_state": []}, version)
        model = read_model(folder)
        assert model.manifest.family == "sd2"
        assert model.manifest.prediction_type == prediction
        assert model.manifest.parts["text_encoder"].about["pad"] == 0
        assert f"predicts {prediction}, because of its" in model.notices[0]
        assert model.manifest.decided["prediction_type"] == model.notices[0]
        shutil.rmtree(folder)


def test_what_it_predicts_may_be_said(bundle, tiny_folder, latents):
    """In a request, which the picture records, or by diffusers' own file beside the packages."""
    said = dataclasses.replace(REQUEST, prediction_type="v_prediction")
    with Pipeline.load(bundle) as pipe:
        result = pipe.run(said).finish()
        assert read_record_of(result)["prediction_type"] == "v_prediction"
    manifest = dataclasses.replace(Manifest.read(tiny_folder), prediction_type="v_prediction")
    manifest.write(bundle)
    expected = drawn(bundle)
    (bundle / "glassine.json").unlink()
    assert np.array_equal(result.latents, expected)
    assert not np.array_equal(result.latents, latents)
    (bundle / "scheduler").mkdir()
    config = bundle / "scheduler" / "scheduler_config.json"
    config.write_text('{"prediction_type": "v_prediction"}', encoding="utf-8")
    assert "as scheduler_config.json says" in read_model(bundle).notices[0]
    assert np.array_equal(drawn(bundle), expected)
    for text in ("[]", "{", '{"prediction_type": "flow"}'):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(PackageError, match=r"scheduler_config\.json: (cannot be read|prediction_type is 'flow')"):
            read_model(bundle)


def read_record_of(result):
    return json.loads(result.text["glassine"])["request"]


@pytest.fixture(scope="module")
def steered_folder(checkpoints, controls, tiny_checkpoint, tmp_path_factory):
    """Our own folder with a control network, to be taken apart."""
    place = tmp_path_factory.mktemp("steered")
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    net = checkpoints.write_safetensors(place / "canny.safetensors", values)
    further = (partial(control_networks, [ConvertedControl(net)]),)
    convert_checkpoint(
        tiny_checkpoint, place / "model", ConvertOptions(sizes=((64, 64),), attention="einsum", further=further)
    )
    return place / "model"


@pytest.mark.parametrize("where", ["beside", "controlnet", "mochi"])
def test_control_networks_of_others(where, steered_folder, tmp_path):
    """Apple's layouts and Mochi Diffusion's: found, listed by name, and drawn with as our own."""
    folder = tmp_path / "app" / "models" / "bundle" if where == "mochi" else tmp_path / "bundle"
    shutil.copytree(steered_folder, folder, ignore=shutil.ignore_patterns("glassine.json", "*.weights.json"))
    net, name = folder / "ControlNet_canny.mlpackage", "canny"
    if where != "beside":
        name = "LllyasvielSdControlnetCanny"
        place = folder / "controlnet" if where == "controlnet" else tmp_path / "app" / "controlnet"
        place.mkdir()
        net = net.rename(place / f"{name}.mlpackage")
    hint = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def steered(folder, name):
        with Pipeline.load(folder) as pipe:
            settings = {"prompt": "a paper boat", "steps": 2, "seed": 3}
            return pipe(controls=[Control(name, hint, weight=0.7)], output="latent", **settings)

    model = read_model(folder)
    assert model.packages()[f"control:{name}"].samefile(net)
    assert model.notices == ()
    assert np.array_equal(steered(folder, name), steered(steered_folder, "canny"))


def test_control_networks_that_do_not_fit_are_named(bundle, steered_folder, tmp_path):
    net = bundle / "controlnet" / "Canny.mlpackage"
    shutil.copytree(steered_folder / "ControlNet_canny.mlpackage", net)
    assert "Canny have nowhere to go" in read_model(bundle).notices[0]
    shutil.copytree(steered_folder / "ControlledUnet.mlpackage", bundle / "ControlledUnet.mlpackage")
    assert read_model(bundle).nets == {"Canny": net}

    def change(spec):
        hint = next(given for given in spec.description.input if given.name == "encoder_hidden_states")
        hint.type.multiArrayType.shape[1] *= 2

    edited(net, change)
    model = read_model(bundle)
    assert model.nets == {}
    said = "control network Canny left out: it is for another size or family than the model's ControlledUnet"
    assert model.notices == (said,)
    edited(net, lambda spec: rename_feature(spec, "controlnet_cond", "picture"))
    (notice,) = read_model(bundle).notices
    assert notice.startswith("control network Canny left out: it reads sample, ")
    shutil.rmtree(net / "Data")  # what lies on a shared shelf breaks no model
    assert "Canny left out" in read_model(bundle).notices[0]


def test_what_sdxl_and_lcm_read(tmp_path):
    context = [1, 2048, 1, 77]
    shapes = {"sample": [1, 4, 96, 128], "timestep": [1], "encoder_hidden_states": context, "text_embeds": [1, 1280]}
    declare(tmp_path / "Unet.mlmodelc", {**shapes, "time_ids": [6], "timestep_cond": [1, 256]}, {"noise_pred": []})
    for stranger in ("SafetyChecker", "MultilingualTextEncoder", "Unet2", "Upscaler"):
        declare(tmp_path / f"{stranger}.mlmodelc", {"a": [1], "b": [1]}, {})  # parts that nothing here needs
    declare(tmp_path / "UnetRefiner.mlmodelc", {**shapes, "time_ids": [1, 5]}, {"noise_pred": []})
    for encoder in ("TextEncoder", "TextEncoder2"):
        declare(tmp_path / f"{encoder}.mlmodelc", {"input_ids": [1, 77]}, {"hidden_embeds": [], "pooled_outputs": []})
    model = read_model(tmp_path)
    manifest = model.manifest
    assert (manifest.family, manifest.width, manifest.height, manifest.batch) == ("sdxl", 1024, 768, 1)
    assert (manifest.latent_scale, manifest.clip_skip, manifest.tokens) == (0.13025, 2, 77)
    assert set(manifest.parts) == {"unet", "text_encoder", "text_encoder_2"}
    assert manifest.defaults["sampler"] == "lcm"
    assert [role for role, part in manifest.parts.items() if part.about.get("pad") == 0] == ["text_encoder_2"]
    assert model.refiner.family == "sdxl_refiner"
    assert set(model.refiner.parts) == {"unet", "text_encoder_2"}
    assert model.refiner.parts["unet"].inputs["time_ids"] == ((1, 5), "float16")


def test_a_context_in_the_other_layout(tmp_path):
    shapes = {"sample": [2, 4, 8, 8], "timestep": [1], "encoder_hidden_states": [2, 77, 768]}
    declare(tmp_path / "Unet.mlmodelc", shapes, {"out": []})
    part = read_model(tmp_path).manifest.parts["unet"]
    assert part.inputs["encoder_hidden_states"][0] == (2, 768, 1, 77)
    assert part.inputs["timestep"][0] == (2,)


def test_stable_diffusion_3_is_refused(tmp_path):
    declare(tmp_path / "MultiModalDiffusionTransformer.mlmodelc", {}, {})
    with pytest.raises(PackageError, match="Stable Diffusion 3"):
        read_model(tmp_path)


def test_a_network_that_is_no_unet(bundle):
    edited(bundle / "Unet.mlpackage", lambda spec: rename_feature(spec, "timestep", "time"))
    with pytest.raises(PackageError, match=r"its inputs are sample .*; expected sample \(B, C, h, w\), timestep and"):
        read_model(bundle)


def declare(folder, inputs, outputs, version=""):
    """A .mlmodelc of which nothing is there but what can be read without Core ML."""

    def schema(shapes):
        return [
            {
                "hasShapeFlexibility": "0", "isOptional": "0", "dataType": "Float16", "shape": str(list(shape)),
                "name": name, "type": "MultiArray",
            }
            for name, shape in shapes.items()
        ]  # fmt: skip

    folder.mkdir()
    (folder / "coremldata.bin").write_bytes(b"")
    said = {"inputSchema": schema(inputs), "outputSchema": schema(outputs), "version": version}
    (folder / "metadata.json").write_text(json.dumps([said]), encoding="utf-8")
    return folder


def compiled(package):
    """A .mlmodelc beside a package."""
    declared = ct.utils.load_spec(str(package)).description
    shapes = [{f.name: f.type.multiArrayType.shape for f in side} for side in (declared.input, declared.output)]
    return declare(package.with_suffix(COMPILED), *shapes)


def test_compiled_models_are_read_without_core_ml(bundle):
    expected = read_model(bundle).manifest
    for package in sorted(bundle.glob("*.mlpackage")):
        compiled(package)
        shutil.rmtree(package)
    found = read_model(bundle).manifest
    assert found.sizes == expected.sizes
    for role, part in expected.parts.items():
        assert found.parts[role].file == Path(part.file).with_suffix(COMPILED).name
        assert {k: shape for k, (shape, _) in found.parts[role].inputs.items()} == {
            k: shape for k, (shape, _) in part.inputs.items()
        }
    if sys.platform != "darwin":
        with pytest.raises(EngineError, match=r"TextEncoder\.mlmodelc: compiled for Core ML, which is macOS's"):
            drawn(bundle)


@pytest.mark.parametrize(("platform", "suffix"), [("linux", ".mlpackage"), ("darwin", COMPILED)])
def test_what_runs_here_is_taken(bundle, monkeypatch, platform, suffix):
    monkeypatch.setattr(sys, "platform", platform)
    compiled(bundle / "Unet.mlpackage")
    assert read_model(bundle).manifest.parts["unet"].file == f"Unet{suffix}"


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"inputSchema": [{}]}]'])
def test_compiled_models_without_a_readable_description(bundle, text):
    folder = compiled(bundle / "Unet.mlpackage")
    shutil.rmtree(bundle / "Unet.mlpackage")
    (folder / "metadata.json").write_text(text, encoding="utf-8")
    with pytest.raises(PackageError, match="not what coremlcompiler writes"):
        read_model(bundle)
    (folder / "metadata.json").unlink()
    with pytest.raises(PackageError, match=r"has no metadata\.json"):
        read_model(bundle)
