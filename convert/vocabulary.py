"""The tokenizer's two files, vocab.json and merges.txt: CLIP's own, or those that came with the model."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path

from glassine.convert.checkpoint import Checkpoint
from glassine.errors import ConversionError

CLIP_TOKENS = 49408
VOCABULARY, MERGES = "vocab.json", "merges.txt"
_CLIP_MERGES = 49152 - 256 - 2  # the file has more lines than CLIP uses


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their ids, and its merges in order, from the list OpenAI published.

    Ids: the 256 byte symbols, the same at a word's end, one per merge, start of text, end of text.
    """
    packed = files("glassine.convert").joinpath("clip_vocabulary/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + _CLIP_MERGES]
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_symbols() -> list[str]:
    """GPT-2's printable symbol for each byte, in CLIP's order: printable bytes first, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def tokenizer_files(checkpoint: Checkpoint, rows: int, folder: Path | None = None) -> dict[str, bytes]:
    """Return vocab.json and merges.txt for a token table of `rows` rows.

    They come from `folder` if given, else from the diffusers folder's tokenizer/, else, for a table that is not CLIP's,
    from beside the checkpoint, else from CLIP itself.

    Raises:
        ConversionError: there are none, or they name tokens that the table does not have.
    """
    own = checkpoint.path / "tokenizer"
    beside = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if folder is not None:
        return _read(folder, rows)
    if (own / VOCABULARY).is_file():
        return _read(own, rows)
    if rows != CLIP_TOKENS:
        if not (beside / VOCABULARY).is_file():
            raise ConversionError(
                f"{checkpoint.path}: the text encoder knows {rows} tokens, CLIP has {CLIP_TOKENS}; "
                f"put this model's {VOCABULARY} and {MERGES} into {beside}, or say where they are with --tokenizer"
            )
        return _read(beside, rows)
    vocabulary, merges = clip_vocabulary()
    return {
        VOCABULARY: json.dumps(vocabulary, ensure_ascii=False).encode("utf-8"),
        MERGES: "\n".join(["#version: 0.2", *merges, ""]).encode("utf-8"),
    }


def _read(folder: Path, rows: int) -> dict[str, bytes]:
    try:
        contents = {name: (folder / name).read_bytes() for name in (VOCABULARY, MERGES)}
        vocabulary = json.loads(contents[VOCABULARY])
        contents[MERGES].decode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{folder}: expected {VOCABULARY} and {MERGES}: {error}") from None
    if not isinstance(vocabulary, dict) or not all(
        type(index) is int and 0 <= index < rows for index in vocabulary.values()
    ):
        raise ConversionError(
            f"{folder / VOCABULARY}: expected a map from token to id below {rows}, the rows of the text encoder's table"
        )
    return contents
