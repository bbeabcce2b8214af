"""CLIP's vocabulary from the published list, and where another one may come from."""

import gzip
import hashlib
import json
from importlib.resources import files

import pytest

from glassine.convert.checkpoint import Checkpoint
from glassine.convert.vocabulary import clip_vocabulary, tokenizer_files
from glassine.errors import ConversionError


def test_the_shipped_list_is_the_published_one():
    packed = files("glassine.convert").joinpath("clip_vocabulary/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert "MIT License" in files("glassine.convert").joinpath("clip_vocabulary/LICENSE").read_text()
    assert gzip.decompress(packed).startswith(b'"bpe_simple_vocab_16e6.txt#version: 0.2')


def test_ids_are_clips():
    vocabulary, merges = clip_vocabulary()
    assert len(vocabulary) == 49408
    assert sorted(vocabulary.values()) == list(range(49408))
    assert len(merges) == 48894
    spots = {"!": 0, "!</w>": 256, "a</w>": 320, "photo</w>": 1125, "cat</w>": 2368, "jekyll</w>": 49405}
    spots |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in spots} == spots


def test_the_files_make_a_clip_tokenizer(tmp_path):
    from transformers import CLIPTokenizer

    for name, content in tokenizer_files(Checkpoint(path=tmp_path / "m.safetensors", tensors={}), 49408).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def own(folder, vocabulary=None):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 9} if vocabulary is None else vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_a_table_that_is_not_clips_needs_its_own_files(tmp_path):
    checkpoint = Checkpoint(path=tmp_path / "m.safetensors", tensors={})
    with pytest.raises(ConversionError, match=r"knows 10 tokens, CLIP has 49408; put .*vocab\.json .*--tokenizer"):
        tokenizer_files(checkpoint, 10)
    own(tmp_path)
    assert json.loads(tokenizer_files(checkpoint, 10)["vocab.json"]) == {"a": 0, "b": 9}
    assert len(json.loads(tokenizer_files(checkpoint, 49408)["vocab.json"])) == 49408  # CLIP's table, CLIP's words


def test_a_diffusers_folder_and_an_explicit_folder_come_first(tmp_path):
    checkpoint = Checkpoint(path=own(tmp_path), tensors={})
    own(tmp_path / "tokenizer", {"folder": 1})
    assert b"folder" in tokenizer_files(checkpoint, 49408)["vocab.json"]
    chosen = own(tmp_path / "chosen", {"chosen": 1})
    assert b"chosen" in tokenizer_files(checkpoint, 49408, chosen)["vocab.json"]


@pytest.mark.parametrize("vocabulary", [{"a": 10}, {"a": -1}, {"a": "1"}, ["a"], {"a": True}])
def test_a_vocabulary_beyond_the_table_is_refused(tmp_path, vocabulary):
    with pytest.raises(ConversionError, match="expected a map from token to id below 10"):
        tokenizer_files(Checkpoint(path=tmp_path, tensors={}), 10, own(tmp_path / "t", vocabulary))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConversionError, match=r"expected vocab\.json and merges\.txt"):
        tokenizer_files(Checkpoint(path=tmp_path, tensors={}), 10, tmp_path)
