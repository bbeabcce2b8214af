"""LoRA files as diffusers and PEFT save them, merged by us and by them: the same weights."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.boft.layer import Linear as BoftLinear
from safetensors.torch import save_file

from glassine.convert.lora import LoraFile, with_loras
from glassine.convert.weights import Arrays

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in"]
CONFIGS = {
    "attention": LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION),
    "alpha": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS),
    "convolutions": LoraConfig(r=4, lora_alpha=2, target_modules=CONVOLUTIONS),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LAYERS),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, target_modules=LAYERS, rank_pattern={"to_q": 3}, alpha_pattern={"to_q": 5, "attn2.to_k": 1}
    ),
    "bias": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["to_out.0", "conv1"]),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=[*LAYERS, *CONVOLUTIONS]),
}


def randomise(module, *words):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(word in name for word in words):
                noise = torch.randn(parameter.shape, generator=generator)
                # A magnitude is a norm: it stays near what it was.
                parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else 0.3 * noise)


def compare(networks, network, path, fused, strength=1.0):
    """Hold the whole merged UNet against `fused`."""
    base = networks.state(network)
    stack = with_loras({"unet": Arrays(base)}, [LoraFile(path, strength)])["unet"]
    changed = 0
    assert set(fused) == set(base)
    for name, expected in fused.items():
        found = stack.read(name, 0, math.prod(expected.shape)).reshape(expected.shape)
        # measured 3e-7 of the largest value
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=name)
        changed += not np.array_equal(expected, base[name])
    assert changed >= 4


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_files(case, family, networks, tmp_path):
    _, network = networks.unet(family)
    unet = copy.deepcopy(network)
    unet.add_adapter(copy.deepcopy(CONFIGS[case]))
    randomise(unet, "lora_")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        weight_name="lora.safetensors",
    )
    unet.fuse_lora()
    unet.unload_lora()
    compare(networks, network, tmp_path / "lora.safetensors", networks.state(unet))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_kohya_files_of_diffusers_own_writing(family, networks, tmp_path):
    _, network = networks.unet(family)
    unet = copy.deepcopy(network)
    unet.add_adapter(copy.deepcopy(CONFIGS["alpha"]))
    randomise(unet, "lora_")
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
    kohya = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(state).items()}
    assert all(key.startswith("lora_unet_") for key in kohya)
    # It writes alpha = rank, which merges as scale 1; ours is 6 of rank 4.
    kohya = {key: torch.tensor(6.0) if key.endswith(".alpha") else value for key, value in kohya.items()}
    save_file(kohya, tmp_path / "lora.safetensors")
    unet.fuse_lora(lora_scale=0.7)
    unet.unload_lora()
    compare(networks, network, tmp_path / "lora.safetensors", networks.state(unet), 0.7)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=4, alpha=6, target_modules=LAYERS),
        LoHaConfig(r=4, alpha=6, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=3, target_modules=LAYERS),
        LoKrConfig(r=2, alpha=3, target_modules=LAYERS, decompose_both=True),
        LoKrConfig(r=2, alpha=3, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
        LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LAYERS),
    ],
    ids=["loha", "loha-conv", "lokr", "lokr-both", "lokr-conv", "lora"],
)
def test_peft_folders(config, networks, tmp_path):
    """PEFT's own folders: alpha stands in adapter_config.json."""
    _, network = networks.unet("sd1")
    wrapped = get_peft_model(copy.deepcopy(network), config)
    randomise(wrapped, "lora_", "hada_", "lokr_")
    wrapped.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    fused = networks.state(wrapped.merge_and_unload())
    compare(networks, network, tmp_path / "adapter_model.safetensors", fused)


def near_one(module, *words):
    """Random values around those that leave a weight as it is."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(word in name for word in words):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(oft_block_size=8, target_modules=LAYERS, use_cayley_neumann=False),
        OFTConfig(oft_block_size=8, target_modules=LAYERS, block_share=True),
        *(OFTConfig(oft_block_size=4, target_modules=["to_q"], num_cayley_neumann_terms=n) for n in (2, 3, 4, 7)),
        OFTConfig(oft_block_size=16, target_modules=["to_q", "to_k"], coft=True, eps=0.05, use_cayley_neumann=False),
        OFTConfig(oft_block_size=24, target_modules=CONVOLUTIONS),
        BOFTConfig(boft_block_size=8, target_modules=LAYERS),
        BOFTConfig(boft_block_size=12, target_modules=["conv1"]),
        IA3Config(target_modules=[*LAYERS, "conv1", "conv2"], feedforward_modules=["ff.net.2", "conv2"]),
    ],
    ids=["oft", "oft-shared", *(f"oft-{n}-terms" for n in (2, 3, 4, 7)), "oft-constrained", "oft-conv",
         "boft", "boft-conv", "ia3"],
)  # fmt: skip
def test_peft_rotations_and_scalings(config, networks, tmp_path):
    _, network = networks.unet("sd1")
    wrapped = get_peft_model(copy.deepcopy(network), config)
    near_one(wrapped, "oft_R", "boft_R", "boft_s", "ia3_l")
    wrapped.save_pretrained(tmp_path)
    fused = networks.state(wrapped.merge_and_unload())
    compare(networks, network, tmp_path / "adapter_model.safetensors", fused)


@pytest.mark.parametrize(("stages", "count", "size"), [(2, 4, 4), (3, 8, 4), (2, 6, 8)])
def test_peft_butterflies_of_several_stages(stages, count, size, checkpoints, tmp_path):
    """PEFT trains them with a CUDA extension alone; its own orders and rotations make the matrices here."""
    columns = count * size
    layer = BoftLinear(torch.nn.Linear(columns, 8), "default", BOFTConfig(boft_block_size=size))
    rng = np.random.default_rng(1)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = rng.standard_normal((8, columns)).astype(np.float32)
    blocks, factors = (0.4 * rng.standard_normal((stages, count, size, size)), 1 + 0.1 * rng.standard_normal((8, 1)))
    tensors = {f"base_model.model.{name}.boft_R": blocks, f"base_model.model.{name}.boft_s": factors}
    path = checkpoints.write_safetensors(tmp_path / "b.safetensors", tensors, dtype="F32")
    whole = torch.eye(columns, dtype=torch.float64)
    for i in range(stages):
        order = layer.block_butterfly_perm(columns, count >> i, size // 2, stages - 1)
        swap = layer.perm2mat(order).double()
        rotated = layer.cayley_batch(torch.from_numpy(blocks[i].astype(np.float32)))
        whole = swap @ torch.block_diag(*rotated.double()) @ swap.T @ whole
    expected = (whole.numpy() @ weight.T.astype(np.float64)).T * factors
    stack = with_loras({"unet": Arrays({f"{name}.weight": weight})}, [LoraFile(path)])["unet"]
    found = stack.read(f"{name}.weight", 0, weight.size).reshape(weight.shape)
    # measured 4e-7 of the largest value
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
