"""Detection: sizes from shapes, the right family or an error that names what the file is."""

import dataclasses
import math

import numpy as np
import pytest

from glassine.convert.checkpoint import Checkpoint, Tensor, open_checkpoint
from glassine.convert.detect import detect
from glassine.errors import CheckpointError, ConversionError
from glassine.models.config import FAMILIES, SD15, SDXL, SDXL_REFINER


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


# Parameters of every part, as published and as the reference classes count them.
FULL_SIZE = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "sdxl_refiner": {"unet": 2_259_526_660, "vae": 83_653_863, "text_encoder_2": 694_659_840},
}
DECIDES = {
    "sd15": "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "sd2": "input_blocks.1.1.proj_in.weight",
    "sdxl": "label_emb.0.0.weight",
    "sdxl_refiner": "label_emb.0.0.weight",
}


@pytest.mark.parametrize("family", sorted(FULL_SIZE))
def test_every_family_is_read_off_a_header_of_full_size(checkpoints, tmp_path, family):
    shapes = checkpoints.ldm_checkpoint(checkpoints.FULL_SIZE[family])
    found = detect(open_checkpoint(checkpoints.write_sparse(tmp_path / "full.safetensors", shapes)))
    assert found.family == FAMILIES[family]
    parameters = {part: sum(math.prod(s) for s in w.shapes.values()) for part, w in found.parts.items()}
    assert parameters == FULL_SIZE[family]
    assert f'"{P}{DECIDES[family]}"' in found.reasons["family"]
    unet = checkpoint(tmp_path, checkpoints.ldm_unet(checkpoints.FULL_SIZE[family]))  # alone and without a prefix
    if family != "sd2":  # whose prediction type is read off a tensor
        assert detect(unet).family.unet == FAMILIES[family].unet
        assert detect(unet).family.name == family


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl", "sdxl_refiner"])
def test_a_single_file_and_a_diffusers_folder_are_the_same_model(checkpoints, tmp_path, family):
    sizes = checkpoints.TINY_FAMILIES[family]
    single = detect(open_checkpoint(checkpoints.write_checkpoint(tmp_path / "single.safetensors", sizes)), "epsilon")
    folder = detect(open_checkpoint(checkpoints.write_diffusers(tmp_path / "folder", sizes)), "epsilon")
    assert single.family.name == family
    assert folder.family == single.family
    for part, weights in single.parts.items():
        assert {n: [s for s in shape if s > 1] for n, shape in folder.parts[part].shapes.items()} == {
            n: [s for s in shape if s > 1] for n, shape in weights.shapes.items()
        }
        for name, shape in weights.shapes.items():
            ours, theirs = (w.parts[part].read(name, 0, math.prod(shape)) for w in (single, folder))
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_blocks_are_counted_not_assumed(checkpoints, tmp_path):
    found = detect(checkpoint(tmp_path, checkpoints.ldm_unet(checkpoints.SSD1B))).family.unet
    assert found.down_depths == ((0, 0), (2, 2), (4, 4))
    assert found.up_depths == ((4, 4, 4), (2, 2, 2), (0, 0, 0))
    assert (found.mid_depth, found.mid_resnets) == (0, 1)


@pytest.mark.parametrize(("channels", "guidance"), [(9, 0), (8, 0), (4, 256)])
def test_inpainting_pix2pix_and_lcm(checkpoints, tmp_path, channels, guidance):
    sizes = dataclasses.replace(checkpoints.SD15, in_channels=channels, guidance=guidance)
    found = detect(checkpoint(tmp_path, checkpoints.ldm_checkpoint(sizes)))
    unet = dataclasses.replace(SD15.unet, in_channels=channels, timestep_cond_dim=guidance if guidance else None)
    assert found.family == dataclasses.replace(SD15, unet=unet)
    assert dict(found.defaults) == (
        {"steps": 4, "guidance_scale": 8.0, "sampler": "lcm", "spacing": "lcm"} if guidance else {}
    )


@pytest.mark.parametrize(("spread", "expected", "size"), [(0.15, "v_prediction", 768), (0.03, "epsilon", 512)])
def test_stable_diffusion_2_tells_by_a_tensor_what_it_predicts(checkpoints, tmp_path, spread, expected, size):
    tensors = checkpoints.values(checkpoints.ldm_unet(checkpoints.TINY_SD2))
    teller = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[teller] = spread * np.random.default_rng(0).standard_normal(tensors[teller].shape).astype(np.float32)
    path = tmp_path / "unet.safetensors"
    checkpoints.write_safetensors(path, tensors, metadata=checkpoints.TINY_SD2.header())
    found = detect(open_checkpoint(path))
    assert (found.family.prediction, found.family.size) == (expected, size)
    assert f'"{teller}" has a deviation of' in found.reasons["prediction type"]
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    found = detect(open_checkpoint(path))
    assert (found.family.prediction, found.reasons["prediction type"]) == ("v_prediction", "unet.yaml")


def test_a_family_can_be_asked_for_where_tensors_leave_a_choice(checkpoints, tmp_path):
    vae = checkpoint(tmp_path, checkpoints.ldm_vae(checkpoints.SD15))
    assert detect(vae).family.latent_scale == SD15.latent_scale
    assert "--family sdxl" in detect(vae).reasons["family"]
    assert detect(vae, family="sdxl").family == SDXL
    unet = checkpoint(tmp_path, checkpoints.ldm_unet(checkpoints.SD15))
    with pytest.raises(ConversionError, match=r"family sdxl is asked for, but .* says sd15; leave --family out"):
        detect(unet, family="sdxl")
    # 2816 numbers are 1280 and 6 sizes, or 1536 and 5.
    unet = checkpoint(tmp_path, checkpoints.ldm_unet(checkpoints.SDXL))
    refiner = detect(unet, family="sdxl_refiner").family
    assert (refiner.unet.time_ids, refiner.unet.pooled_dim) == (5, 1536)
    assert refiner.text_encoders == SDXL_REFINER.text_encoders


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd_xl_turbo_1.0_fp16", {"steps": 4, "sampler": "euler_a", "spacing": "trailing"}),
        ("sdxl_lightning_8step", {"steps": 8, "sampler": "euler", "spacing": "trailing"}),
        ("Hyper-SDXL-1-step", {"steps": 1, "sampler": "ddim", "spacing": "trailing"}),
        ("dreamshaper_LCM_v7", {"steps": 4, "sampler": "lcm", "spacing": "lcm"}),
        ("hyperrealism_v3", {}),
        ("lcmix", {}),
    ],
)
def test_models_for_few_steps_are_known_by_name(checkpoints, tmp_path, name, expected):
    source = checkpoint(tmp_path, checkpoints.ldm_unet(checkpoints.SDXL))
    source = dataclasses.replace(source, path=tmp_path / f"{name}.safetensors")
    found = detect(source)
    assert dict(found.defaults) == (expected | {"guidance_scale": 1.0} if expected else {})
    assert ("few steps" in found.reasons) is bool(expected)
    assert detect(source, distilled="none").defaults == {}
    assert detect(source, distilled="turbo").family.size == 512


def test_lightning_of_one_step_predicts_the_picture(checkpoints, tmp_path):
    source = checkpoint(tmp_path, checkpoints.ldm_unet(checkpoints.SDXL))
    source = dataclasses.replace(source, path=tmp_path / "sdxl_lightning_1step_x0.safetensors")
    assert detect(source).family.prediction == "sample"
    assert detect(source, "epsilon").family.prediction == "epsilon"


def test_a_bare_second_encoder_is_told_by_its_width(checkpoints, tmp_path):
    sizes = dataclasses.replace(checkpoints.SDXL, second_layers=2)
    open_clip = checkpoints.open_clip_text(sizes, 1280, 2)
    found = detect(checkpoint(tmp_path, open_clip))
    assert sorted(found.parts) == ["text_encoder_2"]
    assert found.family.text_encoder("text_encoder_2").layers == 2
    names = set(checkpoints.hugging_face_text({key: np.zeros(shape) for key, shape in open_clip.items()}))
    assert set(found.parts["text_encoder_2"].shapes) == names
    hugging_face = {name: found.parts["text_encoder_2"].shapes[name] for name in names}
    assert detect(checkpoint(tmp_path, hugging_face)).family == found.family


def test_micro_conditioning_of_neither_width_is_refused(checkpoints, tmp_path):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY_SDXL) | {f"{P}label_emb.0.0.weight": (128, 1000)}
    with pytest.raises(ConversionError, match=r"reads 1000 numbers; expected the pooled text's 48 and 256"):
        detect(checkpoint(tmp_path, shapes, checkpoints.TINY_SDXL.header()))


OTHER_FILES = {
    "a LoRA": [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.x.to_q.lora_A.weight",
        "base_model.model.x.to_q.oft_R.weight",
    ],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "controlnet_cond_embedding.conv_in.weight"],
    "Chroma": ["model.diffusion_model.distilled_guidance_layer.in_proj.weight"],
    "Hunyuan Video": ["txt_in.individual_token_refiner.blocks.0.norm1.weight"],
    "Flux 2": ["double_stream_modulation_img.lin.weight"],
    "HiDream": ["double_stream_blocks.0.block.attn1.to_q.weight"],
    "AuraFlow (Pony 7)": ["model.diffusion_model.double_layers.0.attn.w2q.weight", "joint_transformer_blocks.0.x"],
    "Qwen Image": ["transformer_blocks.0.img_mod.1.weight"],
    "LTX Video": ["patchify_proj.weight"],
    "Sana": ["transformer_blocks.0.ff.conv_inverted.weight"],
    "Hunyuan DiT": ["mlp_t5.0.weight", "text_embedding_padding"],
    "Lumina 2 or Z-Image": ["noise_refiner.0.attention.qkv.weight"],
    "Wan": ["blocks.0.cross_attn.norm_k.weight"],
    "PixArt": ["adaln_single.linear.weight", "t_block.1.weight"],
    "DeepFloyd IF or Kandinsky 2": ["down_blocks.1.attentions.0.add_k_proj.weight"],
    "Kolors": ["encoder_hid_proj.weight", "text_encoder.encoder.layers.0.self_attention.query_key_value.weight"],
    "a diffusion transformer": ["transformer_blocks.0.attn1.to_q.weight", "model.diffusion_model.blocks.0.q.weight"],
    "a T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "an IP-Adapter": ["ip_adapter.1.to_k_ip.weight"],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "a textual-inversion embedding": ["emb_params", "clip_g"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "an image upscaler": ["conv_first.weight"],
    "Stable Diffusion 3": [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "transformer_blocks.0.attn.add_k_proj.weight",
    ],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.attn.to_q.weight"],
    "Stable Video Diffusion": ["conditioner.embedders.0.open_clip.model.ln_final.weight"],
    "Stable Cascade": ["model.clip_txt_pooled_mapper.weight"],
    "Stable Diffusion 2 unCLIP": ["noise_augmentor.time_embed.weight", "embedder.model.visual.proj"],
    "Stable Diffusion 2 depth": ["depth_model.model.pretrained.cls_token"],
    "a model of another noise schedule": ["edm_mean", "edm_vpred.sigma_max"],
}


@pytest.mark.parametrize(("what", "key"), [(what, key) for what, keys in OTHER_FILES.items() for key in keys])
def test_other_files_are_named(tmp_path, what, key):
    with pytest.raises(CheckpointError) as caught:
        detect(checkpoint(tmp_path, {key: (4, 4), "other": (4, 4)}))
    assert f"this is {what} (" in str(caught.value)
    assert f'(key "{key}"), expected a Stable Diffusion checkpoint' in str(caught.value)


def test_folders_of_other_families_are_named(checkpoints, tmp_path):
    folder = tmp_path / "flux"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match=r"says FluxPipeline: a diffusion transformer \(transformer/\)"):
        open_checkpoint(folder)
    playground = checkpoints.write_diffusers(tmp_path / "playground")
    config = playground / "scheduler" / "scheduler_config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text('{"_class_name": "EDMDPMSolverMultistepScheduler"}')
    with pytest.raises(CheckpointError, match=r"EDMDPMSolverMultistepScheduler: a model of another noise schedule"):
        detect(open_checkpoint(playground))


P = "model.diffusion_model."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{P}input_blocks.0.0.weight": (32, 5, 3, 3)}, "takes 5 channels: this is a depth model, expected 4, 8, 9"),
        ({f"{P}input_blocks.0.0.weight": (32, 7, 3, 3)}, "this is the x4 upscaler"),
        ({f"{P}input_blocks.0.0.weight": (32, 4)}, "which tells no input channels"),
        ({f"{P}input_blocks.0.0.weight": (32, 0, 3, 3)}, "no input channels at all; it is damaged"),
        ({f"{P}class_embedding.weight": (1000, 128)}, "this is a UNet of the x4 upscaler"),
        ({"first_stage_model.post_quant_conv.weight": (16, 16, 1, 1)}, "latents of 16 channels, expected 4"),
    ],
)
def test_what_cannot_be_drawn_with_is_named_by_the_tensor_that_tells(checkpoints, tmp_path, changes, message):
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY) | changes
    with pytest.raises((CheckpointError, ConversionError)) as caught:
        detect(checkpoint(tmp_path, shapes, checkpoints.TINY.header()))
    assert message in str(caught.value)
    assert next(iter(changes)) in str(caught.value)


def test_text_encoder_and_unet_of_two_models_are_refused(checkpoints, tmp_path):
    other = checkpoints.clip_text(dataclasses.replace(checkpoints.TINY, context=128))
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY)
    shapes |= {f"cond_stage_model.transformer.{key}": shape for key, shape in other.items()}
    with pytest.raises(
        ConversionError,
        match=r"a context of 64 numbers a token .* the text encoder gives 128; they are not of one model",
    ):
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
