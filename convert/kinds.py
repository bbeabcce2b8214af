"""What a file is that people have, read from its header alone, and the command that takes it.

header -> checkpoint | LoRA | textual inversion | control network | LayerDiffuse's | TAESD, and the family it is for

The converters of each kind say exactly what fits and why not; here is only what a person wants to know of a folder of
downloads before that.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glassine.convert.checkpoint import COMPONENTS, Checkpoint, open_checkpoint
from glassine.convert.control_files import control_kind
from glassine.convert.detect import detect
from glassine.convert.embeddings import EmbeddingFile, word_of
from glassine.convert.lora_names import split_key
from glassine.convert.previews import is_preview
from glassine.convert.transparency import is_transparent
from glassine.errors import CheckpointError

# Width of the text that a cross-attention reads: only the families themselves have these.
_BY_CONTEXT = {768: "sd15", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}
_READS_TEXT = re.compile(r"attn2[._]to_[kv][._](weight|lora[._](down|A)(\.default)?\.weight|lora_A\.weight|down)$")
_BY_VECTORS = {(768,): "sd15", (1024,): "sd2", (768, 1280): "sdxl"}
# Channels of the picture that a T2I-Adapter has unshuffled, from one or three.
_BY_CELLS = {64: "sd15", 192: "sd15", 256: "sdxl", 768: "sdxl"}
_METHODS = {  # the tensors of a LoRA and its kin, by what only they have
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "oft_blocks": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "ia3_l": "(IA)3",
    "a1": "GLoRA",
    "diff": "differences",
    "down": "LoRA",
}
_WORDS = 8  # that a LoRA was trained with, the most frequent
_LONGEST = 80  # letters of a text in a header that are worth a look


@dataclass(frozen=True, slots=True)
class Described:
    """A file as people speak of it.

    what: "checkpoint", "LoRA", "textual inversion", "ControlNet", "Control-LoRA", "T2I-Adapter",
    "LayerDiffuse", "TAESD". family: the models it
    is for, None where the header does not tell. facts: what else it tells. use: the command that takes it.
    """

    what: str
    family: str | None
    use: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def describe_file(path: Path) -> Described:
    """Say what a weights file or a diffusers folder is.

    Raises:
        CheckpointError: it cannot be read, or is nothing that Glassine draws with; it says what it is then, if known.
        ConversionError: it is one, with keys or shapes that are none of its kind.
    """
    checkpoint = open_checkpoint(path)
    if is_preview(path):
        return Described("TAESD", None, f"glassine convert CHECKPOINT MODEL --taesd {path.name}")
    if is_transparent(path):
        return Described("LayerDiffuse", _family(checkpoint), f"glassine convert {path.name} --base MODEL")
    if steers := control_kind(checkpoint.tensors):
        return Described(steers, _family(checkpoint), f"glassine convert {path.name} --base MODEL")
    if lora := _lora(checkpoint):
        return lora
    if inversion := _inversion(checkpoint):
        return inversion
    found = detect(checkpoint)
    parts = {part: sum(map(math.prod, weights.shapes.values())) for part, weights in found.parts.items()}
    facts = {
        "prediction_type": found.family.prediction,
        "size": found.family.size,
        "zero_terminal_snr": found.scheduler.zero_terminal_snr,
        "defaults": dict(found.defaults),
        "parameters": parts,
        "decided": dict(found.reasons),
    }
    return Described("checkpoint", found.family.name, f"glassine convert {path.name} {path.stem}", facts)


def _family(checkpoint: Checkpoint) -> str | None:
    """The family of what changes or steers a UNet, by the text that its cross-attention reads."""
    for key, tensor in checkpoint.tensors.items():
        if _READS_TEXT.search(key) and len(tensor.shape) >= 2:
            return _BY_CONTEXT.get(tensor.shape[1])
        if key.endswith("conv_in.weight") and len(tensor.shape) == 4 and tensor.shape[1] in _BY_CELLS:
            return _BY_CELLS[tensor.shape[1]]
    return None


def _lora(checkpoint: Checkpoint) -> Described | None:
    """A LoRA or one of its kin: every key is a module and one of the roles that they know."""
    spelt = {key: split_key(key) for key in checkpoint.tensors}
    modules = {found[0] for found in spelt.values() if found is not None}
    if not modules or None in spelt.values():
        return None
    roles = Counter(found[1] for found in spelt.values() if found is not None)
    text = [module for module in modules if re.match(r"lora_te\d?_|text_encoder", module)]
    ranks = {
        checkpoint.tensors[key].shape[0]
        for key, found in spelt.items()
        if found is not None and found[1] == "down" and checkpoint.tensors[key].shape
    }
    methods = dict.fromkeys(name for role, name in _METHODS.items() if roles[role])
    second = any(re.match(r"lora_te2_|text_encoder_2", module) for module in text)
    facts = {
        "methods": [*methods, *(["DoRA"] if roles["dora"] or roles["magnitude"] else [])],
        "ranks": sorted(ranks),
        "layers": {"unet": len(modules) - len(text), "text": len(text)},
        **_trained(checkpoint.metadata),
    }
    family = _family(checkpoint)
    if family is None and second:
        family = "sdxl"
    return Described("LoRA", family, f"glassine lora MODEL add {checkpoint.path.name}", facts)


def _trained(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What trainers write into the header: title, base, and the words that its pictures were captioned with."""
    said = {
        "title": _plain(metadata.get("modelspec.title", "")),
        "base": _plain(metadata.get("ss_base_model_version", metadata.get("modelspec.architecture", ""))),
        "trigger": _plain(metadata.get("modelspec.trigger_phrase", "")),
        "words": [_plain(word) for word in _captions(metadata.get("ss_tag_frequency", ""))],
    }
    return {name: value for name, value in said.items() if value}


def _plain(text: str) -> str:
    """A stranger's text on one line of a terminal, without what would steer it."""
    line = " ".join(text.split())
    return "".join(letter for letter in line if letter.isprintable())[:_LONGEST]


def _captions(text: str) -> list[str]:
    """The words that were most frequent in the captions; none where a stranger's text is no such table."""
    try:
        tables = json.loads(text)
        counts: Counter[str] = Counter()
        for table in tables.values():
            counts.update({str(word).strip(): int(count) for word, count in table.items()})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return [word for word, _ in counts.most_common(_WORDS)]


def _inversion(checkpoint: Checkpoint) -> Described | None:
    """A textual inversion: one table of vectors, or one for each of SDXL's encoders."""
    tables = checkpoint.tensors
    pair = tables.keys() == {"clip_l", "clip_g"}
    if not (pair or len(tables) == 1) or not all(1 <= len(tensor.shape) <= 2 for tensor in tables.values()):
        return None
    widths = sorted(tensor.shape[-1] for tensor in tables.values())
    rows = {1 if len(tensor.shape) == 1 else tensor.shape[0] for tensor in tables.values()}
    facts = {"word": word_of(EmbeddingFile(checkpoint.path), tables), "vectors": max(rows)}
    use = f"glassine convert CHECKPOINT MODEL --embedding {checkpoint.path.name}"
    return Described("textual inversion", _BY_VECTORS.get(tuple(widths)), use, facts)


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a diffusers model, or one part of it, rather than one with files of all kinds."""
    marks = ("model_index.json", "config.json", *(f"{part}/config.json" for part in COMPONENTS))
    return any((folder / mark).is_file() for mark in marks)


def weights_below(folder: Path) -> Iterator[Path]:
    """Every weights file and diffusers folder in a folder and the folders in it, in order; links are not followed.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    for child in children:
        if child.name.startswith("."):
            continue
        if not child.is_dir():
            if child.suffix.lower() in {".safetensors", ".ckpt", ".pt", ".bin"}:
                yield child
        elif is_diffusers(child):
            yield child
        elif not child.is_symlink() and child.suffix != ".mlpackage":
            yield from weights_below(child)
