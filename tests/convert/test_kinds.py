"""What a file is, by its header: every kind that people have, and what a stranger may have written into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from glassine.convert import kinds
from glassine.convert.kinds import describe_file, weights_below
from glassine.errors import CheckpointError

TINY = Path(kinds.__file__).parents[1] / "models" / "tiny"
TO_K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def written(checkpoints, tmp_path):
    def write(name: str, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
        tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        return checkpoints.write_safetensors(tmp_path / name, tensors, metadata=metadata)

    return write


def lora(width: int, rank: int = 32) -> dict[str, tuple[int, ...]]:
    return {f"{TO_K}.lora_down.weight": (rank, width), f"{TO_K}.lora_up.weight": (640, rank), f"{TO_K}.alpha": ()}


@pytest.mark.parametrize(("width", "family"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl"), (96, None)])
def test_a_lora_is_for_the_family_whose_text_it_reads(written, width, family):
    found = describe_file(written("ink.safetensors", lora(width)))
    assert (found.what, found.family, found.use) == ("LoRA", family, "glassine lora MODEL add ink.safetensors")
    assert found.facts == {"methods": ["LoRA"], "ranks": [32], "layers": {"unet": 1, "text": 0}}


@pytest.mark.parametrize(
    ("shapes", "methods", "family"),
    [
        ({f"{TO_K}.hada_w1_a": (640, 4), f"{TO_K}.hada_w1_b": (4, 768)}, ["LoHa"], None),
        ({f"{TO_K}.lokr_w1": (8, 8), f"{TO_K}.lokr_w2": (80, 96)}, ["LoKr"], None),
        ({**lora(768), f"{TO_K}.dora_scale": (640, 1)}, ["LoRA", "DoRA"], "sd15"),
        ({f"{TO_K}.diff": (640, 768)}, ["differences"], None),
        (
            {
                "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280),
                "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (5120, 4),
            },
            ["LoRA"],
            "sdxl",
        ),
        (
            {
                "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048),
                "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": (640, 4),
            },
            ["LoRA"],
            "sdxl",
        ),
    ],
)
def test_kin_of_loras(written, shapes, methods, family):
    found = describe_file(written("x.safetensors", shapes))
    assert (found.what, found.facts["methods"], found.family) == ("LoRA", methods, family)


def test_what_a_trainer_wrote_is_told_and_cannot_steer_the_terminal(written):
    words = {"10_ink": {"ink drawing": 50, "1girl ": 20, "\x1b[31mred": 3}, "5_more": {"1girl": 40}}
    path = written(
        "ink.safetensors",
        lora(768),
        **{
            "modelspec.title": "Ink\n\x1b]0;evil\x07" + "x" * 200,
            "ss_base_model_version": "sd_v1",
            "ss_tag_frequency": json.dumps(words),
        },
    )
    facts = describe_file(path).facts
    assert facts["words"] == ["1girl", "ink drawing", "[31mred"]
    assert facts["base"] == "sd_v1"
    assert facts["title"].startswith("Ink ]0;evilx")
    assert facts["title"].isprintable()
    assert len(facts["title"]) == 80


@pytest.mark.parametrize("words", ["{", "[]", '{"a": 3}', '{"a": {"b": "many"}}', "[" * 100_000])
def test_captions_that_are_no_table_are_left_out(written, words):
    assert "words" not in describe_file(written("ink.safetensors", lora(768), ss_tag_frequency=words)).facts


@pytest.mark.parametrize(
    ("shapes", "family", "vectors"),
    [
        ({"emb_params": (8, 768)}, "sd15", 8),
        ({"<cat>": (1024,)}, "sd2", 1),
        ({"clip_g": (3, 1280), "clip_l": (3, 768)}, "sdxl", 3),
        ({"emb_params": (2, 64)}, None, 2),
    ],
)
def test_textual_inversions(written, shapes, family, vectors):
    found = describe_file(written("Bad Hands.safetensors", shapes))
    assert (found.what, found.family) == ("textual inversion", family)
    assert found.facts == {"word": "bad hands", "vectors": vectors}


@pytest.mark.parametrize(("sizes", "family"), [("SD15", "sd15"), ("SD21", "sd2"), ("SDXL", "sdxl"), ("TINY", None)])
def test_control_networks(checkpoints, controls, tmp_path, sizes, family):
    shapes = controls.ldm_control(checkpoints, getattr(checkpoints, sizes))
    found = describe_file(checkpoints.write_sparse(tmp_path / "canny.safetensors", shapes))
    assert (found.what, found.family) == ("ControlNet", family)
    assert found.use == "glassine convert canny.safetensors --base MODEL"


def test_other_things_that_steer(checkpoints, controls, tmp_path):
    whole = checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    deltas, _ = controls.control_lora(whole)
    assert describe_file(checkpoints.write_safetensors(tmp_path / "a.safetensors", deltas)).what == "Control-LoRA"
    for cells, family in ((3 * 64, "sd15"), (3 * 256, "sdxl")):
        shapes = controls.adapter((320, 640, 1280, 1280), cells)
        found = describe_file(checkpoints.write_sparse(tmp_path / "adapter.safetensors", shapes))
        assert (found.what, found.family) == ("T2I-Adapter", family)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tiny", "checkpoint"),
        ("tiny_control_canny", "ControlNet"),
        ("tiny_lcm_lora", "LoRA"),
        ("tiny_transparent_attn", "LayerDiffuse"),
        ("tiny_transparent_decoder", "LayerDiffuse"),
        ("tiny_transparent_encoder", "LayerDiffuse"),
    ],
)
def test_the_embedded_family(name, what):
    assert describe_file(TINY / f"{name}.safetensors").what == what


def test_taesd(checkpoints, tmp_path):
    shapes = {"1.weight": (64, 4, 3, 3), "1.bias": (64,), "3.conv.0.weight": (64, 64, 3, 3)}
    found = describe_file(checkpoints.write_sparse(tmp_path / "taesd_decoder.safetensors", shapes))
    assert found.what == "TAESD"


def test_what_cannot_be_drawn_with_is_refused_by_name(written):
    with pytest.raises(CheckpointError, match="this is an IP-Adapter"):
        describe_file(
            written("ip.safetensors", {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (4, 4)})
        )


def test_a_folder_of_files(checkpoints, tmp_path):
    """Every file once: diffusers folders whole, neither packages, hidden folders, nor what links lead to."""
    for name in (
        "b.safetensors",
        "loras/a.SAFETENSORS",
        "old/x.ckpt",
        ".git/c.safetensors",
        "m.mlpackage/d.bin",
        "t.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    checkpoints.write_diffusers(tmp_path / "diffusers")
    (tmp_path / "round").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in weights_below(tmp_path)]
    assert found == ["b.safetensors", "diffusers", "loras/a.SAFETENSORS", "old/x.ckpt"]
    shutil.rmtree(tmp_path / "loras")
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(weights_below(tmp_path / "loras"))
