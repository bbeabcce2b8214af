"""The embedded family as diffusers and transformers read it: their own converters, configurations written here."""

from pathlib import Path

import pytest
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as single
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(__file__).parents[3] / "models" / "tiny"
UNET = {
    "sample_size": 32, "block_out_channels": (32, 48, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 64,
    "norm_num_groups": 8, "layers_per_block": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def folder() -> Path:
    """models/tiny."""
    return FOLDER


@pytest.fixture(scope="session")
def checkpoint():
    """The tensors of tiny.safetensors, fp32; read only."""
    return {name: value.float() for name, value in load_file(FOLDER / "tiny.safetensors").items()}


@pytest.fixture
def unet(checkpoint):
    """The UNet through diffusers' own converter; a fresh one each time, because tests patch it."""
    net = UNet2DConditionModel(**UNET)
    net.load_state_dict(single.convert_ldm_unet_checkpoint(dict(checkpoint), config=dict(net.config)))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vae(checkpoint):
    """The VAE through diffusers' own converter."""
    net = AutoencoderKL(
        block_out_channels=(32, 40, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
    )
    net.load_state_dict(single.convert_ldm_vae_checkpoint(dict(checkpoint), config=dict(net.config)))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def text_encoder(checkpoint):
    """The text encoder as transformers names it."""
    prefix = "cond_stage_model.transformer."
    vocab_size = checkpoint[prefix + "text_model.embeddings.token_embedding.weight"].shape[0]
    net = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
        )
    )
    # transformers from 5.6 on has no "text_model." in front of the names.
    cut = prefix if any(name.startswith("text_model.") for name in net.state_dict()) else prefix + "text_model."
    net.load_state_dict(
        {name.removeprefix(cut): value for name, value in checkpoint.items() if name.startswith(prefix)}
    )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def controlnet():
    """The ControlNet through diffusers' own converter."""
    weights = {name: value.float() for name, value in load_file(FOLDER / "tiny_control_canny.safetensors").items()}
    widths = {name: value.shape[0] for name, value in weights.items() if "input_hint_block" in name}
    hint = tuple(widths[f"control_model.input_hint_block.{index}.weight"] for index in (0, 4, 8, 12))
    net = ControlNetModel(
        **{key: value for key, value in UNET.items() if key != "sample_size"}, conditioning_embedding_out_channels=hint
    )
    net.load_state_dict(single.convert_controlnet_checkpoint(weights, config=dict(net.config)))
    return net.eval().requires_grad_(False)
