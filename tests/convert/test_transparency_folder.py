"""LayerDiffuse's networks in a folder: beside a checkpoint or added later, true to their source, one weight.bin."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from glassine.convert import addition
from glassine.convert.addition import add_networks
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.lora import LoraFile
from glassine.convert.network import Network, Size
from glassine.convert.program import Requests
from glassine.convert.swap import change_loras, keep_file
from glassine.convert.transparency import TransparentFile, transparent_networks
from glassine.convert.verify import verify_folder
from glassine.errors import CheckpointError, ConversionError, PackageError
from glassine.manifest import WEIGHT_FILE, Manifest, MergedLora
from glassine.models.config import UNetConfig, restored
from glassine.models.sharing import attention_units
from glassine.runtime.engine import open_engine

TINY = Path(__file__).parents[2] / "models/tiny"
OPTIONS = ConvertOptions(sizes=((64, 64),), attention="einsum")  # as `tiny_folder`
FRAMES = {"transparent": 1, "fg2bg": 2}
Files = dict[str, TransparentFile]


def silent(_: object) -> None:
    pass


def listed(*files: TransparentFile) -> Callable[..., list[Network]]:
    return partial(transparent_networks, files)


@pytest.fixture(scope="module")
def files(checkpoints: ModuleType, layerdiffuse: ModuleType, tiny_checkpoint, tmp_path_factory) -> Files:
    """Random UNets for the random tiny checkpoint, the decoder and the encoder that ship."""
    place = tmp_path_factory.mktemp("layers")
    unet = detect(open_checkpoint(tiny_checkpoint)).family.unet
    files = {
        what: TransparentFile(path=TINY / f"tiny_transparent_{what}.safetensors") for what in ("decoder", "encoder")
    }
    for seed, (kind, frames) in enumerate(FRAMES.items()):
        shapes = layerdiffuse.sharing_shapes(attention_units(unet), unet.context_dim, frames, control=kind == "fg2bg")
        path = place / f"layer_sd15_{kind}.safetensors"
        checkpoints.write_safetensors(path, checkpoints.values(shapes, seed), dtype="F16")
        files[kind] = TransparentFile(path=path)
    return files


@pytest.fixture(scope="module")
def folder(files, tiny_folder, tmp_path_factory) -> Path:
    """`tiny_folder` with all of them added; read only."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(tiny_folder, folder)
    add_networks(folder, [listed(files["transparent"])], silent)
    add_networks(folder, [listed(files["fg2bg"], files["decoder"], files["encoder"])], silent)
    return folder


def inode(folder: Path, name: str) -> int:
    return (folder / f"{name}.mlpackage" / WEIGHT_FILE).stat().st_ino


def test_the_folder_says_what_is_in_it(folder):
    parts = Manifest.read(folder).parts
    assert list(parts)[4:] == [
        "transparent_unet", "fg2bg_unet", "fg2bg_control", "transparent_decoder", "transparent_encoder",
    ]  # fmt: skip
    patched = [parts[key] for key in ("transparent_unet", "fg2bg_unet")]
    assert [part.about["frames"] for part in patched] == [["fg"], ["bg", "blend"]]
    assert [part.about["decoded"] for part in patched] == [["fg"], []]
    assert [part.about["control"] for part in patched] == [None, "fg"]
    assert len({part.about["patch_sha256"] for part in patched}) == 2
    made_of = {(part.source, part.source_sha256) for part in (parts["unet"], *patched)}
    assert len(made_of) == 1
    assert parts["transparent_encoder"].about == {"family": "sd15", "offset_scale": 1.0}
    # Rows are samples x frames.
    assert [part.inputs["sample"][0][0] for part in (parts["unet"], *patched)] == [2, 2, 4]


def test_control_outputs_are_the_inputs_of_its_unet(folder):
    parts = Manifest.read(folder).parts
    given = {name: spec for name, spec in parts["fg2bg_unet"].inputs.items() if name.endswith("_control")}
    assert given == parts["fg2bg_control"].outputs
    assert len(given) == len(attention_units(restored(UNetConfig, parts["unet"].config)))


def test_base_and_patched_unets_live_in_one_file(folder, tiny_folder):
    assert inode(folder, "Unet") == inode(folder, "TransparentUnet") == inode(folder, "Fg2bgUnet")
    assert inode(folder, "Fg2bgControl") != inode(folder, "Unet")
    before, after = ((place / "Unet.mlpackage" / WEIGHT_FILE).read_bytes() for place in (tiny_folder, folder))
    assert after[64 : len(before)] == before[64:]  # what was there is where it was
    assert len(after) > len(before)


def test_every_part_is_true_to_its_source(folder, files, tiny_checkpoint):
    reports = [report for file in files.values() for report in verify_folder(folder, file.path)]
    reports += verify_folder(folder, tiny_checkpoint, parts=["unet"])
    assert {report.role for report in reports} == {*list(Manifest.read(folder).parts)[4:], "unet"}
    assert all(report.psnr > 60 for report in reports), reports  # measured 66 and more


def test_beside_a_checkpoint_they_are_the_same(folder, files, tiny_checkpoint, tmp_path):
    further = (listed(files["transparent"]),)
    convert_checkpoint(tiny_checkpoint, tmp_path / "m", dataclasses.replace(OPTIONS, part="unet", further=further))
    assert inode(tmp_path / "m", "Unet") == inode(tmp_path / "m", "TransparentUnet")
    parts = [Manifest.read(place).parts["transparent_unet"] for place in (folder, tmp_path / "m")]
    assert parts[0] == parts[1]
    for key in ("unet", "transparent_unet"):
        one, other = (run(place, key)["noise_pred"] for place in (folder, tmp_path / "m"))
        error = np.sqrt(np.mean((other - one) ** 2)) / np.abs(one).max()
        # Added later, the query's weights are read back from fp16 with their factor in them.
        assert error == 0 if key == "unet" else error < 1e-3, key  # measured 6e-5


@pytest.mark.parametrize(
    ("sizes", "written"),
    [
        (((512, 512),), {(512, 512): (512, 512)}),
        (((96, 64), (64, 128)), {(96, 64): (64, 128), (64, 128): (128, 64), (64, 96): (128, 64), (128, 64): (64, 128)}),
    ],
)
def test_decoders_are_written_for_the_turned_picture_too_at_multiples_of_64(files, folder, sizes, written):
    base = addition.base_of(folder, Manifest.read(folder))
    base = dataclasses.replace(base, options=dataclasses.replace(base.options, sizes=sizes))
    (network,) = transparent_networks([files["decoder"]], base)
    assert network.sizes == tuple(written)
    asked: dict[Size, tuple[int, int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for size in network.sizes:
            name = "glassine.models.transparency.transparent_decoder"
            patch.setattr(name, lambda *_, height, width, size=size, **__: asked.update({size: (height, width)}))
            network.write(Requests(), size)
    assert asked == written


def run(folder: Path, key: str) -> dict[str, np.ndarray]:
    engine = open_engine(folder / Manifest.read(folder).parts[key].file)
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in engine.inputs.items()}
    try:
        return {name: np.array(value) for name, value in engine.predict(**inputs).items()}
    finally:
        engine.close()


def test_a_widened_unet_reads_clean_latents_beside_the_noise(checkpoints, tmp_path):
    """SDXL's conditional patches: two more latents, an input of their own."""
    source = checkpoints.write_checkpoint(tmp_path / "xl.safetensors", checkpoints.TINY_FAMILIES["sdxl"])
    shapes = detect(open_checkpoint(source)).parts["unet"].shapes
    changed = {name: shape for name, shape in shapes.items() if "attentions" not in name and "_embedding" not in name}
    changed["conv_in.weight"] = (changed["conv_in.weight"][0], 12, 3, 3)
    patch = tmp_path / "fgble2bg.safetensors"
    checkpoints.write_safetensors(patch, checkpoints.values(changed, 5), dtype="F16")
    further = (listed(TransparentFile(path=patch, strength=0.5)),)
    options = dataclasses.replace(OPTIONS, part="unet", further=further)
    convert_checkpoint(source, tmp_path / "m", options)
    part = Manifest.read(tmp_path / "m").parts["fgble2bg_unet"]
    assert {name: part.inputs[name][0] for name in ("sample", "condition")} == {
        "sample": (2, 4, 8, 8),
        "condition": (2, 8, 8, 8),
    }
    assert part.about["conditions"] == ["fg", "blend"]
    assert part.about["strength"] == 0.5
    (report,) = verify_folder(tmp_path / "m", patch)
    assert report.role == "fgble2bg_unet"
    assert report.psnr > 60  # measured 73


@pytest.fixture
def plain(folder, tmp_path) -> Path:
    """A copy of the folder, of which a test may spoil what it likes."""
    shutil.copytree(folder, tmp_path / "plain")
    return tmp_path / "plain"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_is_replaced_only_on_request(plain, files):
    encoder = [listed(dataclasses.replace(files["encoder"], offset_scale=300.0))]
    with pytest.raises(PackageError, match="has a transparent_encoder already; pass --overwrite"):
        add_networks(plain, encoder, silent)
    before = contents(plain)
    add_networks(plain, encoder, silent, overwrite=True, dry_run=True)
    assert contents(plain) == before
    add_networks(plain, encoder, silent, overwrite=True)
    assert Manifest.read(plain).parts["transparent_encoder"].about["offset_scale"] == 300
    after = contents(plain)
    assert {name for name in before if before[name] != after[name]} == {"glassine.json"}
    assert set(after) == set(before)


@pytest.mark.parametrize("stage", ["plan_packages", "write_packages", "parts", "_continue_indices"])
def test_an_interrupt_leaves_the_folder_as_it_was(plain, files, monkeypatch, stage):
    before = contents(plain)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(addition, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        add_networks(plain, [listed(files["encoder"])], silent, overwrite=True)
    left = {name for name in contents(plain) if not name.startswith(".glassine")}
    assert {name: content for name, content in contents(plain).items() if name in left} == before


def test_folders_that_nothing_can_be_added_to(plain, files, tmp_path):
    manifest = Manifest.read(plain)
    lora = MergedLora(name="ink", sha256="0", unet=1.0, text=1.0, removable=True)
    dataclasses.replace(manifest, loras=(lora,)).write(plain)
    with pytest.raises(PackageError, match=r"has LoRAs in its weights \(ink\).* glassine lora .* remove ink"):
        add_networks(plain, [listed(files["encoder"])], silent, overwrite=True)
    dataclasses.replace(manifest, parts={k: v for k, v in manifest.parts.items() if k != "unet"}).write(plain)
    with pytest.raises(PackageError, match="has no UNet, which further networks would have to fit"):
        add_networks(plain, [listed(files["encoder"])], silent)
    with pytest.raises(PackageError, match=r"no glassine\.json here"):
        add_networks(tmp_path, [listed(files["encoder"])], silent)


def test_damaged_files_are_refused_and_change_nothing(plain, files, tmp_path):
    before = contents(plain)
    decoder = files["decoder"].path.read_bytes()
    for name, content, message in (
        ("short", decoder[:-1000], "ends too early|truncated|shorter|outside"),
        ("noise", b"\x10" * 1000, "header"),
        ("reshaped", decoder.replace(b'"shape":[12,12,3,3]', b'"shape":[12,3,12,3]', 1), "another shape"),
        (
            "renamed",
            decoder.replace(b"down_blocks.0.resnets.1.conv2.bias", b"down_blocks.0.resnets.1.conv2.boas"),
            "missing",
        ),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises((CheckpointError, ConversionError), match=message):
            add_networks(
                plain,
                [listed(TransparentFile(path=path, kind="decoder"))],
                silent,
                overwrite=True,
            )
    assert contents(plain) == before


def test_a_lora_reaches_every_frame(checkpoints, plain, tmp_path):
    """The frames' matrices lie one below the other in one record; the LoRA was trained for one of them."""
    unet = addition.PackagedWeights(plain, Manifest.read(plain), "fg2bg_unet")
    name = next(name for name in unet.shapes if name.endswith("attn1.to_v.weight"))
    before = stored(unet, name)
    rows, columns = before.shape[0] // 2, before.shape[1]
    rng = np.random.default_rng(7)
    up, down = rng.standard_normal((rows, 2)).astype(np.float16), rng.standard_normal((2, columns)).astype(np.float16)
    module = f"unet.{name.removesuffix('.weight')}"
    path = tmp_path / "ink.safetensors"
    checkpoints.write_safetensors(path, {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}, dtype="F16")
    change_loras(plain, [LoraFile(keep_file(plain, path), 0.5, 0.5)])
    after = stored(addition.PackagedWeights(plain, Manifest.read(plain), "fg2bg_unet"), name)
    difference = 0.5 * up.astype(np.float32) @ down.astype(np.float32)
    np.testing.assert_allclose(after - before, np.concatenate([difference, difference]), atol=5e-3)  # fp16 of 4


def stored(weights: addition.PackagedWeights, name: str) -> np.ndarray:
    shape = weights.shapes[name]
    return weights.read(name, 0, int(np.prod(shape))).astype(np.float32).reshape(shape)
