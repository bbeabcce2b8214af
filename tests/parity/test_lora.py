"""LoRA files as diffusers and PEFT save them, merged by us and by them: the same weights."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
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
