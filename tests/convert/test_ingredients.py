"""A folder with LoRAs, an embedding, another VAE and the running average in it, held against what it was made of."""

import dataclasses
import shutil

import numpy as np
import pytest

from glassine.convert.embeddings import EmbeddingFile
from glassine.convert.extras import Extras
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.lora import LoraFile
from glassine.convert.previews import preview_networks
from glassine.convert.swap import add_loras
from glassine.convert.verify import verify_folder
from glassine.errors import PackageError
from glassine.manifest import Manifest
from glassine.runtime.engine import EngineOptions

PORTABLE = EngineOptions(engine="portable")
RNG = np.random.default_rng(11)
UNET = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def drawn(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def taesd(path, checkpoints):
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    tensors = {key: value.numpy() for key, value in AutoencoderTiny(**widths).state_dict().items()}
    return checkpoints.write_safetensors(path, {k: v for k, v in tensors.items() if k.startswith("decoder.")})


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """A checkpoint with EMA weights, and what goes over it."""
    folder = tmp_path_factory.mktemp("ingredients")
    sizes, write = checkpoints.TINY, checkpoints.write_safetensors
    tensors = checkpoints.values(checkpoints.ldm_checkpoint(sizes), seed=0)
    average = checkpoints.values({key: v.shape for key, v in tensors.items() if key.startswith("model.")}, seed=3)
    tensors |= {"model_ema." + key.removeprefix("model.").replace(".", ""): value for key, value in average.items()}
    vae = checkpoints.values(checkpoints.ldm_vae(sizes), seed=4)
    lora = {f"{UNET}.lora_down.weight": drawn(2, 64), f"{UNET}.lora_up.weight": drawn(64, 2)}
    both = {**lora, f"{TEXT}.lora_down.weight": drawn(2, 64), f"{TEXT}.lora_up.weight": drawn(256, 2)}
    (folder / "loras" / "inks").mkdir(parents=True)
    return {
        "checkpoint": write(folder / "both.safetensors", tensors, metadata=sizes.header()),
        "vae": write(folder / "vae.safetensors", vae, metadata=sizes.header()),
        "ink": write(folder / "loras" / "inks" / "ink.safetensors", both),
        "late": write(folder / "late.safetensors", lora),
        "word": write(folder / "Moon.safetensors", {"emb_params": drawn(3, 64)}),
        "taesd": taesd(folder / "taesd_decoder.safetensors", checkpoints),
    }


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """The model with all of it: most at conversion, the last LoRA afterwards."""
    made = tmp_path_factory.mktemp("made") / "model"
    extras = Extras(
        loras=(LoraFile(files["ink"], 0.8, 0.4),),
        vae=files["vae"],
        ema=True,
        embeddings=(EmbeddingFile(files["word"]),),
    )
    previews = (lambda base: preview_networks(files["taesd"], base),)
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", extras=extras, further=previews)
    convert_checkpoint(files["checkpoint"], made, options)
    add_loras(made, [LoraFile(files["late"], 0.5)])
    return made


def test_a_folder_is_its_checkpoint_with_what_went_over_it(folder, files):
    given = [files["ink"].parents[1], files["vae"], files["word"]]
    reports = verify_folder(folder, files["checkpoint"], given=given, options=PORTABLE)
    assert [report.role for report in reports] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert min(report.psnr for report in reports) > 60, reports  # measured 63 to 78


def test_every_ingredient_shows(folder, files, tmp_path):
    """Without one of them the same comparison fails: nothing is laid over that is not looked at."""
    plain = shutil.copytree(folder, tmp_path / "plain")
    given = [files["ink"], files["vae"], files["word"]]
    whole = Manifest.read(folder)
    ink, late = whole.loras
    for part, less in {
        "unet": {"loras": (ink, dataclasses.replace(late, unet=0.0))},
        "text_encoder": {"loras": (dataclasses.replace(ink, text=0.0), late)},
        "vae_decoder": {"decided": {}},
    }.items():
        dataclasses.replace(whole, **less).write(plain)
        (report,) = verify_folder(plain, files["checkpoint"], given=given, parts=[part], options=PORTABLE)
        assert report.psnr < 50, report  # measured at most 46


def test_what_is_missing_is_named_and_only_where_it_is_needed(folder, files):
    with pytest.raises(PackageError) as refused:
        verify_folder(folder, files["checkpoint"], options=PORTABLE)
    for what in ("the LoRA 'ink' (sha256 ", "the embedding 'moon'", "the VAE of vae.safetensors", "--with FILE"):
        assert what in str(refused.value)
    assert "'late'" not in str(refused.value)  # the folder has its own copy
    (report,) = verify_folder(
        folder, files["checkpoint"], given=[files["vae"]], parts=["vae_decoder"], options=PORTABLE
    )
    assert report.psnr > 60
    with pytest.raises(PackageError, match=r"taesd_decoder\.safetensors did not go into it"):
        verify_folder(folder, files["checkpoint"], given=[*files.values()][1:], options=PORTABLE)
    with pytest.raises(PackageError, match="nowhere: no such file"):
        verify_folder(folder, files["checkpoint"], given=[files["vae"].parent / "nowhere"], options=PORTABLE)


def test_taesd_is_judged_by_its_own_file(folder, files, checkpoints, tmp_path):
    (report,) = verify_folder(folder, files["taesd"], options=PORTABLE)
    assert report.role == "preview_decoder"
    assert report.psnr > 60  # measured 66
    other = taesd(tmp_path / "other.safetensors", checkpoints)
    with pytest.raises(PackageError, match="nothing in it was made of"):
        verify_folder(folder, other, options=PORTABLE)
