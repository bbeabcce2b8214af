"""Ids equal open_clip's; folders that are damaged are refused."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassine.errors import PackageError, RequestError
from glassine.runtime.tokenizer import BOS, EOS, Tokenizer, byte_symbols, clean

GOLDEN = Path(__file__).parents[1] / "golden" / "clip_tokens.json.gz"


def golden() -> dict[str, list[Any]]:
    return dict(json.loads(gzip.decompress(GOLDEN.read_bytes())))


def test_ids_equal_open_clips_on_2000_nasty_strings(clip: Tokenizer) -> None:
    cases = golden()
    assert len(cases["strings"]) == 2000
    wrong = [text for text, ids in zip(cases["strings"], cases["ids"], strict=True) if clip.encode(text) != ids]
    assert wrong == []


def test_ids_equal_open_clips_where_it_is_installed(clip: Tokenizer) -> None:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed (pip install open_clip_torch); the golden ids were compared instead")
    from open_clip.tokenizer import SimpleTokenizer

    oracle = SimpleTokenizer()
    assert [clip.encode(text) for text in golden()["strings"]] == [oracle.encode(t) for t in golden()["strings"]]


@given(st.text(st.characters(max_codepoint=0x7E), max_size=40))
@settings(max_examples=300, deadline=None)
def test_the_way_past_ftfy_changes_nothing(text: str) -> None:
    import html

    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean(text) == " ".join(repaired.strip().split()).strip().lower()


def test_plain_prompts_do_not_import_ftfy(clip_folder: Path, run_python: Callable[[str], str]) -> None:
    loaded = run_python(
        "import sys; from pathlib import Path; from glassine.runtime.tokenizer import Tokenizer\n"
        f"Tokenizer.load(Path({str(clip_folder)!r})).encode('a photo of a cat,\\n (masterpiece:1.2)')\n"
        "print([name for name in ('ftfy', 'tokenizers', 'torch', 'coremltools') if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_known_ids(clip: Tokenizer) -> None:
    # The ids of the vocabulary's own documentation: "!" 256 at a word's end, "a" 320, "photo" 1125, "cat" 2368.
    assert clip.encode("a photo of a cat!") == [320, 1125, 539, 320, 2368, 256]
    assert (clip.bos, clip.eos, clip.comma) == (49406, 49407, 267)
    assert clip.unknown("a flibbertigibbet") == []


def test_decoding_names_what_was_encoded(clip: Tokenizer) -> None:
    ids = [clip.bos, *clip.encode("Crème brûlée, 猫 & 3"), clip.eos]
    assert clip.decode(ids) == "crème brûlée , 猫 & 3"


@given(st.lists(st.integers(0, 49405), max_size=20))
@settings(max_examples=100, deadline=None)
def test_decoding_takes_any_ids(clip: Tokenizer, ids: list[int]) -> None:
    assert isinstance(clip.decode(ids), str)  # partial UTF-8 becomes U+FFFD instead of an error


def test_one_word_of_10000_letters(clip: Tokenizer) -> None:
    ids = clip.encode("supercalifragilistic" * 500)
    assert clip.decode(ids) == "supercalifragilistic" * 500


SMALL = {"r": 0, "e": 1, "d</w>": 2, "re": 3, "red</w>": 4, "d": 5, BOS: 6, EOS: 7}
SMALL_MERGES = ["#version: 0.2", "r e", "re d</w>"]


def write(folder: Path, vocab: object = SMALL, merges: list[str] = SMALL_MERGES) -> Path:
    (folder / "vocab.json").write_text(vocab if isinstance(vocab, str) else json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    return folder


def test_a_small_vocabulary_names_the_words_it_cannot_spell_and_those_it_knows(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path))
    assert tokenizer.encode("Red  red") == [4, 4]
    with pytest.raises(RequestError, match=r"does not know 'dragon', '\.'; it knows red$"):
        tokenizer.encode("red dragon. dragon")


def test_a_small_vocabulary_names_the_words_it_can_only_spell(tmp_path: Path) -> None:
    symbols = [*byte_symbols(), *(symbol + "</w>" for symbol in byte_symbols()), "re", "red</w>", BOS, EOS]
    vocab = {symbol: id for id, symbol in enumerate(symbols)}
    tokenizer = Tokenizer.load(write(tmp_path, vocab, SMALL_MERGES))
    assert tokenizer.words == ["red"]
    assert tokenizer.unknown("A red, Deer, 猫 ... red deer 12") == ["deer", "猫"]
    assert tokenizer.decode(tokenizer.encode("A red, Deer 猫")) == "a red , deer 猫"


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("{", SMALL_MERGES, "cannot be read"),
        ("[" * 100000, SMALL_MERGES, "cannot be read"),
        ([], SMALL_MERGES, "expected an object of token -> id"),
        ({**SMALL, "x": "9"}, SMALL_MERGES, "expected an object of token -> id"),
        ({**SMALL, "x": True}, SMALL_MERGES, "expected an object of token -> id"),
        ({**SMALL, "x": -1}, SMALL_MERGES, "expected an object of token -> id"),
        ({**SMALL, "x": 2**24}, SMALL_MERGES, "expected an object of token -> id"),
        ({**SMALL, "x": 3}, SMALL_MERGES, "9 tokens share 8 ids"),
        ({"a": 0}, SMALL_MERGES, r"no token <\|startoftext\|> and <\|endoftext\|>"),
        (SMALL, ["#version: 0.2", "r e d"], r"line 2 is 'r e d', expected two symbols"),
        (SMALL, ["#version: 0.2", "e d</w>"], r"line 2 makes 'ed</w>', which vocab.json lacks"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, vocab: object, merges: list[str], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        Tokenizer.load(write(tmp_path, vocab, merges))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"vocab\.json.*convert the model again"):
        Tokenizer.load(tmp_path)


def test_byte_symbols_are_distinct_and_visible() -> None:
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in symbols)
