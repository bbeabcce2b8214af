"""What is laid over a checkpoint's networks before they are converted: EMA, another VAE, LoRAs, textual inversions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from glassine.convert.checkpoint import Checkpoint, open_checkpoint, shorten
from glassine.convert.detect import Detected, detect
from glassine.convert.embeddings import TABLE, EmbeddingFile, Extended, numbered, read_inversion
from glassine.convert.lora import LoraFile, with_loras
from glassine.convert.names import Source
from glassine.convert.weights import FileWeights
from glassine.errors import CheckpointError, ConversionError
from glassine.manifest import Embedding, MergedLora


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What to lay over a checkpoint.

    loras: merged in this order. vae: a file or folder whose VAE takes the place of the checkpoint's. ema: take the
    UNet's running average, which training keeps beside the weights themselves. embeddings: words that the text
    encoders learn. allow_pickle: all files may be PyTorch pickles, the checkpoint itself too.
    """

    loras: tuple[LoraFile, ...] = ()
    vae: Path | None = None
    ema: bool = False
    embeddings: tuple[EmbeddingFile, ...] = ()
    allow_pickle: bool = False


def with_extras(checkpoint: Checkpoint, detected: Detected, extras: Extras) -> Detected:
    """Return what was detected, with `extras` laid over it.

    Raises:
        CheckpointError: a file cannot be read, or there is no EMA in the checkpoint.
        ConversionError: a LoRA, VAE or embedding is not for this model.
    """
    if extras.ema:
        detected = _averaged(checkpoint, detected)
    if extras.vae is not None:
        detected = _with_vae(detected, extras.vae, extras.allow_pickle)
    if extras.loras:
        parts = with_loras(detected.parts, extras.loras, allow_pickle=extras.allow_pickle)
        detected = replace(detected, parts=parts)
    if extras.embeddings:
        detected = _with_embeddings(checkpoint, detected, extras)
    return detected


def _averaged(checkpoint: Checkpoint, detected: Detected) -> Detected:
    """LDM keeps the average of `model.X.Y` as `model_ema.XY`: all dots dropped, and "model." too."""
    unet = detected.parts.get("unet")
    if unet is None:
        raise CheckpointError(f"{checkpoint.path}: --ema chooses between two UNets, and there is none in here")
    table = {name: "model_ema." + unet.key(name).removeprefix("model.").replace(".", "") for name in unet.shapes}
    missing = sorted(key for key in table.values() if key not in checkpoint.tensors)
    if len(missing) == len(table):
        raise CheckpointError(f"{checkpoint.path}: holds no EMA weights, as most files; convert it without --ema")
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} of {len(table)} EMA weights are not in here: {shorten(missing)}; "
            "the file is incomplete: convert it without --ema"
        )
    average = FileWeights(checkpoint, {name: Source(key) for name, key in table.items()})
    wrong = [name for name, shape in unet.shapes.items() if average.shapes[name] != shape]
    if wrong:
        raise ConversionError(f"{checkpoint.path}: the EMA of {shorten(wrong)} has another shape than the weight")
    return replace(
        detected, parts={**detected.parts, "unet": average}, reasons={**detected.reasons, "unet weights": "EMA"}
    )


def _with_vae(detected: Detected, path: Path, allow_pickle: bool) -> Detected:
    """The VAE of another file. Its latent scale is the UNet's business: all VAEs of a family share it."""
    other_file = open_checkpoint(path, allow_pickle=allow_pickle)
    other = detect(other_file)
    if "vae" not in other.parts:
        raise CheckpointError(f"{path}: there is no VAE in here, only {', '.join(other.parts)}")
    channels = other.family.vae.latent_channels, detected.family.vae.latent_channels
    if channels[0] != channels[1]:
        raise ConversionError(f"{path}: this VAE has {channels[0]} latent channels, the model {channels[1]}")
    return replace(
        detected,
        family=replace(detected.family, vae=other.family.vae),
        parts={**detected.parts, "vae": other.parts["vae"]},
        reasons={**detected.reasons, "vae": f"{path.name}, asked for"},
        sources={**detected.sources, "vae": other_file},
    )


def _with_embeddings(checkpoint: Checkpoint, detected: Detected, extras: Extras) -> Detected:
    """The text encoders with further rows, and the words for them."""
    family = detected.family
    encoders = {role: detected.parts[role] for role in family.text_roles if role in detected.parts}  # type: ignore[index]
    if not encoders:
        raise CheckpointError(f"{checkpoint.path}: an embedding goes into a text encoder, and there is none in here")
    found = [read_inversion(file, encoders, allow_pickle=extras.allow_pickle) for file in extras.embeddings]
    sizes = {source.shapes[TABLE][0] for source in encoders.values()}
    if len(sizes) != 1:
        raise ConversionError(f"{checkpoint.path}: its text encoders know {sorted(sizes)} tokens, not the same ones")
    (first,) = sizes
    count = sum(inversion.count for inversion in found)
    configs = tuple(
        replace(config, vocab_size=config.vocab_size + count, added_tokens=count) for config in family.text_encoders
    )
    extended = {
        role: Extended(source, [inversion.vectors[role] for inversion in found]) for role, source in encoders.items()
    }
    embeddings = tuple(
        Embedding(word=inversion.word, first=start, count=inversion.count, sha256=file_sha256(inversion.path))
        for inversion, start in numbered(found, first)
    )
    return replace(
        detected,
        family=replace(family, text_encoders=configs),
        parts={**detected.parts, **extended},  # type: ignore[dict-item]
        embeddings=embeddings,
    )


def merged(loras: tuple[LoraFile, ...]) -> tuple[MergedLora, ...]:
    """Describe LoRAs for glassine.json."""
    return tuple(
        MergedLora(name=file.path.stem, sha256=file_sha256(file.path), unet=file.unet, text=file.text) for file in loras
    )


def file_sha256(path: Path) -> str:
    """The sha256 of one file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
