"""Control files of every layout -> networks of a folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.control import Control, control_networks
from glassine.convert.control_files import is_control
from glassine.convert.detect import detect
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.network import Base
from glassine.convert.packages import plan_packages
from glassine.errors import CheckpointError, ConversionError
from glassine.manifest import Manifest
from glassine.models.config import SD15, ControlNetConfig

SMALL = ConvertOptions(sizes=((64, 64),), attention="einsum", batch=2)


def base_of(path: Path, size: int = 64) -> Base:
    checkpoint = open_checkpoint(path)
    detected = detect(checkpoint)
    options = ConvertOptions(sizes=((size, size),), batch=2)
    return Base(family=detected.family, unet=detected.parts["unet"], source=checkpoint, files=(path,), options=options)


@pytest.fixture(scope="session")
def families(checkpoints, tmp_path_factory):
    """A UNet of each family, header and weights."""
    place = tmp_path_factory.mktemp("families")
    return {
        name: checkpoints.write_checkpoint(place / f"{name}.safetensors", sizes)
        for name, sizes in checkpoints.TINY_FAMILIES.items()
        if name != "sdxl_refiner"
    }


def plan(path: Path, base: Base, **how: object) -> object:
    """Write the net's graph and hold it against its weights."""
    network = control_networks([Control(path, **how)], base)[0]
    return plan_packages([network], base.options.sizes, "model", lambda _: None)[0]


def stored(package: object) -> dict[str, np.ndarray]:
    """Every weight of a planned package as the converter would read it."""
    weights = package.network.weights
    return {name: weights.read(name, 0, int(np.prod(shape))) for name, shape in weights.shapes.items()}


# What the files are called and what that says.
GUESSED = {
    "canny": "canny", "mlsd": None, "depth": "depth", "normalbae": "normal", "seg": "segment", "inpaint": "inpaint",
    "lineart": "lineart", "anime": "lineart", "openpose": "pose", "scribble": "scribble", "softedge": "softedge",
    "shuffle": "shuffle", "ip2p": "none", "tile": "tile",
}  # fmt: skip


def test_all_fourteen_of_v11_from_key_names_alone(checkpoints, controls, tmp_path):
    """Full-size headers; the values are zeros that take no room."""
    unet = {f"model.diffusion_model.{k}": s for k, s in checkpoints.ldm_unet(checkpoints.SD15).items()}
    base = base_of(checkpoints.write_sparse(tmp_path / "v1-5.safetensors", unet), 512)
    shapes = controls.ldm_control(checkpoints, checkpoints.SD15, controls.HINT)
    assert (len(shapes), sum(int(np.prod(s)) for s in shapes.values())) == (340, 361_279_120)  # as published
    for stem in controls.V11:
        prefix = "" if stem.startswith("control_v11p") else "control_model."
        named = {prefix + key: shape for key, shape in shapes.items()}
        network, unet_network = control_networks(
            [Control(checkpoints.write_sparse(tmp_path / f"{stem}.safetensors", named))], base
        )
        assert network.key == f"control:{stem}"
        assert unet_network.key == "controlled_unet"
        config = network.config
        assert isinstance(config, ControlNetConfig)
        assert (config.hint_widths, config.hint_channels) == ((16, 32, 96, 256), 3)
        assert (config.unet.channels, config.unet.down_depths, config.unet.mid_depth, config.unet.heads) == (
            SD15.unet.channels,
            SD15.unet.down_depths,
            1,
            SD15.unet.heads,
        )
        assert config.pooled == network.about["global_pooling"] == ("shuffle" in stem)
        assert network.about["preprocessor"] == GUESSED[stem.rpartition("_")[2]]
        assert is_control(network.source.path)
    package = plan_packages([network], base.options.sizes, "model", lambda _: None)[0]
    assert package.lowered.parameters == 361_279_120
    shapes = [shape for shape, _ in package.lowered.outputs.values()]
    assert shapes[0] == (2, 320, 64, 64)
    assert shapes[12] == (2, 1280, 8, 8)
    assert len(shapes) == 13


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
@pytest.mark.parametrize("naming", ["control_model.", "", "diffusers"])
def test_layouts_and_dtypes_give_the_same_weights(checkpoints, controls, families, tmp_path, naming, dtype):
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    if dtype == "BF16":
        values = {key: _bf16(value) for key, value in values.items()}
    named = {
        controls.diffusers_name(checkpoints, key) if naming == "diffusers" else naming + key: value
        for key, value in values.items()
    }
    path = checkpoints.write_safetensors(tmp_path / "canny.safetensors", named, dtype=dtype)
    package = plan(path, base_of(families["sd15"]))
    expected = {
        controls.diffusers_name(checkpoints, key): value.astype(np.float16 if dtype == "F16" else np.float32)
        for key, value in values.items()
    }
    found = stored(package)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.reshape(-1), err_msg=name)
    assert package.network.about["preprocessor"] == "canny"


def _bf16(value: np.ndarray) -> np.ndarray:
    return (value.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families(checkpoints, controls, families, tmp_path, family):
    sizes = checkpoints.TINY_FAMILIES[family]
    values = checkpoints.values(controls.ldm_control(checkpoints, sizes))
    package = plan(checkpoints.write_safetensors(tmp_path / "depth.safetensors", values), base_of(families[family]))
    residuals = {"sd2": 13, "sdxl": 10}[family]
    assert len(package.lowered.outputs) == residuals
    assert ("time_ids" in package.lowered.inputs) == (family == "sdxl")
    assert package.network.config.unet.linear_projection


@pytest.mark.parametrize("kind", ["mid", "small"])
def test_smaller_sdxl_nets(checkpoints, controls, families, tmp_path, kind):
    """-mid has projections without blocks on one level, -small has no transformer at all and reads no text."""
    values = checkpoints.values(
        {
            controls.diffusers_name(checkpoints, key): shape
            for key, shape in controls.ldm_control(checkpoints, checkpoints.TINY_SDXL).items()
        }
    )
    if kind == "mid":
        dropped = ("down_blocks.1.attentions.0.transformer", "down_blocks.1.attentions.1.transformer")
    else:
        dropped = (
            "down_blocks.1.attentions.",
            "down_blocks.2.attentions.",
            "mid_block.attentions.",
            "mid_block.resnets.1.",
        )
    values = {key: value for key, value in values.items() if not key.startswith(dropped)}
    package = plan(checkpoints.write_safetensors(tmp_path / f"{kind}.safetensors", values), base_of(families["sdxl"]))
    config = package.network.config.unet
    assert config.down_depths == (((0, 0), (0, 0), (2, 2)) if kind == "mid" else ((0, 0),) * 3)
    assert (config.projected_levels, config.mid_resnets) == (((1,), 2) if kind == "mid" else ((), 1))
    assert ("encoder_hidden_states" in package.lowered.inputs) == (kind == "mid")


@pytest.mark.parametrize("types", [6, 8])
def test_control_plus_plus(checkpoints, controls, families, tmp_path, types):
    values = checkpoints.values(controls.union(checkpoints, checkpoints.TINY_SDXL, types))
    path, base = checkpoints.write_safetensors(tmp_path / "promax.safetensors", values), base_of(families["sdxl"])
    networks = control_networks([Control(path)], base)[:2]
    package, hinter = plan_packages(networks, base.options.sizes, "model", lambda _: None)
    assert (package.key, hinter.key, hinter.file) == ("control:promax", "hint:promax", "ControlHint_promax.mlpackage")
    assert package.lowered.inputs["control_type"] == ((2, types), "float32")
    assert hinter.lowered.inputs["control_type"] == ((1, types), "float32")
    assert package.lowered.inputs["fused_hint"][0] == (2, *hinter.lowered.outputs["fused_hint"][0][1:])
    about = package.network.about
    assert (about["kind"], len(about["control_types"]), about["control_types"][:2]) == (
        "union",
        types,
        ["openpose", "depth"],
    )
    width = 32
    found = stored(hinter)["transformer_layes.0.attn.to_v.weight"]
    np.testing.assert_array_equal(
        found, values["transformer_layes.0.attn.in_proj_weight"][2 * width :].astype(np.float16).reshape(-1)
    )


def test_a_diffusers_folder(checkpoints, controls, families, tmp_path):
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    folder = tmp_path / "sd-controlnet-anything"
    folder.mkdir()
    named = {controls.diffusers_name(checkpoints, key): value for key, value in values.items()}
    checkpoints.write_safetensors(folder / "diffusion_pytorch_model.safetensors", named)
    config = {"_class_name": "ControlNetModel", "global_pool_conditions": True}
    (folder / "config.json").write_text(json.dumps(config))
    package = plan(folder, base_of(families["sd15"]))
    assert is_control(folder)
    assert not is_control(folder.parent)  # a folder of another kind, or none of diffusers' at all
    assert package.network.config.pooled
    assert package.network.key == "control:sd-controlnet-anything"
    (folder / "config.json").write_text(json.dumps({"_class_name": "Transformer2DModel"}))
    with pytest.raises(CheckpointError, match="Transformer2DModel, expected one of ControlNetModel"):
        plan(folder, base_of(families["sd15"]))


def test_a_whole_model_with_a_net_in_it(checkpoints, controls, families, tmp_path):
    """The first files, control_sd15_*: everything they were trained with, and a schedule; the net alone is taken."""
    net = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    rest = checkpoints.values(checkpoints.ldm_checkpoint(checkpoints.TINY))
    named = {**rest, **{f"control_model.{key}": value for key, value in net.items()}, "betas": np.zeros(1000)}
    path = checkpoints.write_safetensors(tmp_path / "control_sd15_hed.safetensors", named)
    package = plan(path, base_of(families["sd15"]))
    assert stored(package).keys() == {controls.diffusers_name(checkpoints, key) for key in net}
    assert package.network.about["preprocessor"] == "softedge"


def test_differences_are_added_to_the_base(checkpoints, controls, families, tmp_path):
    shapes = controls.ldm_control(checkpoints, checkpoints.TINY)
    values = checkpoints.values(shapes, seed=3)
    named = {f"control_model.{key}": value for key, value in values.items()}
    named["difference"] = np.ones(1, np.float32)
    path = checkpoints.write_safetensors(tmp_path / "diff.safetensors", named, dtype="F32")
    base = base_of(families["sd15"])
    found = stored(plan(path, base))
    shared = 0
    for key, value in values.items():
        name = controls.diffusers_name(checkpoints, key)
        below = 0.0
        if name in base.unet.shapes:
            shared += 1
            below = base.unet.read(name, 0, value.size).astype(np.float32)
        np.testing.assert_array_equal(found[name], value.reshape(-1) + below, err_msg=name)
    assert shared == sum(key.startswith(("time_embed", "input_blocks", "middle_block.")) for key in shapes)


def test_control_lora(checkpoints, controls, families, tmp_path):
    """W = W_base + up @ down; norms and biases are in the file; what it does not name is the base's."""
    whole = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY_SDXL), seed=4)
    file, products = controls.control_lora(whole)
    for key in ("input_blocks.1.0.in_layers.0.bias", "time_embed.0.bias"):  # some files leave such to the base
        del file[key], whole[key]
    path = checkpoints.write_safetensors(tmp_path / "lora.safetensors", file, dtype="F32")
    base = base_of(families["sdxl"])
    package = plan(path, base)
    found = stored(package)
    assert package.network.about["layout"] == "Control-LoRA"
    for key, value in whole.items():
        name = controls.diffusers_name(checkpoints, key)
        expected = value.reshape(-1)
        if key in products:
            expected = base.unet.read(name, 0, value.size).astype(np.float32) + products[key].reshape(-1)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=name)  # order of sums
    for name in ("down_blocks.0.resnets.0.norm1.bias", "time_embedding.linear_1.bias"):
        np.testing.assert_array_equal(found[name], base.unet.read(name, 0, found[name].size))
    with pytest.raises(ConversionError, match="another family"):
        plan(path, base_of(families["sd2"]))


@pytest.mark.parametrize(
    ("family", "channels", "cells", "light"),
    [
        ("sd15", (32, 64, 64, 64), 3 * 64, False),
        ("sd15", (32, 64, 64, 64), 64, True),
        ("sdxl", (32, 64, 64, 64), 3 * 256, False),
        ("sdxl", (32, 64, 64, 64), 256, False),
    ],
)
def test_adapters(checkpoints, controls, families, tmp_path, family, channels, cells, light):
    values = checkpoints.values(controls.adapter(channels, cells, light=light))
    path = checkpoints.write_safetensors(tmp_path / "t2iadapter_sketch.safetensors", values)
    base = base_of(families[family])
    package = plan(path, base)
    adapted = control_networks([Control(path)], base)[1]
    assert adapted.key == "adapted_unet"
    unet = plan_packages([_home(base), adapted], base.options.sizes, "model", lambda _: None)[1]
    for name, (shape, dtype) in package.lowered.outputs.items():
        assert unet.lowered.inputs[name] == ((2, *shape[1:]), dtype)
    assert package.lowered.inputs["controlnet_cond"][0] == (1, cells // (256 if family == "sdxl" else 64), 64, 64)
    about = package.network.about
    assert (about["kind"], about["preprocessor"]) == ("t2i_adapter", "scribble")
    with pytest.raises(CheckpointError, match="choose a base of the adapter's own family"):
        plan(path, base_of(families["sdxl" if family == "sd15" else "sd15"]))


def _home(base: Base) -> object:
    from dataclasses import replace

    from glassine.convert.control import steered_unet

    return replace(steered_unet(base, "unet", "Unet"), beside=None)


def test_a_net_of_another_family_names_both(checkpoints, controls, families, tmp_path):
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    path = checkpoints.write_safetensors(tmp_path / "canny.safetensors", values)
    with pytest.raises(
        CheckpointError,
        match=r"canny.safetensors: this ControlNet is for .*text of 64 .*sdxl.safetensors is Stable Diffusion XL",
    ):
        plan(path, base_of(families["sdxl"]))


@pytest.mark.parametrize(
    "key",
    [
        "zero_convs.7.0.weight",
        "middle_block_out.0.bias",
        "input_hint_block.6.bias",
        "input_blocks.4.1.transformer_blocks.0.attn2.to_v.weight",
        "time_embed.2.weight",
        "middle_block.2.out_layers.3.bias",
    ],
)
def test_a_missing_or_renamed_key_is_named(checkpoints, controls, families, tmp_path, key):
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    base = base_of(families["sd15"])
    named = dict(values)
    lost = named.pop(key)
    path = checkpoints.write_safetensors(tmp_path / "net.safetensors", named)
    canonical = controls.diffusers_name(checkpoints, key)
    with pytest.raises(ConversionError, match=rf"1 weights are missing: {canonical}"):
        plan(path, base)
    named[key.replace(".", ".x", 1)] = lost
    path = checkpoints.write_safetensors(tmp_path / "net.safetensors", named)
    with pytest.raises(ConversionError, match=canonical):
        plan(path, base)
    named = {**values, "surplus.weight": lost}
    path = checkpoints.write_safetensors(tmp_path / "net.safetensors", named)
    with pytest.raises(ConversionError, match=r"surplus\.weight"):
        plan(path, base)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight", "ControlNet-LLLite"),
        ("style_embedding", "style adapter"),
        ("image_proj.proj.weight", "IP-Adapter"),
        ("model.diffusion_model.out.2.weight", "no ControlNet and no T2I-Adapter"),
    ],
)
def test_other_files_are_refused_by_what_they_are(checkpoints, families, tmp_path, key, what):
    path = checkpoints.write_safetensors(tmp_path / "x.safetensors", {key: np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=what):
        plan(path, base_of(families["sd15"]))


@pytest.mark.parametrize("name", ["a:b", "net_512x512", "", "a b"])
def test_names_that_would_be_mistaken(checkpoints, controls, families, tmp_path, name):
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    path = checkpoints.write_safetensors(tmp_path / "my net (v2).safetensors", values)
    base = base_of(families["sd15"])
    with pytest.raises(ConversionError, match="--name"):
        control_networks([Control(path, name)], base)
    assert control_networks([Control(path)], base)[0].package == "ControlNet_my_net_v2"
    with pytest.raises(ConversionError, match="a second control:my_net_v2"):
        control_networks([Control(path), Control(path)], base)


def test_together_with_a_checkpoint(checkpoints, controls, tiny_checkpoint, tmp_path):
    values = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    path = checkpoints.write_safetensors(tmp_path / "canny.safetensors", values)
    options = ConvertOptions(
        sizes=((64, 64), (128, 64)),
        attention="einsum",
        further=(partial(control_networks, [Control(path, batch=1)]),),
    )
    out = tmp_path / "out"
    manifest = convert_checkpoint(tiny_checkpoint, out, options)
    assert Manifest.read(out).parts.keys() == manifest.parts.keys()
    assert manifest.sizes == ((64, 64), (128, 64))
    for size in manifest.sizes:
        net, controlled, plain = (manifest.part(role, size) for role in ("control:canny", "controlled_unet", "unet"))
        assert net.inputs["sample"][0][0] == 1
        assert net.inputs["controlnet_cond"][0] == (1, 3, size[1], size[0])
        extra = set(controlled.inputs) - set(plain.inputs)
        assert extra == set(net.outputs)
        assert all(controlled.inputs[name] == ((2, *net.outputs[name][0][1:]), "float32") for name in extra)
        one, other = (out / part.file / "Data/com.apple.CoreML/weights/weight.bin" for part in (plain, controlled))
        assert one.samefile(other)
    nets = (manifest.part("control:canny", size) for size in manifest.sizes)
    one, other = (out / part.file / "Data/com.apple.CoreML/weights/weight.bin" for part in nets)
    assert one.samefile(other)
