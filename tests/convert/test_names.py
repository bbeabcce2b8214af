"""The name tables, key for key against diffusers' converters and the classes of diffusers and transformers."""

import contextlib
import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as oracle
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from glassine.convert.names import find_layouts, ignored, map_names

SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


def meta(cls, **config):
    with torch.device("meta"):
        return cls(**config)


def canonical(keys, part):
    names = map_names(keys, find_layouts(keys))
    assert not names.unknown
    assert not names.twice
    return {source.key: name for name, source in names.parts[part].items()}


def sources(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def theirs(convert, keys, config, rank=1):
    """Key -> name by one of diffusers' converters: every tensor has a shape of its own that tells where it went."""
    tensors = {key: torch.empty(i + 1, *[1] * (rank - 1), device="meta") for i, key in enumerate(sorted(keys))}
    names = {tensor.shape[0]: name for name, tensor in convert(dict(tensors), config=config).items()}
    return {key: names[tensor.shape[0]] for key, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "", "diffusion_model."])
def test_ldm_unet_equals_diffusers(checkpoints, prefix):
    keys = checkpoints.ldm_unet(checkpoints.SD15)
    assert len(keys) == 686
    known = "model.diffusion_model."  # the one diffusers knows
    expected = theirs(oracle.convert_ldm_unet_checkpoint, [known + key for key in keys], {"layers_per_block": 2})
    assert canonical([prefix + key for key in keys], "unet") == {
        prefix + key.removeprefix(known): name for key, name in expected.items()
    }
    assert set(expected.values()) == set(sources(meta(UNet2DConditionModel, **SD15_UNET)))


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
def test_ldm_vae_equals_diffusers(checkpoints, prefix):
    keys = checkpoints.ldm_vae(checkpoints.SD15)
    assert len(keys) == 248
    known = "first_stage_model."
    config = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    expected = theirs(oracle.convert_ldm_vae_checkpoint, [known + key for key in keys], config, rank=4)
    assert canonical([prefix + key for key in keys], "vae") == {
        prefix + key.removeprefix(known): name for key, name in expected.items()
    }
    assert set(expected.values()) == set(sources(meta(AutoencoderKL, **VAE)))


def test_vae_of_older_diffusers(checkpoints):
    new = set(sources(meta(AutoencoderKL, **VAE)))
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = set()
    for key in new:
        for ours, theirs in words.items():
            key = key.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")  # noqa: PLW2901
        old.add(key)
    assert old != new
    assert set(canonical(old, "vae").values()) == new
    assert canonical(new, "vae") == {key: key for key in new}


def test_more_levels_count_the_other_way_too(checkpoints):
    sizes = checkpoints.Sizes(vae=(32, 32, 48, 64, 64))
    names = canonical(set(checkpoints.ldm_vae(sizes)), "vae")
    assert names["decoder.up.4.block.0.norm1.weight"] == "decoder.up_blocks.0.resnets.0.norm1.weight"
    assert names["decoder.up.0.block.2.norm1.weight"] == "decoder.up_blocks.4.resnets.2.norm1.weight"


@pytest.mark.parametrize(
    ("prefix", "stored"),
    [
        ("cond_stage_model.transformer.", "text_model."),
        ("cond_stage_model.transformer.", ""),
        ("text_encoder/", "text_model."),
        ("text_encoder/", ""),
        ("", "text_model."),
        ("", ""),
    ],
)
def test_clip_with_and_without_text_model(checkpoints, prefix, stored):
    inner = {key.removeprefix("text_model.") for key in checkpoints.clip_text(checkpoints.SD15)}
    names = canonical({prefix + stored + key for key in inner}, "text_encoder")
    with contextlib.suppress(ImportError), torch.device("meta"):
        network = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=12, hidden_size=768))
    expected = set(sources(network)) - {"text_projection.weight"}
    assert {name for name in expected if "position_ids" not in name} == set(names.values())


@pytest.mark.parametrize(("family", "count"), [("sd2", 686), ("sdxl", 1680), ("sdxl_refiner", 1220)])
def test_the_unet_of_every_family_equals_diffusers(checkpoints, family, count):
    sizes = checkpoints.FULL_SIZE[family]
    keys = [f"model.diffusion_model.{key}" for key in checkpoints.ldm_unet(sizes)]
    assert len(keys) == count
    network = meta(UNet2DConditionModel, **{**checkpoints.diffusers_configs(sizes)["unet"], "_class_name": ""})
    expected = theirs(oracle.convert_ldm_unet_checkpoint, keys, dict(network.config))
    assert canonical(keys, "unet") == expected
    assert set(expected.values()) == set(sources(network))
    # And shape for shape: a stacked, transposed or widened weight would not be the same.
    shapes = checkpoints.ldm_unet(sizes)
    own = {name: shapes[key.removeprefix("model.diffusion_model.")] for key, name in expected.items()}
    assert own == sources(network)


def test_the_guidance_embedding_has_a_name(checkpoints):
    sizes = dataclasses.replace(checkpoints.SD15, guidance=256)
    network = meta(UNet2DConditionModel, **{**checkpoints.diffusers_configs(sizes)["unet"], "_class_name": ""})
    assert set(canonical(checkpoints.ldm_unet(sizes), "unet").values()) == set(sources(network))


@pytest.mark.parametrize(
    ("family", "prefix", "part"),
    [
        ("sd2", "cond_stage_model.model.", "text_encoder"),
        ("sdxl", "conditioner.embedders.1.model.", "text_encoder_2"),
        ("sdxl_refiner", "conditioner.embedders.0.model.", "text_encoder_2"),
    ],
)
def test_open_clip_of_every_family_is_transformers(checkpoints, family, prefix, part):
    sizes = checkpoints.FULL_SIZE[family]
    width, layers = (sizes.clip_width, sizes.text_layers) if family == "sd2" else (1280, 32)
    keys = {prefix + key for key in checkpoints.open_clip_text(sizes, width, layers)}
    names = map_names(keys, find_layouts(keys))
    assert not names.unknown
    config = CLIPTextConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=16, projection_dim=width)
    network = meta(CLIPTextModelWithProjection, config=config)
    assert set(names.parts[part]) == {name for name in sources(network) if "position_ids" not in name}


def test_open_clip_equals_diffusers(checkpoints):
    layers, width = 23, 8
    prefix = "cond_stage_model.model."
    keys = {f"{prefix}{name}" for name in ("positional_embedding", "token_embedding.weight", "text_projection")}
    keys |= {f"{prefix}ln_final.{kind}" for kind in ("weight", "bias")}
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}"
        keys |= {f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"}
        for name in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
            keys |= {f"{block}.{name}.weight", f"{block}.{name}.bias"}
    names = map_names(keys, find_layouts(keys))
    assert not names.unknown
    with torch.device("meta"):
        network = CLIPTextModelWithProjection(
            CLIPTextConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=2)
        )
    table = names.parts["text_encoder"]
    assert set(table) == {name for name in sources(network) if "position_ids" not in name}
    assert table["text_projection.weight"].transposed
    assert [table[f"text_model.encoder.layers.3.self_attn.{letter}_proj.weight"].third for letter in "qkv"] == [0, 1, 2]


@pytest.mark.parametrize(
    "key",
    [
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_recipm1_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_mean_coef1",
        "betas",
        "first_stage_model.loss.logvar",
        "loss.discriminator.main.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.embeddings.position_ids",
        "text_encoder/text_model.embeddings.position_ids",
        "text_model.embeddings.position_ids",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "v_pred",
    ],
)
def test_what_means_nothing_for_drawing_is_on_the_list(key):
    assert ignored(key) is not None


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.out.2.weight", "betas2", "cond_stage_model.model.text_projection", "surprise"]
)
def test_nothing_else_is(key):
    assert ignored(key) is None
