"""verify --locate: planted faults are found, by the operation's name in the network; sound models have none."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.runtime.engine.portable.program import read_package


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def operation(package, name):
    """An operation by its result's name, and its index among those that run."""
    body = read_package(package).function().body
    work = [op for op in body.operations if op.type != "const"]
    index = next(index for index, op in enumerate(work) if op.outputs[0].name == name)
    return work[index], index


def damage(package, constant, change):
    """Rewrite one constant's numbers in the weight file."""
    body = read_package(package).function().body
    const = next(op for op in body.operations if op.type == "const" and op.outputs[0].name == constant)
    held = const.attributes["val"]
    before = held.array().tobytes()
    path = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(path.read_bytes())
    at = held.offset + 64  # the record's own header
    assert content[at : at + len(before)] == before
    content[at : at + len(before)] = change(np.frombuffer(before, np.float16).copy()).tobytes()
    path.write_bytes(content)


def metadata(checkpoint):
    with safe_open(checkpoint, "np") as file:
        return file.metadata()


def flip_one(values):
    values[4] += 1  # the middle of the first kernel
    return values


def flip_corner(values):
    values[0] += 1
    return values


def locate(glassine, *arguments):
    result = glassine("verify", *arguments, "--locate", "--json")
    return result.exit_code, json.loads(result.stdout)


def test_a_sound_model_has_no_fault(glassine, tiny_folder, tiny_checkpoint):
    code, report = locate(glassine, tiny_folder, tiny_checkpoint)
    assert code == 0
    assert set(report) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert {fault for part in report.values() for fault in part.values()} == {None}
    assert all(set(part) == {"against its source", "fp16 against fp32"} for part in report.values())


@pytest.mark.parametrize(
    ("part", "package", "constant", "name"),
    [
        ("unet", "Unet", "mid_block_resnets_0_conv1_weight", "mid_block_resnets_0_conv1"),
        ("unet", "Unet", "conv_out_weight", "conv_out"),
        ("vae_decoder", "VAEDecoder", "decoder_conv_in_weight", "decoder_conv_in"),
    ],
)
def test_a_wrong_constant_is_found(glassine, model, tiny_checkpoint, part, package, constant, name):
    damage(model / f"{package}.mlpackage", constant, flip_one)
    code, report = locate(glassine, model, tiny_checkpoint, "--part", part)
    fault = report[part]["against its source"]
    assert code == 1
    assert (fault["kind"], fault["name"], fault["constants"]) == ("differs", name, [constant])
    assert fault["index"] == operation(model / f"{package}.mlpackage", name)[1]
    assert "convert the model again" in fault["advice"]


def test_a_person_is_told_where_and_what_to_do(glassine, model, tiny_checkpoint):
    damage(model / "Unet.mlpackage", "conv_in_weight", flip_one)
    said = glassine("verify", model, tiny_checkpoint, "--part", "unet", "--locate")
    assert "conv conv_in, operation " in said.stdout
    assert "its conv_in_weight is not what the source makes" in said.stdout
    assert "fp16 against fp32: no operation goes wrong" in said.stdout
    assert "unet: an operation goes wrong" in said.stderr


def test_an_overflow_of_the_weights_themselves_is_found(glassine, tiny_checkpoint, tmp_path):
    weights = load_file(tiny_checkpoint)
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    loud = np.random.default_rng(0).choice([-6e4, 6e4], weights[key].shape).astype(weights[key].dtype)
    save_file({**weights, key: loud}, tmp_path / "loud.safetensors", metadata(tiny_checkpoint))
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", part="unet")
    convert_checkpoint(tmp_path / "loud.safetensors", tmp_path / "loud", options)
    code, report = locate(glassine, tmp_path / "loud", tmp_path / "loud.safetensors")
    assert code == 1
    assert report["unet"]["against its source"] is None
    fault = report["unet"]["fp16 against fp32"]
    assert (fault["kind"], fault["name"]) == ("overflows", "mid_block_resnets_0_conv1")
    assert "the largest float16 is 65504" in fault["detail"]
    assert "float32" in fault["advice"]


def test_a_constant_that_these_inputs_do_not_show_is_found_too(glassine, model, tiny_checkpoint):
    """A corner of a kernel that reads nothing but padding, at the lowest resolution of a small picture."""
    damage(model / "Unet.mlpackage", "mid_block_resnets_0_conv1_weight", flip_corner)
    _, report = locate(glassine, model, tiny_checkpoint, "--part", "unet")
    fault = report["unet"]["against its source"]
    assert (fault["name"], fault["psnr"]) == ("mid_block_resnets_0_conv1", None)
    assert fault["constants"] == ["mid_block_resnets_0_conv1_weight"]
    assert "its constants do" in fault["detail"]


def test_numbers_that_are_not_finite_are_found(glassine, model, tiny_checkpoint):
    damage(model / "Unet.mlpackage", "conv_in_weight", lambda values: np.full_like(values, np.nan))
    _, report = locate(glassine, model, tiny_checkpoint, "--part", "unet")
    fault = report["unet"]["against its source"]
    assert (fault["kind"], fault["name"], fault["psnr"]) == ("not finite", "conv_in", None)


def test_loras_are_no_fault(glassine, tiny_checkpoint, checkpoints, tmp_path):
    """One merged at conversion, one afterwards where a scale is in the weights: equal to the last bit."""
    rng = np.random.default_rng(2)
    for name, module in (("first", "mid_block_resnets_0_conv1"), ("second", "mid_block_attentions_0_proj_in")):
        tensors = {f"lora_unet_{module}.diff": rng.standard_normal((64, 64, 3, 3) if name == "first" else (64, 64))}
        checkpoints.write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    attention = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    checkpoints.write_safetensors(tmp_path / "third.safetensors", {f"{attention}.diff": rng.standard_normal((64, 64))})
    options = ("--part", "unet", "--size", "64x64", "--attention", "einsum", "--lora", "first.safetensors=0.5")
    assert glassine("convert", tiny_checkpoint, "model", *options).exit_code == 0
    assert glassine("lora", "model", "add", "second.safetensors=0.3", "third.safetensors=0.7").exit_code == 0
    code, report = locate(glassine, "model", tiny_checkpoint, "--with", "first.safetensors")
    assert (code, report["unet"]) == (0, {"against its source": None, "fp16 against fp32": None})
    refused = glassine("verify", "model", tiny_checkpoint, "--locate")
    assert (refused.exit_code, "the LoRA 'first'" in refused.stderr) == (1, True)


def test_another_source_is_refused(glassine, tiny_folder, tiny_checkpoint, tmp_path):
    weights = load_file(tiny_checkpoint)
    weights["model.diffusion_model.out.2.bias"] = weights["model.diffusion_model.out.2.bias"] + 1
    save_file(weights, tmp_path / "other.safetensors", metadata(tiny_checkpoint))
    result = glassine("verify", tiny_folder, tmp_path / "other.safetensors", "--locate")
    assert result.exit_code == 1
    assert "give the file it was made of" in result.stderr


def test_a_model_of_one_part(glassine, tiny_checkpoint, tmp_path):
    convert_checkpoint(tiny_checkpoint, tmp_path / "vae", ConvertOptions(sizes=((64, 64),), part="vae_decoder"))
    code, report = locate(glassine, tmp_path / "vae", tiny_checkpoint)
    assert (code, set(report)) == (0, {"vae_decoder"})


def test_a_part_that_is_not_there_is_named(glassine, tiny_folder, tiny_checkpoint):
    result = glassine("verify", tiny_folder, tiny_checkpoint, "--locate", "--part", "sky")
    assert result.exit_code == 1
    assert "sky cannot be compared" in result.stderr


@pytest.mark.full
@pytest.mark.parametrize("fault", ["a wrong constant", "an overflow"])
def test_faults_in_stable_diffusion_1_5(glassine, checkpoints, tmp_path, fault):
    """At 512 pixels, in a middle and a late block: 860 million weights, about 2,700 operations."""
    sizes = checkpoints.FULL_SIZE["sd15"]
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in checkpoints.ldm_unet(sizes).items()}
    tensors = checkpoints.values(shapes)
    if fault == "an overflow":
        tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"] *= 3e4
    source = checkpoints.write_safetensors(tmp_path / "sd15.safetensors", tensors, dtype="F16")
    del tensors
    convert_checkpoint(source, tmp_path / "sd15", ConvertOptions(sizes=((512, 512),), attention="einsum", part="unet"))
    if fault == "a wrong constant":
        damage(tmp_path / "sd15" / "Unet.mlpackage", "up_blocks_3_resnets_2_conv2_weight", flip_one)
    code, report = locate(glassine, tmp_path / "sd15", source)
    assert code == 1
    if fault == "an overflow":
        assert report["unet"]["against its source"] is None
        found = report["unet"]["fp16 against fp32"]
        assert (found["kind"], found["name"]) == ("overflows", "mid_block_resnets_0_conv1")
    else:
        found = report["unet"]["against its source"]
        assert (found["kind"], found["name"]) == ("differs", "up_blocks_3_resnets_2_conv2")
        assert report["unet"]["fp16 against fp32"] is None
