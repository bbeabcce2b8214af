"""LayerDiffuse's files: each released one is recognised and fits; the damaged, half or foreign ones are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glassine.convert import transparency
from glassine.convert.checkpoint import Tensor, open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.folder import ConvertOptions
from glassine.convert.layer_patches import Differences
from glassine.convert.names import Numbering
from glassine.convert.network import Base, Network
from glassine.convert.transparency import TransparentFile, transparent_networks
from glassine.convert.weights import Arrays, Patched
from glassine.errors import CheckpointError, ConversionError
from glassine.models.sharing import attention_units

RELEASED = {  # file -> keys in a folder, weights of the UNet that change
    "vae_transparent_decoder": (("transparent_decoder",), 0),
    "vae_transparent_encoder": (("transparent_encoder",), 0),
    "layer_sd15_transparent_attn": (("transparent_unet",), 192),
    "layer_sd15_joint": (("joint_unet",), 544),
    "layer_sd15_fg2bg": (("fg2bg_unet", "fg2bg_control"), 544),
    "layer_xl_transparent_attn": (("transparent_unet",), 560),
    "layer_xl_transparent_conv": (("transparent_unet",), 1252),
    "layer_xl_bgble2fg": (("bgble2fg_unet",), 1252),
    "layer_xl_fg2ble": (("fg2ble_unet",), 206),
    "layer_xl_fgble2bg": (("fgble2bg_unet",), 206),
    "ld_diffusers_sdxl_attn": (("transparent_unet",), 560),
    "ld_diffusers_sdxl_conv": (("transparent_unet",), 1252),
}
UNETS = {
    name: family for name, family in ((n, "sd15" if "sd15" in n else "sdxl") for n in RELEASED) if "vae" not in name
}
Listed = Callable[..., list[Network]]


@pytest.fixture(scope="module")
def bases(checkpoints, tmp_path_factory) -> dict[str, Base]:
    """Full-size models that take no room."""
    bases = {}
    for name in ("sd15", "sdxl"):
        sizes = checkpoints.FULL_SIZE[name]
        path = tmp_path_factory.mktemp("base") / f"{name}.safetensors"
        source = open_checkpoint(
            checkpoints.write_sparse(path, checkpoints.ldm_checkpoint(sizes), metadata=sizes.header())
        )
        found = detect(source)
        options = ConvertOptions(sizes=((512, 512),), batch=2, chunks=1)
        bases[name] = Base(family=found.family, unet=found.parts["unet"], source=source, files=(path,), options=options)
    return bases


@pytest.fixture
def listed(checkpoints, layerdiffuse, bases, tmp_path) -> Listed:
    """listed(released file, change=..., name=..., base=..., kind=...): its networks, after a change to its keys."""

    def networks(file: str, change=lambda keys: keys, *, name=None, base=None, kind=None) -> list[Network]:
        shapes = change(dict(layerdiffuse.released()[f"{file}.safetensors"]))
        path = checkpoints.write_sparse(tmp_path / f"{file if name is None else name}.safetensors", shapes)
        base = UNETS.get(file, "sdxl") if base is None else base
        return transparent_networks([TransparentFile(path=path, kind=kind)], bases[base])

    return networks


@pytest.mark.parametrize("file", RELEASED)
def test_released_files_are_recognised_by_their_keys(listed, file):
    keys, changed = RELEASED[file]
    networks = listed(file)
    assert tuple(network.key for network in networks) == keys
    assert len(networks[0].changed) == changed
    # Nothing is left of the UNet's weights, and nothing of the file's: every name has one place.
    assert networks[0].beside == ("unet" if changed else None)


@pytest.mark.parametrize(
    ("file", "chunks", "beside"),
    [
        ("layer_sd15_transparent_attn", None, "unet"),  # 1.9 GB together
        ("layer_sd15_joint", None, None),  # more than the Neural Engine takes in one file, the base alone is not
        ("layer_sd15_joint", 1, "unet"),
        ("layer_sd15_transparent_attn", 2, None),
        ("layer_xl_transparent_attn", None, None),
    ],
)
def test_one_weight_file_where_the_hardware_takes_it(listed, bases, monkeypatch, file, chunks, beside):
    base = bases[UNETS[file]]
    options = dataclasses.replace(base.options, chunks=chunks)
    monkeypatch.setitem(bases, UNETS[file], dataclasses.replace(base, options=options))
    assert listed(file)[0].beside == beside


def test_units_are_numbered_as_in_the_files(layerdiffuse, bases):
    assert [unit for unit, _, _ in attention_units(bases["sd15"].family.unet)] == layerdiffuse.attentions()


@pytest.mark.parametrize("file", UNETS)
def test_any_key_that_is_missing_added_or_reshaped_is_named(layerdiffuse, bases, monkeypatch, file):
    base = bases[UNETS[file]]
    shapes = layerdiffuse.released()[f"{file}.safetensors"]
    tensors = {key: Tensor(Path(file), key, "F16", shape, 0, 0) for key, shape in shapes.items()}
    checkpoint = dataclasses.replace(base.source, path=Path(f"{file}.safetensors"), tensors=tensors)

    def refusal(**change: Tensor | None) -> str:
        changed = {key: tensor for key, tensor in {**tensors, **change}.items() if tensor is not None}
        monkeypatch.setattr(transparency, "open_checkpoint", lambda _: dataclasses.replace(checkpoint, tensors=changed))
        with pytest.raises((CheckpointError, ConversionError)) as caught:
            transparent_networks([TransparentFile(path=checkpoint.path)], base)
        return str(caught.value)

    for key in random.Random(file).sample(sorted(tensors), 4):
        tensor = tensors[key]
        assert _names(refusal(**{key: None}), key)
        assert _names(refusal(**{key: dataclasses.replace(tensor, shape=(*tensor.shape[:-1], 7))}), key)
        strange = key.replace("weight", "wait").replace("bias", "buys")
        assert strange in refusal(**{strange: dataclasses.replace(tensor, key=strange)})


def _names(message: str, key: str) -> bool:
    """Whether the message names the key, or else the weight that it is for."""
    weight, _, slot = key.partition("::")
    return key in message or (bool(slot) and weight in message) or "of the UNet and not " in message


def test_what_keys_cannot_tell_is_told_by_the_name_or_asked(listed, monkeypatch):
    monkeypatch.setattr(transparency, "_released", lambda _: None)  # none of these is, and hashing takes its time

    def key(file: str, **how: str) -> str:
        return listed(file, **how)[0].key

    assert key("layer_xl_fg2ble", name="my_bg2ble_v2") == "bg2ble_unet"
    assert key("layer_sd15_fg2bg", name="LAYER_BG2FG") == "bg2fg_unet"
    assert key("layer_xl_fg2ble", name="mine", kind="bg2ble") == "bg2ble_unet"
    with pytest.raises(CheckpointError, match=r"those of fg2bg and of bg2fg, .* say which: fg2bg=mine\.safetensors"):
        listed("layer_sd15_fg2bg", name="mine")
    with pytest.raises(CheckpointError, match="said to be joint, its keys say fg2ble or bg2ble"):
        listed("layer_xl_fg2ble", kind="joint")
    assert TransparentFile.parse("fg2bg=a=b.safetensors") == TransparentFile(path=Path("a=b.safetensors"), kind="fg2bg")
    assert TransparentFile.parse("a=b.safetensors") == TransparentFile(path=Path("a=b.safetensors"))


def test_released_files_are_known_by_their_digest(listed, checkpoints, monkeypatch, layerdiffuse, bases, tmp_path):
    shapes = layerdiffuse.released()["vae_transparent_encoder.safetensors"]
    path = checkpoints.write_sparse(tmp_path / "mine.safetensors", shapes)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(transparency._RELEASED, digest, ("sd15", "encoder"))
    assert transparent_networks([TransparentFile(path=path)], bases["sd15"])
    with pytest.raises(ConversionError, match="this is for sd15 \\(its sha256 says so\\), the model is sdxl"):
        transparent_networks([TransparentFile(path=path)], bases["sdxl"])
    path = path.rename(tmp_path / "vae_transparent_encoder.safetensors")  # then the name says it, and nothing is read
    assert transparent_networks([TransparentFile(path=path)], bases["sdxl"])


@pytest.mark.parametrize("what", ["decoder", "encoder"])
def test_a_decoder_or_encoder_of_another_family_is_refused_where_its_name_says_so(listed, monkeypatch, what):
    monkeypatch.setattr(transparency, "_released", lambda _: None)
    file = f"vae_transparent_{what}"
    for name, base in ((file, "sd15"), (f"layer_sd15_{file}", "sdxl"), (f"ld_diffusers_sdxl_{file}", "sd15")):
        with pytest.raises(ConversionError, match=rf"this is for sd.* \(its name says so\), the model is {base}"):
            listed(file, name=name, base=base)
        (network,) = listed(file, name=name, base=base, kind=what)  # who says that it fits is believed
        assert network.about["family"] == base
        (network,) = listed(file, name="mine", base=base)
        assert network.about["family"] == base


def test_the_factor_of_an_encoder_is_that_of_its_file(listed, checkpoints, layerdiffuse, bases, tmp_path):
    def scale(name: str, said: float | None = None) -> float:
        shapes = layerdiffuse.released()["vae_transparent_encoder.safetensors"]
        path = checkpoints.write_sparse(tmp_path / f"{name}.safetensors", shapes)
        file = TransparentFile(path=path, kind="encoder", offset_scale=said)
        return transparent_networks([file], bases["sdxl"])[0].about["offset_scale"]

    assert scale("vae_transparent_encoder") == 1
    assert scale("ld_diffusers_sdxl_vae_transparent_encoder") == 300
    assert scale("ld_diffusers_sdxl_vae_transparent_encoder", 0.0) == 0


@pytest.mark.parametrize("file", UNETS)
def test_a_patch_of_another_family_is_refused(listed, file):
    other = "sdxl" if UNETS[file] == "sd15" else "sd15"
    with pytest.raises(ConversionError, match="for another family of models"):
        listed(file, base=other)


def test_swapped_factors_are_refused(listed):
    def swapped(shapes):
        return {key[:-1] + ("1" if key.endswith("0") else "0"): shape for key, shape in shapes.items()}

    with pytest.raises(ConversionError, match="its two factors are swapped"):
        listed("layer_xl_transparent_attn", swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: {key: shape for key, shape in keys.items() if "attn2" not in key}, "attn2.to_k.weight"),
        (
            lambda keys: {key: shape for key, shape in keys.items() if "output_blocks" not in key},
            "up_blocks.0.attentions",
        ),
        (lambda keys: dict(list(keys.items())[::2]), "factors have no other half"),
        (lambda keys: {}, "no file of LayerDiffuse"),
        (lambda keys: {f"lora_unet_{key}": shape for key, shape in keys.items()}, "match no weight of the UNet"),
    ],
)
def test_half_a_patch_is_refused(listed, change, message):
    with pytest.raises((ConversionError, CheckpointError)) as caught:
        listed("layer_xl_transparent_attn", change)
    assert message in str(caught.value)


def test_a_plain_lora_is_not_taken_for_a_transparent_patch(listed, layerdiffuse, bases):
    names = [name for name, shape in bases["sdxl"].unet.shapes.items() if ".attn" in name and name.endswith(".weight")]

    def as_lora(_):
        keys = {}
        for name in names:
            rows, columns = bases["sdxl"].unet.shapes[name]
            module = f"unet.{name.removesuffix('.weight')}.lora"
            keys |= {f"{module}_A.weight": (4, columns), f"{module}_B.weight": (rows, 4)}
        return keys

    with pytest.raises(CheckpointError, match="a LoRA is merged with --lora"):
        listed("layer_xl_transparent_attn", as_lora, name="style")
    for how in ({"name": "diffuser_layer_xl_transparent_attn"}, {"name": "style", "kind": "transparent"}):
        (network,) = listed("layer_xl_transparent_attn", as_lora, **how)
        assert len(network.changed) == 560


def test_two_files_of_one_kind_are_refused(checkpoints, layerdiffuse, bases, tmp_path):
    shapes = layerdiffuse.released()["vae_transparent_encoder.safetensors"]
    files = [TransparentFile(path=checkpoints.write_sparse(tmp_path / f"{i}.safetensors", shapes)) for i in range(2)]
    with pytest.raises(ConversionError, match="two of the files would be the folder's transparent_encoder"):
        transparent_networks(files, bases["sdxl"])


def test_strength_is_for_sdxl_alone(checkpoints, layerdiffuse, bases, tmp_path):
    shapes = layerdiffuse.released()["layer_sd15_joint.safetensors"]
    path = checkpoints.write_sparse(tmp_path / "layer_sd15_joint.safetensors", shapes)
    with pytest.raises(ConversionError, match="has no strength"):
        transparent_networks([TransparentFile(path=path, strength=0.5)], bases["sd15"])


# Arithmetic, on arrays.

BASE = {
    "conv_in.weight": np.random.default_rng(1).standard_normal((6, 4, 3, 3)).astype(np.float32),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": np.random.default_rng(2)
    .standard_normal((8, 5))
    .astype(np.float32),
}
QUERY = next(name for name in BASE if "to_q" in name)


def differences(checkpoints, path: Path, strength: float, channels: int = 12) -> Patched:
    rng = np.random.default_rng(3)
    tensors = {
        "diffusion_model.input_blocks.0.0.weight::diff::0": rng.standard_normal((6, channels, 3, 3)),
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight::lora::0": rng.standard_normal((8, 2)),
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight::lora::1": rng.standard_normal((2, 5)),
    }
    checkpoints.write_safetensors(path, tensors, dtype="F32")
    shapes = {name: array.shape for name, array in BASE.items()}
    return Patched(Arrays(BASE), [Differences(open_checkpoint(path), shapes, Numbering(), strength)])


def read(weights: Patched, name: str) -> np.ndarray:
    return weights.read(name, 0, int(np.prod(weights.shapes[name]))).reshape(weights.shapes[name])


@pytest.mark.parametrize("strength", [1.0, 0.0, -0.5, 2.0])
def test_differences_are_added_times_the_strength(checkpoints, tmp_path, strength):
    patched = differences(checkpoints, tmp_path / "p.safetensors", strength)
    rng = np.random.default_rng(3)
    whole, up, down = (rng.standard_normal(shape) for shape in ((6, 12, 3, 3), (8, 2), (2, 5)))
    widened = read(patched, "conv_in.weight")
    np.testing.assert_allclose(widened[:, :4], BASE["conv_in.weight"] + strength * whole[:, :4], atol=1e-6)
    np.testing.assert_allclose(widened[:, 4:], strength * whole[:, 4:], atol=1e-6)
    np.testing.assert_allclose(read(patched, QUERY), BASE[QUERY] + strength * up @ down, atol=1e-6)


def test_the_opposite_strength_takes_a_patch_out_again(checkpoints, tmp_path):
    once = differences(checkpoints, tmp_path / "p.safetensors", 1.0, channels=4)
    shapes = {name: array.shape for name, array in BASE.items()}
    back = Patched(once, [Differences(open_checkpoint(tmp_path / "p.safetensors"), shapes, Numbering(), -1.0)])
    for name, array in BASE.items():
        np.testing.assert_allclose(read(back, name), array, atol=1e-6)


@pytest.mark.parametrize("channels", [4, 8, 12])
def test_a_whole_unet_is_no_patch(checkpoints, bases, tmp_path, channels):
    shapes = dict(bases["sdxl"].unet.shapes)
    shapes["conv_in.weight"] = (320, channels, 3, 3)
    path = checkpoints.write_sparse(tmp_path / "transparent_unet.safetensors", shapes)
    assert not transparency.is_transparent(path)
    with pytest.raises(CheckpointError, match="no file of LayerDiffuse"):
        transparent_networks([TransparentFile(path=path)], bases["sdxl"])
