"""TAESD -> the part `preview_decoder`: what a picture looks like so far, after every step."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from glassine.convert.checkpoint import Checkpoint, open_checkpoint, shorten
from glassine.convert.names import Source
from glassine.convert.network import Base, Network, Size
from glassine.convert.program import Requests
from glassine.convert.weights import FileWeights, WeightSource
from glassine.errors import CheckpointError, ConversionError
from glassine.models.config import TinyDecoderConfig
from glassine.models.mil import Program

ROLE = "preview_decoder"
_SUMMARY = "TAESD's decoder: a latent becomes a picture quickly and roughly, for previews."


def preview_networks(path: Path, base: Base, *, allow_pickle: bool = False) -> list[Network]:
    """List TAESD's decoder as a network for the model `base`.

    Args:
        path: taesd_decoder or taesdxl_decoder, in TAESD's own names or those of diffusers' AutoencoderTiny.

    Raises:
        CheckpointError: the file cannot be read, or is no TAESD decoder.
        ConversionError: it decodes latents of another kind.
    """
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    config, weights = _read(checkpoint)
    if config.latent_channels != base.family.vae.latent_channels:
        raise ConversionError(
            f"{path}: decodes latents of {config.latent_channels} channels, the model's have "
            f"{base.family.vae.latent_channels}"
        )
    return [
        Network(
            key=ROLE,
            role=ROLE,
            package="PreviewDecoder",
            weights=weights,
            source=checkpoint,
            files=tuple(checkpoint.files),
            write=partial(_write, config),
            config=config,
            summary=_SUMMARY,
        )
    ]


def is_preview(path: Path) -> bool:
    """Whether a file is a TAESD decoder, by its keys.

    Raises:
        CheckpointError: it cannot be read.
    """
    return path.is_file() and len(_first(_weights(open_checkpoint(path)))) == 4


def read_preview(path: Path) -> tuple[TinyDecoderConfig, WeightSource]:
    """Read the header of a TAESD decoder; errors as `preview_networks`."""
    return _read(open_checkpoint(path))


def _read(checkpoint: Checkpoint) -> tuple[TinyDecoderConfig, WeightSource]:
    weights = _weights(checkpoint)
    first = _first(weights)
    if len(first) != 4:
        keys = shorten(sorted(checkpoint.tensors), 3)
        raise CheckpointError(
            f"{checkpoint.path}: no TAESD decoder: expected keys such as 1.weight or decoder.layers.0.weight, "
            f"got {keys}"
        )
    return TinyDecoderConfig(channels=first[0], latent_channels=first[1]), weights


def _first(weights: WeightSource) -> tuple[int, ...]:
    """The shape of the first convolution; () where there is none."""
    return weights.shapes.get("decoder.layers.0.weight", ())


def _weights(checkpoint: Checkpoint) -> WeightSource:
    return FileWeights(checkpoint, _names(checkpoint))


def _names(checkpoint: Checkpoint) -> dict[str, Source]:
    """Canonical are diffusers' names; TAESD's own count one more layer, its clamp."""
    names = {}
    for key in checkpoint.tensors:
        tail = re.sub(r"^(vae/|taesd_decoder\.)", "", key)
        if match := re.fullmatch(r"(\d{1,3})(\.(?:conv\.\d\.)?(?:weight|bias))", tail):
            tail = f"decoder.layers.{int(match[1]) - 1}{match[2]}"
        if not tail.startswith("encoder."):
            names[tail] = Source(key)
    return names


def _write(config: TinyDecoderConfig, weights: Requests, size: Size) -> Program:
    from glassine.models.taesd import taesd_decoder

    return taesd_decoder(config, weights, height=size[1] // 8, width=size[0] // 8)
