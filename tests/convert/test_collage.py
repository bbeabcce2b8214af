"""The UNet for collages in a model folder: on the plain one's weights, beside control, judged, and swapped with it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from glassine.cli import main
from glassine.convert.addition import add_networks
from glassine.convert.collage import collage_networks
from glassine.convert.control import Control, control_networks
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.lora import LoraFile
from glassine.convert.swap import add_loras, change_loras
from glassine.convert.verify import verify_folder
from glassine.errors import ConversionError, PackageError
from glassine.manifest import WEIGHT_FILE, Manifest
from glassine.runtime.engine import EngineOptions, open_engine

PORTABLE = EngineOptions(engine="portable")
FAMILY = Path(__file__).parents[2] / "models" / "tiny"
MASKS = [f"collage_masks_{level}" for level in range(3)]  # the deepest level of these small ones reads no text


def silent(_: object) -> None:
    """Report to nobody."""


def collage(layers: int = 2) -> partial:
    return partial(collage_networks, layers)


def add(folder: Path, *further: partial, overwrite: bool = False) -> Manifest:
    return add_networks(folder, further, silent, overwrite=overwrite)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but glassine.json, and what is in a folder for its own use."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (".glassine", "glassine.json")
    }


def weights(folder: Path, package: str) -> Path:
    return folder / f"{package}.mlpackage" / WEIGHT_FILE


@pytest.fixture(scope="module")
def net(checkpoints, controls, tmp_path_factory) -> partial:
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    file = checkpoints.write_safetensors(tmp_path_factory.mktemp("net") / "canny.safetensors", values)
    return partial(control_networks, [Control(file)])


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_added_is_as_converted_together(folder, tiny_checkpoint, tmp_path):
    before = tree(folder)
    part = add(folder, collage()).parts["collage_unet"]
    after = tree(folder)
    assert {name: after[name] for name in before} == before
    assert weights(folder, "Unet").samefile(weights(folder, "CollageUnet"))  # not a byte of the UNet is written
    assert part.inputs["collage_table"] == ((2, 77, 1, 4), "float16")
    assert [part.inputs[name][0] for name in MASKS] == [(2, 4, side, side) for side in (8, 4, 2)]
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", further=(collage(),), name="tiny")
    convert_checkpoint(tiny_checkpoint, tmp_path / "together", options)
    assert tree(tmp_path / "together") == after
    assert Manifest.read(tmp_path / "together").parts == Manifest.read(folder).parts


def test_with_control_in_any_order(folder, net, tmp_path):
    """Whatever comes first, there is a UNet that takes what the net gives and draws a collage."""
    other = shutil.copytree(folder, tmp_path / "other")
    add(folder, net)
    add(folder, collage())
    add(other, collage())
    add(other, net)
    one, two = (Manifest.read(place).parts for place in (folder, other))
    assert one == two
    assert tree(folder) == tree(other)
    both, plain, takes = (one[f"{how}unet"].inputs for how in ("controlled_collage_", "collage_", "controlled_"))
    assert both == {**plain, **takes}
    assert weights(folder, "ControlledCollageUnet").samefile(weights(folder, "Unet"))


def test_more_layers_take_the_place_of_fewer(folder, net):
    add(folder, net, collage(2))
    before = tree(folder)
    with pytest.raises(PackageError, match="has a collage_unet already; pass --overwrite to replace it"):
        add(folder, collage(5))
    assert tree(folder) == before
    parts = add(folder, collage(5), overwrite=True).parts
    for key in ("collage_unet", "controlled_collage_unet"):
        assert parts[key].inputs["collage_table"][0] == (2, 77, 1, 10)
        assert parts[key].config["collage"] == 5
    assert weights(folder, "CollageUnet").samefile(weights(folder, "Unet"))


@pytest.mark.parametrize("layers", [0, 65, -1])
def test_layers_that_cannot_be(folder, layers):
    with pytest.raises(ConversionError, match=f"collage: {layers} layers, expected 1 to 64"):
        add(folder, collage(layers))


@pytest.mark.parametrize(
    "family", [pytest.param("sd15", marks=pytest.mark.slow), pytest.param("sd2", marks=pytest.mark.slow), "sdxl"]
)
def test_every_family_in_chunks_and_sizes(checkpoints, tmp_path, family):
    """Judged by PyTorch on the checkpoint's weights; chunks share the UNet's files one by one."""
    sizes = ((64, 64),) if family == "sdxl" else ((64, 64), (96, 64))
    source = checkpoints.write_checkpoint(tmp_path / "model.safetensors", checkpoints.TINY_FAMILIES[family])
    options = ConvertOptions(sizes=sizes, chunks=2, further=(collage(),))
    manifest = convert_checkpoint(source, tmp_path / "model", options)
    for size in ("", "_96x64")[: len(sizes)]:
        part, unet = (manifest.parts[f"{name}{size}"] for name in ("collage_unet", "unet"))
        assert len(part.about["chunks"]) == 2
        for own, plain in zip(part.about["chunks"], unet.about["chunks"], strict=True):
            assert weights(tmp_path / "model", own.split(".")[0]).samefile(
                weights(tmp_path / "model", plain.split(".")[0])
            )
    keys = ["collage_unet", "collage_unet_96x64"][: len(sizes)]
    reports = verify_folder(tmp_path / "model", source, parts=keys, options=PORTABLE)
    assert {report.role: report.psnr >= 80 for report in reports} == dict.fromkeys(keys, True)  # measured 91
    # The same into a folder that is there.
    plain = ConvertOptions(sizes=sizes, chunks=2, name="model")
    convert_checkpoint(source, tmp_path / "other", plain)
    add(tmp_path / "other", collage())
    assert tree(tmp_path / "other") == tree(tmp_path / "model")


def test_a_lora_reaches_it(tmp_path):
    """As the plain one with the LoRA, where nothing is biased; taken out again, byte for byte as before."""
    model = tmp_path / "model"
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", tokenizer=FAMILY, further=(collage(),))
    convert_checkpoint(FAMILY / "tiny.safetensors", model, options)
    before = tree(model)
    add_loras(model, [LoraFile(FAMILY / "tiny_lcm_lora.safetensors", 0.8, 0.0)])
    assert (
        weights(model, "CollageUnet").read_bytes()
        != before["CollageUnet.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]
    )
    rng = np.random.default_rng(0)
    engines = [open_engine(model / f"{name}.mlpackage", PORTABLE) for name in ("Unet", "CollageUnet")]
    inputs = {
        name: rng.standard_normal(spec.shape).astype(np.float32)
        if "collage" not in name
        else np.zeros(spec.shape, np.float32)
        for name, spec in engines[1].inputs.items()
    }
    inputs["timestep"] = np.array([500, 20], np.float32)
    plain, biased = (
        np.array(engine.predict(**{name: inputs[name] for name in engine.inputs})["noise_pred"]) for engine in engines
    )
    for engine in engines:
        engine.close()
    assert np.abs(plain - biased).max() <= 2e-5  # measured 4e-6: fused operations sum in another order
    change_loras(model, [])
    assert {name: tree(model)[name] for name in before} == before


def test_the_command(folder, net):
    def glassine(*words: object):
        return CliRunner().invoke(main, ["convert", *map(str, words)])

    assert glassine("--base", folder, "--collage", 3).exit_code == 0
    assert Manifest.read(folder).parts["collage_unet"].config["collage"] == 3
    again = glassine("--base", folder, "--collage")
    assert again.exit_code == 1
    assert "has a collage_unet already" in again.output
    assert glassine("--base", folder, "--collage", "--overwrite").exit_code == 0
    assert Manifest.read(folder).parts["collage_unet"].config["collage"] == 8
    for words, said in (
        (("--base", folder), "Missing argument 'SOURCE'"),
        (("--collage",), "Missing argument 'SOURCE'"),
        (("--collage", "0", "--base", folder), "0 is not in the range 1<=x<=64"),
        (("--collage", "model.safetensors", "out"), "'model.safetensors' is not a valid integer range"),
    ):
        refused = glassine(*words)
        assert refused.exit_code == 2
        assert said in refused.output
