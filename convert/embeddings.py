"""Textual inversions: vectors that a word in a prompt stands for, as further rows of the text encoders' token tables.

Gal et al. 2022, arXiv 2208.01618. A file holds n vectors for CLIP-L (768 wide), for OpenCLIP-H (1024), or for both
encoders of SDXL (`clip_l` and `clip_g`, 768 and 1280). In the prompt they take n places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Tensor, open_checkpoint
from glassine.convert.weights import Span, WeightSource
from glassine.errors import CheckpointError, ConversionError

TABLE = "text_model.embeddings.token_embedding.weight"
LONGEST = 75  # tokens of a chunk, which an embedding never straddles
_SDXL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_NO_WORDS = {"emb_params", "*", "clip_l", "clip_g"}  # keys that are no trigger word


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """An embedding and the word that stands for it; None takes the file's name."""

    path: Path
    word: str | None = None

    @classmethod
    def parse(cls, words: str) -> EmbeddingFile:
        """Read `FILE` or `FILE=WORD`."""
        file, equals, word = words.rpartition("=")
        return cls(Path(file), word) if equals and file and "/" not in word else cls(Path(words))


@dataclass(frozen=True, slots=True)
class Inversion:
    """What a file holds: its trigger word, and (n, width) vectors for every text encoder of the model."""

    word: str
    path: Path
    vectors: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many tokens it is."""
        return next(_rows(tensor) for tensor in self.vectors.values())


class Extended:
    """A text encoder whose token table goes on with the vectors of embeddings."""

    def __init__(self, base: WeightSource, added: Sequence[Tensor]) -> None:
        self._base = base
        self._added = added
        rows, width = base.shapes[TABLE]
        self.shapes: Mapping[str, tuple[int, ...]] = {**base.shapes, TABLE: (rows + sum(map(_rows, added)), width)}

    def span(self, name: str) -> Span | None:
        """Where the bytes lie; None for the table, which is in several files."""
        return None if name == TABLE else self._base.span(name)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop)."""
        if name != TABLE:
            return self._base.read(name, start, stop)
        rows, width = self._base.shapes[TABLE]
        pieces = [self._base.read(TABLE, start, min(stop, rows * width))] if start < rows * width else []
        at = rows * width
        for tensor in self._added:
            size = _rows(tensor) * width
            first, last = max(start - at, 0), min(stop - at, size)
            if first < last:
                pieces.append(tensor.read(first, last))
            at += size
        return np.concatenate([piece.astype(np.float32) for piece in pieces])

    def key(self, name: str) -> str:
        """The key in the source."""
        return self._base.key(name)

    def origin(self, name: str) -> str:
        """File and key, of the table also those of the embeddings."""
        if name != TABLE:
            return self._base.origin(name)
        return " with ".join([self._base.origin(name), *(str(tensor.path) for tensor in self._added)])


def read_inversion(
    file: EmbeddingFile, encoders: Mapping[str, WeightSource], *, allow_pickle: bool = False
) -> Inversion:
    """Open an embedding for these text encoders.

    Args:
        file: .safetensors of kohya (`emb_params`), diffusers (one key, the token) or SDXL (`clip_l`, `clip_g`); A1111's
            .pt with `allow_pickle`.
        encoders: by part, "text_encoder" and "text_encoder_2" as far as the model has them.

    Raises:
        CheckpointError: the file cannot be read, or is no embedding.
        ConversionError: it is for other text encoders.
    """
    checkpoint = open_checkpoint(file.path, allow_pickle=allow_pickle)
    tensors = dict(checkpoint.tensors)
    if tensors.keys() == set(_SDXL.values()):
        vectors = {part: tensors[key] for part, key in _SDXL.items()}
        missing = sorted(encoders.keys() - vectors.keys())
        vectors = {part: vectors[part] for part in encoders if part in vectors}
    elif len(tensors) == 1:
        (tensor,) = tensors.values()
        vectors, missing = {next(iter(encoders), ""): tensor}, sorted(encoders)[1:]
    else:
        raise CheckpointError(
            f"{file.path}: no embedding: expected one tensor, or clip_l and clip_g; there are {len(tensors)} keys"
        )
    if missing or not vectors:
        raise ConversionError(f"{file.path}: holds nothing for the model's {', '.join(missing) or 'text encoder'}")
    inversion = Inversion(word_of(file, tensors), file.path, vectors)
    for part, tensor in vectors.items():
        _check(part, tensor, encoders[part].shapes[TABLE][1], inversion.count)
    return inversion


def word_of(file: EmbeddingFile, keys: Mapping[str, Tensor]) -> str:
    """The word asked for, or the file's name; files that diffusers calls learned_embeds name their token inside."""
    if file.word is not None:
        word = file.word
    elif file.path.stem.startswith("learned_embeds") and not keys.keys() & _NO_WORDS:
        word = next(iter(keys))
    else:
        word = file.path.stem
    word = " ".join(word.lower().split())
    if not word:
        raise ConversionError(f"{file.path}: needs a word that stands for it in prompts: FILE=WORD")
    return word


def _rows(tensor: Tensor) -> int:
    return 1 if len(tensor.shape) == 1 else tensor.shape[0]


def _check(part: str, tensor: Tensor, width: int, count: int) -> None:
    if len(tensor.shape) not in {1, 2} or tensor.shape[-1] != width:
        raise ConversionError(
            f'{tensor.path}: tensor "{tensor.key}" has shape {tensor.shape}, expected (n, {width}) for the {part}; '
            "it was made for another family of models"
        )
    if not 1 <= _rows(tensor) <= LONGEST or _rows(tensor) != count:
        raise ConversionError(
            f"{tensor.path}: {_rows(tensor)} vectors, expected 1 to {LONGEST}, as many for each encoder"
        )


def numbered(inversions: Sequence[Inversion], first: int) -> list[tuple[Inversion, int]]:
    """Give every embedding the id of its first token.

    Raises:
        ConversionError: two have the same word.
    """
    words = [inversion.word for inversion in inversions]
    for inversion in inversions:
        if words.count(inversion.word) > 1:
            raise ConversionError(
                f'two embeddings are called "{inversion.word}", one of them {inversion.path}; '
                "give one another word: FILE=WORD"
            )
    starts = [first + sum(earlier.count for earlier in inversions[:i]) for i in range(len(inversions))]
    return list(zip(inversions, starts, strict=True))
