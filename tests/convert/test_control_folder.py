"""Control networks in a model folder: added to it, linked, judged, and never half there."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from glassine.cli import main
from glassine.convert import addition
from glassine.convert.addition import add_networks
from glassine.convert.control import Control, control_networks
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.package import read_records
from glassine.convert.verify import verify_folder
from glassine.errors import PackageError
from glassine.manifest import WEIGHT_FILE, Manifest
from glassine.runtime.engine import EngineOptions

PORTABLE = EngineOptions(engine="portable")


def silent(_: object) -> None:
    """Report to nobody."""


def add(folder: Path, file: Path, *, overwrite: bool = False, **how: object) -> Manifest:
    return add_networks(folder, [partial(control_networks, [Control(file, **how)])], silent, overwrite=overwrite)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, but for what names a folder for its own use."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != ".glassine"
    }


@pytest.fixture(scope="module")
def net(checkpoints, controls, tmp_path_factory) -> Path:
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    return checkpoints.write_safetensors(tmp_path_factory.mktemp("net") / "canny.safetensors", values)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_added_is_as_converted_together(folder, net, tiny_checkpoint, tmp_path):
    before = tree(folder)
    manifest = add(folder, net)
    assert list(manifest.parts)[-2:] == ["control:canny", "controlled_unet"]
    after = tree(folder)
    assert {name: after[name] for name in before if name != "glassine.json"} == {
        name: data for name, data in before.items() if name != "glassine.json"
    }
    plain, controlled = (folder / f"{name}.mlpackage" / WEIGHT_FILE for name in ("Unet", "ControlledUnet"))
    assert plain.samefile(controlled)  # not a byte of the UNet is written
    options = ConvertOptions(
        sizes=((64, 64),), attention="einsum", further=(partial(control_networks, [Control(net)]),), name="tiny"
    )
    convert_checkpoint(tiny_checkpoint, tmp_path / "together", options)
    together = tree(tmp_path / "together")
    assert {name: data for name, data in after.items() if name != "glassine.json"} == {
        name: data for name, data in together.items() if name != "glassine.json"
    }
    ours, theirs = (Manifest.read(place).parts for place in (folder, tmp_path / "together"))
    assert ours == theirs


def test_a_second_net_shares_the_controlled_unet(folder, net):
    add(folder, net, name="one")
    before = tree(folder / "ControlledUnet.mlpackage")
    with pytest.raises(PackageError, match=r"has a control:one already; pass --overwrite"):
        add(folder, net, name="one")
    manifest = add(folder, net, name="two", batch=1)
    assert {"control:one", "control:two", "controlled_unet"} < set(manifest.parts)
    assert manifest.parts["control:two"].inputs["sample"][0][0] == 1
    assert tree(folder / "ControlledUnet.mlpackage") == before
    manifest = add(folder, net, name="one", batch=3, overwrite=True)
    assert manifest.parts["control:one"].inputs["sample"][0][0] == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_addition_changes_nothing(folder, net, monkeypatch, error):
    before = tree(folder)
    written = addition.write_packages

    def interrupted(place, packages, report):
        written(place, packages[:1], report)
        raise error

    monkeypatch.setattr(addition, "write_packages", interrupted)
    with pytest.raises(PackageError if isinstance(error, OSError) else KeyboardInterrupt):
        add(folder, net)
    assert tree(folder) == before
    monkeypatch.undo()
    assert "control:canny" in add(folder, net).parts


def test_deltas_to_what_the_folder_holds(checkpoints, controls, folder, tiny_checkpoint, tmp_path):
    """Equal to deltas to the checkpoint but for queries, whose factor was rounded into them: half an ulp off."""
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY), seed=3)
    named = {f"control_model.{key}": value for key, value in values.items()} | {"difference": np.ones(1, np.float32)}
    file = checkpoints.write_safetensors(tmp_path / "delta.safetensors", named)
    add(folder, file)
    options = ConvertOptions(
        sizes=((64, 64),), attention="einsum", further=(partial(control_networks, [Control(file)]),)
    )
    convert_checkpoint(tiny_checkpoint, tmp_path / "together", options)
    manifest = Manifest.read(folder)
    stored = [
        {record.data_offset: record for record in read_records(place / "ControlNet_delta.mlpackage" / WEIGHT_FILE)}
        for place in (folder, tmp_path / "together")
    ]
    assert manifest.parts["control:delta"].about["layout"] == "difference"
    assert stored[0] == stored[1]
    ours, theirs = (
        np.fromfile(place / "ControlNet_delta.mlpackage" / WEIGHT_FILE, np.uint8)
        for place in (folder, tmp_path / "together")
    )
    changed = 0
    for at, record in stored[0].items():
        one, other = (data[at : at + record.nbytes].view(record.dtype) for data in (ours, theirs))
        if not np.array_equal(one, other):
            changed += 1
            # Queries here are below 1/4 in size: half an ulp of those is 2**-14.
            np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2**-10, atol=2**-13)
    assert changed == 10  # the queries of five blocks; two more have heads of 16, whose factor is a power of two


def test_into_a_model_in_chunks(checkpoints, controls, tmp_path):
    """The controlled UNet is cut between the same weights as the plain one, so that every chunk is a link."""
    sizes = checkpoints.TINY_SDXL
    base = checkpoints.write_checkpoint(tmp_path / "xl.safetensors", sizes)
    values = checkpoints.values(controls.ldm_control(checkpoints, sizes))
    file = checkpoints.write_safetensors(tmp_path / "canny.safetensors", values)
    out = tmp_path / "model"
    convert_checkpoint(base, out, ConvertOptions(sizes=((64, 64),), chunks=4))
    manifest = add(out, file)
    plain, controlled = (manifest.parts[key].about["chunks"] for key in ("unet", "controlled_unet"))
    assert len(plain) == len(controlled) == 4
    for one, other in zip(plain, controlled, strict=True):
        assert (out / one / WEIGHT_FILE).samefile(out / other / WEIGHT_FILE)
    (judged,) = verify_folder(out, base, parts=["controlled_unet"], options=PORTABLE)
    assert judged.psnr > 60


def test_a_union_net_is_two_packages_that_verify_judges(checkpoints, controls, tmp_path):
    sizes = checkpoints.TINY_SDXL
    base = checkpoints.write_checkpoint(tmp_path / "xl.safetensors", sizes)
    file = checkpoints.write_safetensors(
        tmp_path / "union.safetensors", checkpoints.values(controls.union(checkpoints, sizes))
    )
    convert_checkpoint(base, tmp_path / "model", ConvertOptions(sizes=((64, 64),), attention="einsum", part="unet"))
    manifest = add(tmp_path / "model", file)
    assert manifest.parts["hint:union"].file == "ControlHint_union.mlpackage"
    reports = verify_folder(tmp_path / "model", file, options=PORTABLE)
    assert [report.role for report in reports] == ["control:union", "hint:union"]
    assert min(report.psnr for report in reports) > 60, reports


def test_verify_judges_what_a_control_file_made(checkpoints, controls, folder, net, tiny_checkpoint, tmp_path):
    shapes = controls.adapter((32, 64, 64, 64), 3 * 64)
    adapter = checkpoints.write_safetensors(tmp_path / "t2i_depth.safetensors", checkpoints.values(shapes))
    add(folder, net)
    add(folder, adapter)
    for file, key in ((net, "control:canny"), (adapter, "adapter:t2i_depth")):
        (report,) = verify_folder(folder, file, options=PORTABLE)
        assert report.role == key
        assert report.psnr > 60  # measured 97
    steered = verify_folder(folder, tiny_checkpoint, parts=["controlled_unet", "adapted_unet"], options=PORTABLE)
    assert [report.psnr > 60 for report in steered] == [True, True]
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY), seed=1)
    other = checkpoints.write_safetensors(tmp_path / "canny.safetensors", values)
    with pytest.raises(PackageError, match=r"nothing in it was made of .*canny.safetensors"):
        verify_folder(folder, other, options=PORTABLE)
    with pytest.raises(PackageError, match=r"unet cannot be compared .*, only control:canny"):
        verify_folder(folder, net, parts=["unet"], options=PORTABLE)


def test_the_command(folder, net, tiny_checkpoint, tmp_path):
    run = CliRunner().invoke
    done = run(main, ["convert", str(net), "--base", str(folder), "--name", "edges"])
    assert done.exit_code == 0, done.output
    assert "control:edges" in Manifest.read(folder).parts
    done = run(main, ["inspect", str(folder)])
    assert "control:edges (ControlNet_edges.mlpackage)" in done.output
    done = run(main, ["convert", str(net), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "this is a ControlNet" in done.output
    assert "glassine convert FILE --base FOLDER" in done.output
    done = run(main, ["convert", str(tiny_checkpoint), "--base", str(folder), "--control", str(net)])
    assert done.exit_code == 2
    assert "the file to add is SOURCE itself" in done.output
