"""What a network's program promises to others: Apple's inputs and outputs, each weight once, the hardware's limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from glassine.convert.program import Requests, lower
from glassine.models import attention
from glassine.models.config import SD15
from glassine.models.text_encoder import text_encoder
from glassine.models.unet import unet
from glassine.models.vae import vae_decoder, vae_encoder

UNET, VAE, (TEXT,) = SD15.unet, SD15.vae, SD15.text_encoders
SMALL = replace(UNET, channels=(32, 64), layers=1, down_depths=((1,), (0,)), up_depths=((0, 0), (1, 1)), heads=(2, 4))

# Name -> shape and dtype, as Apple's converter declares them; timestep is fp32 (fp16 holds no fractions above 512), and
# the text encoder also returns every layer.
INTERFACES = {
    "unet": (
        unet,
        UNET,
        {
            "sample": ((2, 4, 64, 64), "float16"),
            "timestep": ((2,), "float32"),
            "encoder_hidden_states": ((2, 768, 1, 77), "float16"),
        },
        {"noise_pred": ((2, 4, 64, 64), "float32")},
    ),
    "sdxl": (
        unet,
        replace(SMALL, time_ids=6, pooled_dim=1280, context_dim=2048),
        {
            "sample": ((2, 4, 64, 64), "float16"),
            "timestep": ((2,), "float32"),
            "encoder_hidden_states": ((2, 2048, 1, 77), "float16"),
            "time_ids": ((2, 6), "float32"),
            "text_embeds": ((2, 1280), "float16"),
        },
        {"noise_pred": ((2, 4, 64, 64), "float32")},
    ),
    "vae_decoder": (
        vae_decoder,
        VAE,
        {"z": ((1, 4, 64, 64), "float16")},
        {"image": ((1, 3, 512, 512), "float32")},
    ),
    "vae_encoder": (
        vae_encoder,
        VAE,
        {"x": ((1, 3, 512, 512), "float16")},
        {"latent": ((1, 8, 64, 64), "float32")},
    ),
    "text_encoder": (
        text_encoder,
        TEXT,
        {"input_ids": ((1, 77), "float32")},
        {
            "last_hidden_state": ((1, 77, 768), "float32"),
            "pooled_outputs": ((1, 768), "float32"),
            "hidden_states": ((12, 77, 768), "float32"),
        },
    ),
}


def operations(program: Any) -> Iterator[Any]:
    return (op for op in program.operations if op.op_type != "const")


# The published sizes of Stable Diffusion 1.5's networks: tensors, parameters.
SIZES = {
    "unet": (686, 859_520_964),
    "vae_decoder": (140, 49_490_199),
    "vae_encoder": (108, 34_163_664),
    "text_encoder": (196, 123_060_480),
}


@pytest.mark.parametrize("name", INTERFACES)
def test_interface_is_apples_and_every_weight_is_asked_for_once(name: str) -> None:
    write, config, inputs, outputs = INTERFACES[name]
    requests = Requests()  # refuses to give a weight twice
    lowered = lower(write(config, requests))
    assert lowered.inputs == inputs
    assert list(lowered.outputs.items()) == list(outputs.items())
    if name in SIZES:
        assert (len(requests.asked), lowered.plan.parameters) == SIZES[name]


@pytest.mark.parametrize(
    ("form", "layout"), [("split", "channels_first"), ("einsum", "channels_last"), ("sdpa", "channels_last")]
)
def test_equal_calls_give_equal_programs(form: Any, layout: Any) -> None:
    sizes = {"height": 16, "width": 8, "attention": form, "layout": layout}
    first, second = (lower(unet(SMALL, Requests(), **sizes)) for _ in range(2))
    assert first.model == second.model


@pytest.mark.parametrize(("write", "config"), [(unet, UNET), (vae_decoder, VAE)])
def test_nothing_exceeds_the_neural_engine_at_1024_pixels(write: Callable[..., Any], config: Any) -> None:
    for op in operations(write(config, Requests(), height=128, width=128, attention="split")):
        for var in op.outputs:
            assert len(var.shape) <= 4, (op.name, var.shape)
            assert max(var.shape, default=1) <= 16384, (op.name, var.shape)


@pytest.mark.parametrize("cells", [(16, 16), (24, 24), (24, 25), (32, 32), (40, 48)])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_split_attention_sees_every_query_in_chunks(layout: Any, cells: tuple[int, int]) -> None:
    height, width = cells
    program = unet(SMALL, Requests(), batch=1, height=height, width=width, attention="split", layout=layout)
    seen: dict[str, int] = {}
    for op in operations(program):
        if op.op_type == "softmax" and "down_blocks_0_attentions_0_transformer_blocks_0_attn1_head0" in op.name:
            shape = op.outputs[0].shape
            keys, queries = (shape[1], shape[3]) if layout == "channels_first" else (shape[2], shape[1])
            assert keys == height * width
            assert queries <= attention.QUERY_CHUNK
            seen[op.name] = queries
    assert sum(seen.values()) == height * width


def test_operations_are_named_after_their_place() -> None:
    names = {op.name for op in operations(unet(SMALL, Requests(), height=16, width=8, attention="split"))}
    assert {
        "conv_in",
        "down_blocks_0_resnets_0_conv1",
        "mid_block_attentions_0_transformer_blocks_0_attn2_to_q",
    } <= names


def test_half_precision_starts_behind_the_sinusoid() -> None:
    """Whatever turns t and time_ids into waves is fp32."""
    config = replace(SMALL, time_ids=6, pooled_dim=24)
    kinds = {
        op.op_type: op.outputs[0].dtype
        for op in operations(unet(config, Requests(), height=8, width=8))
        if op.op_type in {"sin", "cos"} or (op.op_type == "mul" and "angles" in op.name)
    }
    assert kinds == {"sin": "float32", "cos": "float32", "mul": "float32"}
