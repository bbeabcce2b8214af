"""The files that ship: what they hold, that others read them unchanged, and that the model card speaks the truth."""

import hashlib
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from glassine.models.tiny.train import files, networks
from glassine.models.tiny.train.captions import captions, tokenize, vocabulary, words
from glassine.models.tiny.train.drawings import sample

WEIGHTS = (
    "tiny", "tiny_control_canny", "tiny_lcm_lora", "tiny_transparent_attn", "tiny_transparent_decoder",
    "tiny_transparent_encoder",
)  # fmt: skip
SHIPPED = (*(f"{name}.safetensors" for name in WEIGHTS), "vocab.json", "merges.txt")


def test_everything_together_is_at_most_12_megabytes(folder):
    assert {path.name for path in folder.iterdir() if path.suffix in {".safetensors", ".json", ".txt"}} == set(SHIPPED)
    assert sum((folder / name).stat().st_size for name in SHIPPED) <= 12_000_000  # 11,889,911


@pytest.mark.parametrize("name", SHIPPED)
def test_the_model_card_names_the_file_and_its_sha256(folder, name):
    card = (folder / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert re.search(rf"`{re.escape(name)}`.*`{digest}`", card), f"{name}: the card does not give {digest}"


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_fp16_finite_and_licensed(folder, name):
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        assert file.metadata()["modelspec.license"] == "Apache-2.0"
    for key, value in load_file(folder / f"{name}.safetensors").items():
        assert value.dtype == torch.float16, key
        assert value.isfinite().all(), key


def test_the_header_says_what_shapes_cannot(folder, unet, text_encoder):
    with safe_open(folder / "tiny.safetensors", "pt") as file:
        about = file.metadata()
    assert about["modelspec.architecture"] == "stable-diffusion-v1"
    assert about["modelspec.prediction_type"] == "epsilon"
    assert int(about["glassine.heads"]) == unet.config.attention_head_dim
    assert int(about["glassine.norm_groups"]) == unet.config.norm_num_groups
    assert int(about["glassine.text_heads"]) == text_encoder.config.num_attention_heads
    assert about["glassine.words"].split() == words()


@torch.no_grad()
def test_diffusers_reads_what_training_wrote(folder, checkpoint, unet, vae, text_encoder, controlnet):
    """Two ways from the file to a network, ours by name and diffusers' by its converters, give the same numbers."""
    nets = networks.vae(), networks.unet(), networks.text_encoder()
    files.read(folder / "tiny.safetensors", files.checkpoint(*nets))
    control = networks.controlnet(nets[1])
    files.read(folder / "tiny_control_canny.safetensors", files.control_weights(control))
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 64)
    picture, hint = torch.rand(1, 3, 64, 64), (torch.rand(1, 3, 128, 128) > 0.9).float()
    for net in (*nets, control):
        net.eval()
    torch.testing.assert_close(nets[1](x, t, context).sample, unet(x, t, context).sample, rtol=0, atol=0)
    torch.testing.assert_close(nets[0](picture).sample, vae(picture).sample, rtol=0, atol=0)
    ids = tokenize(["a red star, blue background"])
    torch.testing.assert_close(nets[2](ids)[0], text_encoder(ids)[0], rtol=0, atol=0)
    ours, theirs = (net(x, t, context, hint, return_dict=False) for net in (control, controlnet))
    for one, other in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_weight_of_the_checkpoint_is_left_over(checkpoint):
    named = files.checkpoint(networks.vae(), networks.unet(), networks.text_encoder())
    assert {name: value.shape for name, value in named.items()} == {n: v.shape for n, v in checkpoint.items()}


@torch.no_grad()
def test_the_lcm_lora_loads_as_any_kohya_lora(folder, unet):
    """diffusers' loader (peft) and the plain merge W + up @ down give the same network."""
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 64)
    plain = unet(x, t, context).sample
    weights = load_file(folder / "tiny_lcm_lora.safetensors")
    merged = networks.unet()
    merged.load_state_dict(unet.state_dict())
    layers = {"lora_unet_" + name.replace(".", "_"): layer for name, layer in merged.named_modules()}
    for stem in sorted({key.split(".")[0] for key in weights}):
        up, down = (weights[f"{stem}.lora_{side}.weight"].float() for side in ("up", "down"))
        assert float(weights[f"{stem}.alpha"]) == down.shape[0]
        weight = layers[stem].weight
        weight += (up.flatten(1) @ down.flatten(1)).view_as(weight)
    unet.load_lora_adapter(lora_keys(weights), prefix="unet")
    loaded = unet(x, t, context).sample
    assert (loaded - plain).abs().max() > 0.05
    torch.testing.assert_close(loaded, merged.eval()(x, t, context).sample, rtol=0, atol=2e-5)  # measured below 4e-6


def lora_keys(weights):
    """Return kohya's LoRA as diffusers' pipelines hand it to a UNet."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    converted, alphas = _convert_non_diffusers_lora_to_diffusers({k: v.float() for k, v in weights.items()})
    assert set(alphas.values()) == {6.0}
    return converted


def test_the_patch_names_every_attention_layer_of_the_unet(folder, checkpoint):
    weights = load_file(folder / "tiny_transparent_attn.safetensors")
    expected = {
        name.removeprefix("model.")
        for name in checkpoint
        if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.weight$", name) and name.startswith("model.diffusion_model.")
    }
    assert {key.split("::")[0] for key in weights} == expected
    for name in expected:
        up, down = weights[f"{name}::lora::0"], weights[f"{name}::lora::1"]
        assert (up @ down).shape == checkpoint["model." + name].shape


def test_the_transparent_networks_have_the_names_of_the_released_ones(folder):
    decoder = load_file(folder / "tiny_transparent_decoder.safetensors")
    encoder = load_file(folder / "tiny_transparent_encoder.safetensors")
    # The released decoder has 538 tensors; this one has no shortcut on level 3, where its width does not change.
    assert len(decoder) == 536
    shortcuts = {key.split(".")[1] for key in decoder if key.startswith("down") and "conv_shortcut" in key}
    assert shortcuts == {"2", "4", "5"}
    assert sorted(encoder) == sorted(f"blocks.{n}.{leaf}" for n in range(0, 18, 2) for leaf in ("bias", "weight"))


def test_any_clip_tokenizer_reads_the_vocabulary(folder):
    tokenizer = CLIPTokenizer(
        vocab=json.loads((folder / "vocab.json").read_text(encoding="utf-8")),
        merges=[tuple(line.split()) for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]],
    )
    prompts = [text for row in captions(sample(200, 9), 1, 9) for text in row]
    ids = [tokenizer(text, padding="max_length", max_length=77).input_ids for text in prompts]
    assert torch.equal(torch.tensor(ids), tokenize(prompts))
    vocab, merges = vocabulary()
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == vocab
    assert len(merges) == len(vocab) - 514
