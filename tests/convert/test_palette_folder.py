"""Model folders whose UNet is stored in few bits: what can be put into them afterwards, and what it takes."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from glassine.convert.addition import add_networks
from glassine.convert.control import Control, control_networks
from glassine.convert.extras import Extras
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.ingredients import exact_unet
from glassine.convert.lora import LoraFile
from glassine.convert.palettize import Form, Palette, encode
from glassine.convert.swap import add_loras, remove_loras, variant
from glassine.convert.verify import note_palettes, verify_folder
from glassine.errors import PackageError
from glassine.manifest import WEIGHT_FILE, Manifest
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.engine.portable.weights import unpack_bits

PORTABLE = EngineOptions(engine="portable")


def silent(_: object) -> None:
    """Report to nobody."""


def add(folder: Path, file: Path, palette: Palette | None = None) -> Manifest:
    return add_networks(folder, [partial(control_networks, [Control(file)])], silent, palette=palette)


def packages(folder: Path) -> dict[str, bytes]:
    """Every file of every package."""
    files = [path for path in folder.glob("*.mlpackage/**/*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def net(checkpoints, controls, tmp_path_factory) -> Path:
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    return checkpoints.write_safetensors(tmp_path_factory.mktemp("net") / "canny.safetensors", values)


LAYERS = {"6": "mid_block.resnets.0.conv1", "4": "mid_block.resnets.1.conv2", "8": "up_blocks.0.resnets.0.conv1",
          "int8": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"}  # fmt: skip
SOME = Palette(None, {f"{layer}.weight": Form.read(words) for words, layer in LAYERS.items()})
GROUPED = Palette(None, {**SOME.other, "down_blocks.1.resnets.0.conv1.weight": Form.read("4/16")})


@pytest.mark.parametrize(
    ("palette", "how"),
    [
        (SOME, {"sizes": ((64, 64), (64, 128))}),
        (GROUPED, {}),
        (Palette(Form.read("int8")), {"attention": "split", "chunks": 3}),
        (SOME, {"sizes": ((64, 64), (64, 128)), "functions": True}),
    ],
    ids=["sizes", "grouped", "chunks", "functions"],
)
def test_control_is_added_as_converted_together(palette, how, net, tiny_checkpoint, tmp_path):
    """The controlled UNet shares the encoded records: no weight is read, none is written twice."""
    said = {"sizes": ((64, 64),), "attention": "einsum", "part": "unet", "palette": palette, **how}
    convert_checkpoint(tiny_checkpoint, tmp_path / "model", ConvertOptions(**said))
    further = (partial(control_networks, [Control(net)]),)
    convert_checkpoint(tiny_checkpoint, tmp_path / "together", ConvertOptions(**said, further=further))
    before = packages(tmp_path / "model")
    manifest = add(tmp_path / "model", net, palette)
    after, expected = packages(tmp_path / "model"), packages(tmp_path / "together")
    assert {name: after[name] for name in before} == before
    assert after == expected
    unet, steered = manifest.parts["unet"], manifest.parts["controlled_unet"]
    whole = Manifest.read(tmp_path / "together").parts
    assert steered.palette == unet.palette == whole["controlled_unet"].palette
    assert steered.about["palette"] == whole["controlled_unet"].about["palette"]
    for file in steered.about.get("chunks", [steered.file]):
        plain = file.replace("ControlledUnet", "Unet")
        assert (tmp_path / "model" / file / WEIGHT_FILE).samefile(tmp_path / "model" / plain / WEIGHT_FILE)


def test_a_net_in_half_precision_beside_a_small_unet_draws_as_its_base(net, tiny_checkpoint, tmp_path):
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", part="unet", palette=Palette(Form.read("int8")))
    folder = tmp_path / "model"
    convert_checkpoint(tiny_checkpoint, folder, options)
    manifest = add(folder, net)
    assert manifest.parts["control:canny"].palette is None
    reports = verify_folder(folder, tiny_checkpoint, parts=["controlled_unet"], options=PORTABLE)
    needed = note_palettes(folder, reports, 60.0)
    assert needed["controlled_unet"] < reports[0].psnr < 60
    outputs = []
    for file in ("Unet.mlpackage", "ControlledUnet.mlpackage"):
        engine = open_engine(folder / file, PORTABLE)
        rng = np.random.default_rng(0)
        plain = {"sample", "timestep", "encoder_hidden_states"}
        given = {
            name: rng.standard_normal(spec.shape) if name in plain else np.zeros(spec.shape)
            for name, spec in sorted(engine.inputs.items(), key=lambda item: (item[0] not in plain, item[0]))
        }
        outputs.append(
            engine.predict(**{name: array.astype(np.float32) for name, array in given.items()})["noise_pred"]
        )
        engine.close()
    np.testing.assert_array_equal(*outputs)


def test_what_is_added_to_weights_is_refused_and_leaves_nothing(checkpoints, controls, tiny_checkpoint, tmp_path):
    """Deltas are smaller than what 6 bits have lost."""
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY), seed=3)
    named = {f"control_model.{key}": value for key, value in values.items()} | {"difference": np.ones(1, np.float32)}
    file = checkpoints.write_safetensors(tmp_path / "delta.safetensors", named)
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", part="unet", palette=SOME)
    folder = tmp_path / "model"
    convert_checkpoint(tiny_checkpoint, folder, options)
    kept = shutil.copytree(folder, tmp_path / "kept")
    with pytest.raises(PackageError, match=r"is stored in 6 bits.*convert the checkpoint again, with this file"):
        add(folder, file)
    assert packages(folder) == packages(kept)
    assert [path.name for path in (folder / ".glassine").iterdir()] == ["source.json"]


@pytest.fixture(scope="module")
def loras(checkpoints, tmp_path_factory):
    """One that adds to layers of every form, one that rotates, scales and adds to what stays in half precision."""
    rng = np.random.default_rng(4)
    place = tmp_path_factory.mktemp("loras")

    def drawn(*shape):
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)

    def key(name):
        return f"lora_unet_{name.replace('.', '_')}"

    first = {f"{key(LAYERS['int8'])}.diff": drawn(64, 64)}
    for layer in (LAYERS["6"], LAYERS["4"], "down_blocks.1.resnets.0.conv1"):
        inputs = 32 if "down" in layer else 64
        first |= {
            f"{key(layer)}.lora_down.weight": drawn(4, inputs, 3, 3),
            f"{key(layer)}.lora_up.weight": drawn(64, 4, 1, 1),
        }
    second = {
        f"{key(LAYERS['6'])}.oft_blocks": drawn(8, 8, 8),
        f"{key('mid_block.attentions.0.proj_in')}.diff": drawn(64, 64),
        f"{key('mid_block.resnets.0.norm1')}.b_norm": drawn(64),
    }
    return [
        checkpoints.write_safetensors(place / f"{name}.safetensors", tensors, dtype="F32")
        for name, tensors in (("first", first), ("second", second))
    ]


@pytest.mark.parametrize("palette", [SOME, GROUPED], ids=["some", "grouped"])
def test_loras_go_in_from_the_checkpoint_as_if_converted_with_them(palette, loras, net, tiny_checkpoint, tmp_path):
    """Byte for byte, and out again: the checkpoint's weights change and get their palettes again."""
    said = {"sizes": ((64, 64),), "attention": "einsum", "palette": palette, "part": "unet"}
    further = (partial(control_networks, [Control(net)]),)
    folder, fresh = tmp_path / "model", tmp_path / "fresh"
    convert_checkpoint(tiny_checkpoint, folder, ConvertOptions(**said, further=further))
    before = packages(folder)
    files = [LoraFile(loras[0], 0.8), LoraFile(loras[1], -0.5)]
    convert_checkpoint(
        tiny_checkpoint, fresh, ConvertOptions(**said, further=further, extras=Extras(loras=tuple(files)))
    )
    exact = exact_unet(folder, tiny_checkpoint)
    add_loras(folder, files[:1], exact)
    add_loras(folder, files[1:], exact)
    after, expected = packages(folder), packages(fresh)
    assert after.keys() == expected.keys()
    assert [name for name in after if after[name] != expected[name]] == []
    assert after["Unet.mlpackage/" + WEIGHT_FILE] != before["Unet.mlpackage/" + WEIGHT_FILE]
    with pytest.raises(PackageError, match="--source CHECKPOINT"):
        remove_loras(folder, ["first"])  # the other one stays, and is merged anew
    assert packages(folder) == after
    remove_loras(folder, ["first"], exact)
    assert remove_loras(folder, ["second"]).loras == ()
    assert packages(folder) == before


def test_a_lora_on_palettes_needs_the_checkpoint_that_they_were_made_of(loras, checkpoints, tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    extras = Extras(loras=(LoraFile(loras[1], 0.3),))
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", part="unet", palette=SOME, extras=extras)
    convert_checkpoint(tiny_checkpoint, folder, options)
    before = packages(folder)
    for change in (partial(add_loras, folder), partial(variant, folder)):
        with pytest.raises(
            PackageError, match=r"stored in \w+ bits, and their steps are larger than what a LoRA changes"
        ):
            change([LoraFile(loras[0])])
    other = checkpoints.write_checkpoint(tmp_path / "other.safetensors", seed=5)
    with pytest.raises(PackageError, match=r"the LoRA 'second' .* went into its weights"):
        exact_unet(folder, tiny_checkpoint)
    with pytest.raises(PackageError, match=r"other.safetensors: the sha256 of its UNet is .*; give that one"):
        exact_unet(folder, other, [loras[1]])
    add_loras(folder, [LoraFile(loras[0])], exact_unet(folder, tiny_checkpoint, [loras[1]]))
    (report,) = verify_folder(folder, tiny_checkpoint, given=[loras[1]], options=PORTABLE)
    assert report.psnr > note_palettes(folder, [report], 60.0)["unet"]
    remove_loras(folder, ["first"])
    assert packages(folder) == before
    (folder / "Unet.weights.json").unlink()  # as Glassine 0.2 left it
    with pytest.raises(PackageError, match="says nothing of where its weights lie"):
        add_loras(folder, [LoraFile(loras[0])])


def test_a_lora_that_palettes_alone_would_lose():
    """Merged into what 6 bits have kept, a change of 1 % of the weights is rounded away; into the weights it is not."""
    rng = np.random.default_rng(0)
    weight = (0.03 * rng.standard_t(6, (320, 320))).astype(np.float16)
    delta = (rng.standard_normal((320, 16)) @ rng.standard_normal((16, 320))).astype(np.float32)
    delta *= 0.01 * np.sqrt(np.square(weight, dtype=np.float64).mean() / np.square(delta).mean())
    six = Form.read("6")

    def stored(values):
        items = {item: np.concatenate(list(of)) for item, of in encode(values.astype(np.float16), six).items.items()}
        indices = unpack_bits(items["indices"], 6, values.size).reshape(values.shape)
        return items["table"].view(np.float16)[indices].astype(np.float32)

    kept = stored(weight)
    shares = [float(((after - kept) * delta).sum() / np.square(delta).sum()) for after in (
        stored(kept + delta), stored(weight.astype(np.float32) + delta))]  # fmt: skip
    assert shares[0] < 0.02  # measured 0.003
    assert abs(shares[1] - 1) < 0.1  # measured 1.0
