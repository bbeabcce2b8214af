"""Detection: sizes from shapes, the right family or an error that names what the file is."""

import dataclasses

import numpy as np
import pytest

from glassine.convert.checkpoint import Checkpoint, Tensor, open_checkpoint
from glassine.convert.detect import detect
from glassine.errors import CheckpointError, ConversionError
from glassine.models.config import SD15


def checkpoint(tmp_path, shapes, metadata=None, dtype="F16") -> Checkpoint:
    """A header without a file: detection looks at nothing else."""
    path = tmp_path / "model.safetensors"
    tensors = {key: Tensor(path, key, dtype, tuple(shape), 0, 0) for key, shape in shapes.items()}
    return Checkpoint(path=path, tensors=tensors, metadata=metadata if metadata is not None else {})


def test_sd15_is_read_off_its_shapes(checkpoints, tmp_path):
    found = detect(checkpoint(tmp_path, checkpoints.ldm_checkpoint(checkpoints.SD15)))
    assert found.family == SD15
    assert sum(np.prod(shape, dtype=np.int64) for shape in found.parts["unet"].shapes.values()) == 859_520_964
    assert sum(np.prod(shape, dtype=np.int64) for shape in found.parts["vae"].shapes.values()) == 83_653_863
    assert sum(np.prod(shape, dtype=np.int64) for shape in found.parts["text_encoder"].shapes.values()) == 123_060_480
    assert "attn2.to_k.weight" in found.reasons["unet context"]
    assert "(320, 768)" in found.reasons["unet context"]


def test_a_small_network_of_the_same_layout_is_read_by_the_same_code(tiny_checkpoint, tiny_diffusers):
    single = detect(open_checkpoint(tiny_checkpoint))
    unet, vae, text = single.family.unet, single.family.vae, single.family.text_encoders[0]
    assert (unet.channels, unet.heads, unet.context_dim, unet.norm_groups) == ((32, 64, 64, 64), (2, 2, 2, 2), 64, 16)
    assert unet.down_depths == ((1, 1), (1, 1), (1, 1), (0, 0))
    assert unet.up_depths == ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    assert (vae.channels, vae.norm_groups) == ((32, 32, 48, 64), 16)
    assert (text.width, text.layers, text.heads, text.intermediate) == (64, 3, 1, 256)
    folder = detect(open_checkpoint(tiny_diffusers))
    assert folder.family == single.family
    assert folder.scheduler == single.scheduler


def test_fewer_levels_and_attention_elsewhere(checkpoints, tmp_path):
    sizes = checkpoints.Sizes(unet=(32, 64, 64), attention=(False, True, True))
    found = detect(checkpoint(tmp_path, checkpoints.ldm_checkpoint(sizes), sizes.header()))
    assert found.family.unet.channels == (32, 64, 64)
    assert found.family.unet.down_depths == ((0, 0), (1, 1), (1, 1))
    assert found.family.unet.up_depths == ((1, 1, 1), (1, 1, 1), (0, 0, 0))
    assert found.family.unet.heads == (2, 2, 2)


OTHER_FILES = {
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "unet.x.to_q.lora_A.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "controlnet_cond_embedding.conv_in.weight"],
    "an IP-Adapter": ["ip_adapter.1.to_k_ip.weight"],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "a textual-inversion embedding": ["emb_params", "clip_g"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "an image upscaler": ["conv_first.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight"],
    "Stable Diffusion XL": ["conditioner.embedders.1.model.ln_final.weight"],
    "the Stable Diffusion XL refiner": ["conditioner.embedders.0.model.ln_final.weight"],
    "Stable Diffusion 2": ["cond_stage_model.model.ln_final.weight"],
}


@pytest.mark.parametrize(("what", "key"), [(what, key) for what, keys in OTHER_FILES.items() for key in keys])
def test_other_files_are_named(tmp_path, what, key):
    with pytest.raises(CheckpointError) as caught:
        detect(checkpoint(tmp_path, {key: (4, 4), "other": (4, 4)}))
    assert f"this is {what} (key " in str(caught.value)
    assert "expected a Stable Diffusion 1.x checkpoint" in str(caught.value)


P = "model.diffusion_model."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{P}input_blocks.0.0.weight": (32, 9, 3, 3)}, "takes 9 channels: this is an inpainting model, expected 4"),
        ({f"{P}input_blocks.0.0.weight": (32, 8, 3, 3)}, "an instruct-pix2pix model"),
        ({f"{P}input_blocks.0.0.weight": (32, 4)}, "which tells no input channels"),
        ({f"{P}input_blocks.1.1.proj_in.weight": (32, 32)}, "this is a UNet of Stable Diffusion 2 or XL"),
        ({f"{P}label_emb.0.0.weight": (128, 2816)}, "this is a UNet of Stable Diffusion XL"),
    ],
)
def test_other_unets_are_named_by_the_tensor_that_tells(checkpoints, tmp_path, changes, message):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY) | changes
    with pytest.raises((CheckpointError, ConversionError)) as caught:
        detect(checkpoint(tmp_path, shapes, checkpoints.TINY.header()))
    assert message in str(caught.value)
    assert next(iter(changes)) in str(caught.value)


def test_text_encoder_and_unet_of_two_models_are_refused(checkpoints, tmp_path):
    other = checkpoints.clip_text(dataclasses.replace(checkpoints.TINY, context=128))
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY)
    shapes |= {f"cond_stage_model.transformer.{key}": shape for key, shape in other.items()}
    with pytest.raises(ConversionError, match=r"a context of 64 numbers a token .* the text encoder gives 128"):
        detect(checkpoint(tmp_path, shapes, checkpoints.TINY.header()))


def test_unknown_and_doubled_keys_are_listed(checkpoints, tmp_path):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY)
    many = {f"surprise.{i}": (4, 4) for i in range(20)}
    with pytest.raises(ConversionError, match=r"20 keys belong to no known network: surprise\.0.*and 14 more"):
        detect(checkpoint(tmp_path, shapes | many, checkpoints.TINY.header()))
    vae = dict.fromkeys(checkpoints.diffusers_names("vae", checkpoints.TINY).values(), (4, 4))
    old = {"encoder.mid_block.attentions.0.query.weight": (4, 4)}
    with pytest.raises(ConversionError, match=r'to_q\.weight" and .*query\.weight" are the same weight'):
        detect(checkpoint(tmp_path, vae | old))


def test_a_file_of_anything_else_shows_its_first_keys(tmp_path):
    with pytest.raises(CheckpointError, match=r"no Stable Diffusion network .* a\.weight, b\.weight"):
        detect(checkpoint(tmp_path, {"a.weight": (3, 3), "b.weight": (3, 3)}))
    with pytest.raises(CheckpointError, match="no Stable Diffusion network"):
        detect(checkpoint(tmp_path, {}))


@pytest.mark.parametrize(
    ("metadata", "extra", "expected"),
    [
        ({}, {}, "epsilon"),
        ({"modelspec.prediction_type": "v"}, {}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, {"v_pred": ()}, "epsilon"),
        ({}, {"v_pred": ()}, "v_prediction"),
        ({"glassine.prediction_type": "sample"}, {}, "sample"),
    ],
)
def test_prediction_type_from_what_the_file_says(checkpoints, tmp_path, metadata, extra, expected):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY) | extra
    source = checkpoint(tmp_path, shapes, checkpoints.TINY.header() | metadata)
    assert detect(source).family.prediction == expected
    assert detect(source, "epsilon").family.prediction == "epsilon"


def test_an_unknown_prediction_type_is_refused(checkpoints, tmp_path):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY)
    source = checkpoint(tmp_path, shapes, checkpoints.TINY.header() | {"modelspec.prediction_type": "flow"})
    with pytest.raises(ConversionError, match=r"prediction type 'flow'.*--prediction-type"):
        detect(source)


def test_zero_terminal_snr_is_read_off_the_schedule(checkpoints, tmp_path):
    for last, expected in ((0.0, True), (0.0047, False)):
        unet = checkpoints.values(checkpoints.ldm_unet(checkpoints.TINY))
        schedule = np.linspace(0.999, last, 1000, dtype=np.float32)
        path = checkpoints.write_safetensors(
            tmp_path / f"{expected}.safetensors",
            {"alphas_cumprod": schedule, **{P + key: value for key, value in unet.items()}},
            dtype=lambda key: "F32" if key == "alphas_cumprod" else "F16",
            metadata=checkpoints.TINY.header(),
        )
        assert detect(open_checkpoint(path)).scheduler.zero_terminal_snr is expected


@pytest.mark.parametrize("value", ["3", "0", "x", "2,2"])
def test_heads_that_cannot_be_are_refused(checkpoints, tmp_path, value):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY)
    source = checkpoint(tmp_path, shapes, checkpoints.TINY.header() | {"glassine.heads": value})
    with pytest.raises(ConversionError, match="heads"):
        detect(source)


@pytest.mark.parametrize(
    ("resolution", "size"), [("256x256", 256), ("768x768", 768), ("512x768", 512), ("100x100", 512), ("big", 512)]
)
def test_the_default_size_is_the_one_it_was_trained_at(checkpoints, tmp_path, resolution, size):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY)
    metadata = checkpoints.TINY.header() | {"modelspec.resolution": resolution}
    assert detect(checkpoint(tmp_path, shapes, metadata)).family.size == size
