"""A description that is no network is refused where it is made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glassine.errors import ConversionError
from glassine.models.config import TextEncoderConfig, UNetConfig, VAEConfig, restored
from glassine.models.vae import vae_encoder


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (UNetConfig, {"heads": (8, 8)}, r"heads is \(8, 8\), channels is"),
        (UNetConfig, {"heads": (8, 8, 7, 8)}, "heads is 7, which does not divide a level's 1280 channels"),
        (UNetConfig, {"heads": (8, 8, 8, 7)}, "heads is 7"),  # of the mid block
        (UNetConfig, {"norm_groups": 0}, "norm_groups is 0"),
        (UNetConfig, {"time_ids": 6}, "pooled_dim None; SDXL has both"),
        (VAEConfig, {"norm_groups": 48}, "norm_groups is 48, which does not divide a level's 128"),
        (TextEncoderConfig, {"heads": 5}, "heads is 5"),
        (TextEncoderConfig, {"skip": 12}, "cannot skip 12 of 12 layers"),
    ],
)
def test_refuses_what_is_no_network(make: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        make(**fields)


def test_heads_of_a_level_without_attention_do_not_matter() -> None:
    UNetConfig(mid_depth=0, heads=(8, 8, 8, 7))


def test_vae_encoder_refuses_parts_of_a_cell() -> None:
    def weights(name: str, shape: tuple[int, ...], **_: Any) -> np.ndarray:
        raise AssertionError("the size is checked before anything is written")

    with pytest.raises(ConversionError, match="508x512 pixels; expected multiples of 8"):
        vae_encoder(VAEConfig(), weights, height=512, width=508)


@pytest.mark.parametrize("config", [UNetConfig(heads=(5, 10, 20, 20)), VAEConfig(), TextEncoderConfig(skip=1)])
def test_a_description_survives_json(config: UNetConfig | VAEConfig | TextEncoderConfig) -> None:
    assert restored(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_description_with_unknown_fields_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"UNetConfig.*layers_deep"):
        restored(UNetConfig, {"layers_deep": 3})
