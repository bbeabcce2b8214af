"""Every network as coremltools would write it: the same types by its builder, the same message by its exporter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from glassine.convert.program import Requests, lower
from glassine.errors import ConversionError
from glassine.models import mil as mb
from glassine.models.adapter import adapter
from glassine.models.config import (
    AdapterConfig,
    ControlNetConfig,
    FrameControlConfig,
    TextEncoderConfig,
    TinyDecoderConfig,
    TransparentDecoderConfig,
    TransparentEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from glassine.models.controlnet import controlnet, union_hint
from glassine.models.layers import build, newest_opset
from glassine.models.mil import Program
from glassine.models.sharing import attention_units
from glassine.models.taesd import taesd_decoder
from glassine.models.text_encoder import text_encoder
from glassine.models.transparency import frame_control, transparent_decoder, transparent_encoder
from glassine.models.unet import unet
from glassine.models.vae import vae_decoder, vae_encoder

SD = UNetConfig(
    channels=(32, 64),
    layers=1,
    down_depths=((1,), (0,)),
    up_depths=((0, 0), (1, 1)),
    heads=(2, 2),
    context_dim=24,
    norm_groups=8,
)
XL = replace(
    SD,
    down_depths=((0,), (2,)),
    mid_depth=2,
    up_depths=((2, 2), (0, 0)),
    heads=(2, 4),
    linear_projection=True,
    time_ids=6,
    pooled_dim=20,
)
VAE = VAEConfig(channels=(32, 64), layers=1, norm_groups=8)
TEXT = TextEncoderConfig(vocab_size=99, width=48, layers=2, heads=3, intermediate=96)
FORMS = list(itertools.product(("split", "einsum", "sdpa"), ("channels_first", "channels_last")))

Write = Callable[..., Program]
small = partial(unet, height=6, width=5, tokens=9)
# What has a form of attention, and what has none.
IN_FORMS: dict[str, Write] = {
    "unet": partial(small, SD),
    "unet in chunks of queries": partial(unet, SD, height=24, width=25, tokens=9, batch=1),
    "unet of sdxl": partial(small, XL),
    "inpainting": partial(small, replace(SD, in_channels=9)),
    "lcm": partial(small, replace(SD, timestep_cond_dim=16)),
    "controlled": partial(small, replace(SD, residuals=True)),
    "adapted": partial(small, replace(XL, residuals=True, features=2)),
    "collage": partial(small, replace(SD, collage=2)),
    "conditioned": partial(small, replace(XL, in_channels=8, condition_channels=4)),
    "frames": partial(small, replace(SD, frames=3, frame_control=True), batch=6),
    "one frame": partial(small, replace(SD, frames=1), batch=2),
    "controlnet": partial(controlnet, ControlNetConfig(unet=SD, hint_widths=(16, 32)), height=6, width=4, tokens=9),
    "pooled": partial(
        controlnet, ControlNetConfig(unet=SD, hint_widths=(16, 32), pooled=True), height=6, width=4, tokens=9
    ),
    "union": partial(
        controlnet, ControlNetConfig(unet=XL, hint_widths=(16, 32), control_types=6), height=6, width=4, tokens=9
    ),
    "vae_decoder": partial(vae_decoder, VAE, height=6, width=5),
    "vae_encoder": partial(vae_encoder, VAE, height=12, width=10),
    "vae_decoder in fp32": partial(vae_decoder, VAE, height=6, width=5, dtype=np.float32),
    "transparent_decoder": partial(transparent_decoder, TransparentDecoderConfig(), height=64, width=64),
}
OTHERS: dict[str, Write] = {
    "text_encoder": partial(text_encoder, TEXT),
    "of sdxl": partial(text_encoder, replace(TEXT, activation="gelu", final_norm=False, skip=1, projection_dim=24)),
    "with added tokens": partial(text_encoder, replace(TEXT, added_tokens=2)),
    "adapter": partial(adapter, AdapterConfig(channels=(32, 64), halved=(False, True)), height=6, width=5),
    "light adapter": partial(
        adapter, AdapterConfig(channels=(32, 64), layers=3, halved=(False, True), light=True), height=6, width=5
    ),
    "transparent_encoder": partial(transparent_encoder, TransparentEncoderConfig(), height=64, width=64),
    "frame_control": partial(
        frame_control, FrameControlConfig(frames=2, units=tuple(attention_units(SD))), height=128, width=64
    ),
    "taesd_decoder": partial(taesd_decoder, TinyDecoderConfig(channels=16), height=4, width=3),
    "union_hint": partial(
        union_hint, ControlNetConfig(unet=XL, hint_widths=(16, 32), control_types=6), height=6, width=4
    ),
}


def assert_as_coremltools(oracle: Any, write: Callable[[], Program]) -> None:
    lowered = lower(write())
    theirs, plan = oracle.exported(write())
    assert lowered.plan == plan
    assert oracle.read(lowered.model) == theirs
    assert lowered.model == theirs.SerializeToString(deterministic=True)


# By default one form each, in turn.
CASES = [
    pytest.param(name, *form, marks=() if i % len(FORMS) == j else pytest.mark.slow)
    for i, name in enumerate(IN_FORMS)
    for j, form in enumerate(FORMS)
    if not (form[0] == "sdpa" and name == "vae_decoder in fp32")
]


@pytest.mark.parametrize(("name", "attention", "layout"), CASES)
def test_networks(oracle: Any, name: str, attention: Any, layout: Any) -> None:
    assert_as_coremltools(oracle, lambda: IN_FORMS[name](Requests(), attention=attention, layout=layout))


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_one_form(oracle: Any, name: str, newest: bool) -> None:
    with newest_opset(newest):
        assert_as_coremltools(oracle, lambda: OTHERS[name](Requests()))


def test_every_operation_is_in_one_of_them() -> None:
    """What this language has beyond the networks is not held against coremltools, so it has nothing beyond."""
    written = {op.op_type for write in (*IN_FORMS.values(), *OTHERS.values()) for op in write(Requests()).operations}
    written |= {op.op_type for op in small(SD, Requests(), attention="sdpa").operations}
    written |= {op.op_type for op in small(SD, Requests(), attention="einsum", layout="channels_last").operations}
    known = {name for name, value in vars(mb).items() if getattr(value, "is_operation", False)}
    assert written == known | {"const"}


A, B = ((1, 4, 3), np.float16), ((1, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda a, b: mb.add(x=a, y=b), "add of two dtypes"),
        (lambda a, b: mb.sub(x=a, y=np.zeros((2, 4, 2), np.float16)), "shapes that do not fit each other"),
        (lambda a, b: mb.matmul(x=a, y=a), "matmul of what do not fit"),
        (lambda a, b: mb.linear(x=a, weight=np.zeros((5, 4), np.float16), bias=np.zeros(5, np.float16)), "linear of"),
        (lambda a, b: mb.concat(values=(a, b), axis=1), "concat of what do not fit"),
        (
            lambda a, b: mb.reshape(x=a, shape=(4, 4)),
            r"reshape to \(4, 4\), which has not as many elements: a: float16",
        ),
        (lambda a, b: mb.reshape(x=a, shape=(1, 1, 1, 1, 4, 3), name="many"), "reshape many: a result of more than 5"),
        (lambda a, b: mb.split(x=a, split_sizes=[1, 2], axis=1), r"split into \[1, 2\]"),
        (lambda a, b: mb.squeeze(x=a, axes=[1]), "not all of size 1"),
        (lambda a, b: mb.einsum(values=(a, a), equation="abc,acd->abd"), "einsum abc,acd->abd of what do not fit"),
    ],
)
def test_what_makes_no_sense_is_refused(body: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"a": A, "b": B}, lambda a, b: {"out": body(a, b)})


def test_an_argument_that_an_operation_has_not_is_refused() -> None:
    for body in (lambda a: mb.silu(x=a, alpha=1.0), lambda a: mb.softmax(x=a, axes=[1]), lambda a: mb.relu()):
        with pytest.raises(TypeError):
            build({"a": A}, lambda a, body=body: {"out": body(a)})


@pytest.mark.parametrize("name", ["1st", "list", "a.b"])
def test_a_name_that_core_ml_does_not_take_is_refused(name: str) -> None:
    program = build({"a": A}, lambda a: {"out": mb.relu(x=a, name=name)})
    with pytest.raises(ConversionError, match=f"names of the graph that Core ML does not take: {name}"):
        lower(program)


def test_names_that_are_taken_get_a_number(oracle: Any) -> None:
    """Inputs and outputs keep theirs; all others give way, also in front of them."""

    def body(a: Any) -> dict[str, Any]:
        x = mb.relu(x=mb.relu(x=mb.relu(x=a, name="a"), name="out"), name="out_1")
        return {"out": mb.add(x=x, y=np.float16(1), name="out")}

    assert_as_coremltools(oracle, lambda: build({"a": A}, body))
