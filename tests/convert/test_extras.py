"""What is laid over a checkpoint: another VAE, EMA weights, textual inversions; and pickles, on request."""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.embeddings import TABLE, EmbeddingFile
from glassine.convert.extras import Extras, with_extras
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.index import read_indices
from glassine.errors import CheckpointError, ConversionError, GlassineError
from glassine.manifest import Manifest
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request

RNG = np.random.default_rng(5)


def laid_over(path, extras):
    checkpoint = open_checkpoint(path)
    return with_extras(checkpoint, detect(checkpoint), extras)


def read(source, name):
    shape = source.shapes[name]
    return source.read(name, 0, math.prod(shape)).reshape(shape)


def test_the_vae_of_another_file(checkpoints, tiny_checkpoint, tmp_path):
    other = checkpoints.write_checkpoint(tmp_path / "other.safetensors", seed=9)
    alone = checkpoints.values(checkpoints.ldm_vae(checkpoints.TINY), seed=4)
    bare = checkpoints.write_safetensors(tmp_path / "vae.safetensors", alone, metadata=checkpoints.TINY.header())
    plain, swapped = laid_over(tiny_checkpoint, Extras()), laid_over(tiny_checkpoint, Extras(vae=other))
    theirs = detect(open_checkpoint(other))
    for name in theirs.parts["vae"].shapes:
        np.testing.assert_array_equal(read(swapped.parts["vae"], name), read(theirs.parts["vae"], name))
    np.testing.assert_array_equal(
        read(laid_over(tiny_checkpoint, Extras(vae=bare)).parts["vae"], "post_quant_conv.bias"),
        alone["post_quant_conv.bias"].astype(np.float16),
    )
    assert swapped.parts["unet"].shapes == plain.parts["unet"].shapes
    manifest = convert_checkpoint(tiny_checkpoint, tmp_path / "model", ConvertOptions(
        part="vae", sizes=((64, 64),), attention="einsum", extras=Extras(vae=bare)))  # fmt: skip
    assert manifest.parts["vae_decoder"].source == "vae.safetensors"
    assert manifest.parts["vae_decoder"].source_sha256 == hashlib.sha256(bare.read_bytes()).hexdigest()
    text = checkpoints.values(checkpoints.clip_text(checkpoints.TINY))
    no_vae = checkpoints.write_safetensors(tmp_path / "text.safetensors", text)
    with pytest.raises(CheckpointError, match="there is no VAE in here"):
        laid_over(tiny_checkpoint, Extras(vae=no_vae))


def test_ema(checkpoints, tmp_path):
    tensors = checkpoints.values(checkpoints.ldm_checkpoint(checkpoints.TINY), seed=0)
    average = checkpoints.values(
        {key: shape for key, shape in checkpoints.ldm_checkpoint(checkpoints.TINY).items() if key.startswith("model.")},
        seed=3,
    )
    ema = {"model_ema." + key.removeprefix("model.").replace(".", ""): value for key, value in average.items()}
    path = checkpoints.write_safetensors(
        tmp_path / "both.safetensors", {**tensors, **ema}, metadata=checkpoints.TINY.header()
    )
    chosen = laid_over(path, Extras(ema=True)).parts["unet"]
    usual = laid_over(path, Extras()).parts["unet"]
    canonical = checkpoints.diffusers_names("unet", checkpoints.TINY)
    for key, value in average.items():
        name = canonical[key.removeprefix("model.diffusion_model.")]
        np.testing.assert_array_equal(read(chosen, name).reshape(value.shape), value.astype(np.float16))
        np.testing.assert_array_equal(read(usual, name).reshape(value.shape), tensors[key].astype(np.float16))
    del ema[next(iter(ema))]
    none = {key: value for key, value in tensors.items() if not key.startswith("model_ema.")}
    for there, words in ((ema, r"1 of \d+ EMA weights are not in here.*without --ema"), ({}, "no EMA weights")):
        less = tmp_path / "less.safetensors"
        checkpoints.write_safetensors(less, {**none, **there}, metadata=checkpoints.TINY.header())
        with pytest.raises(CheckpointError, match=words):
            laid_over(less, Extras(ema=True))


@pytest.fixture(scope="module")
def embeddings(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    vectors = RNG.standard_normal((3, 64)).astype(np.float32)
    checkpoints.write_safetensors(folder / "Moon-Stone.safetensors", {"emb_params": vectors}, dtype="F32")
    checkpoints.write_safetensors(folder / "learned_embeds.safetensors", {"<cat-toy>": vectors[0]}, dtype="F32")
    return folder, vectors


def test_an_embedding_is_rows_behind_the_vocabulary(embeddings, tiny_checkpoint, tmp_path):
    folder, vectors = embeddings
    files = (EmbeddingFile(folder / "Moon-Stone.safetensors"), EmbeddingFile(folder / "learned_embeds.safetensors"))
    options = ConvertOptions(part="text_encoder", extras=Extras(embeddings=files))
    convert_checkpoint(tiny_checkpoint, tmp_path / "model", options)
    words = Manifest.read(tmp_path / "model").embeddings
    assert [(e.word, e.first, e.count) for e in words] == [("moon-stone", 49408, 3), ("<cat-toy>", 49411, 1)]
    (index,) = [index for index in read_indices(tmp_path / "model") if index.part == "text_encoder"]
    (place,) = [place for place in index.places if place.name == TABLE]
    blob = (tmp_path / "model/TextEncoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin").read_bytes()
    table = np.frombuffer(blob, place.dtype, math.prod(place.shape), place.offset).reshape(place.shape)
    np.testing.assert_array_equal(table[49408:], np.concatenate([vectors, vectors[:1]]).astype(np.float16))


def test_its_word_in_a_prompt_draws_as_the_word_it_copies(checkpoints, tiny_checkpoint, tmp_path):
    """An embedding that is the rows of two words: the encoder answers the same, the pooled output too."""
    table = read(detect(open_checkpoint(tiny_checkpoint)).parts["text_encoder"], TABLE).astype(np.float32)
    with_two = table[[1125, 2368]]  # photo, cat
    file = checkpoints.write_safetensors(tmp_path / "photocat.safetensors", {"emb_params": with_two}, dtype="F32")
    words = (EmbeddingFile.parse(f"{file}=Photo-Cat"),)
    options = ConvertOptions(part="text_encoder", extras=Extras(embeddings=words))
    convert_checkpoint(tiny_checkpoint, tmp_path / "model", options)
    with Pipeline.load(tmp_path / "model") as pipe:
        found, expected = (
            pipe.encode(text, Request()) for text in ("a (PHOTO-cat:1.2), in the sun", "a (photo cat:1.2), in the sun")
        )
        assert pipe.tokenizer.encode("a photo-cat, photo-cats") == [
            *pipe.tokenizer.encode("a"), 49408, 49409, *pipe.tokenizer.encode(", photo-cats"),
        ]  # fmt: skip
        assert pipe.tokenizer.decode([320, 49408, 49409, 267]) == "a photo-cat ,"
    np.testing.assert_array_equal(found.context, expected.context)
    np.testing.assert_array_equal(found.pooled, expected.pooled)
    assert found.notices == expected.notices == ()


def test_an_embedding_never_straddles_two_chunks():
    from glassine.runtime.conditioning import split_chunks
    from glassine.runtime.prompt import parse_prompt
    from glassine.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.clip()
    tokenizer.add_words({"zork": range(49408, 49413)})
    before = "cat " * 72
    chunks, cut = split_chunks(tokenizer, parse_prompt(f"{before} zork dog"), limit=2)
    assert [len(chunk.ids) for chunk in chunks] == [72, 6]
    assert cut == []
    chunks, cut = split_chunks(tokenizer, parse_prompt(f"{before} zork dog"), limit=1)
    assert (len(chunks[0].ids), cut) == (73, list(range(49408, 49413)))  # the dog still fits


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": (3, 768)}, r"shape \(3, 768\), expected \(n, 64\) for the text_encoder"),
        ({"emb_params": (76, 64)}, "holds 76 vectors|76 vectors, expected 1 to 75"),
        ({"clip_l": (2, 64), "clip_g": (3, 64), "x": (1, 64)}, "no embedding: expected one tensor"),
        ({"clip_g": (2, 64), "emb_params": (2, 64)}, "no embedding: expected one tensor"),
    ],
)
def test_embeddings_that_do_not_fit(tensors, message, checkpoints, tiny_checkpoint, tmp_path):
    path = checkpoints.write_safetensors(
        tmp_path / "e.safetensors", {key: np.zeros(shape, np.float32) for key, shape in tensors.items()}
    )
    with pytest.raises(GlassineError, match=message):
        laid_over(tiny_checkpoint, Extras(embeddings=(EmbeddingFile(path),)))


def test_two_embeddings_of_one_word_are_refused(embeddings, tiny_checkpoint):
    folder, _ = embeddings
    files = (
        EmbeddingFile(folder / "Moon-Stone.safetensors"),
        EmbeddingFile(folder / "learned_embeds.safetensors", "moon-stone"),
    )
    with pytest.raises(ConversionError, match=r'two embeddings are called "moon-stone".*FILE=WORD'):
        laid_over(tiny_checkpoint, Extras(embeddings=files))


def test_sdxl_takes_pairs(checkpoints, tmp_path):
    family = checkpoints.TINY_FAMILIES["sdxl"]
    path = checkpoints.write_checkpoint(tmp_path / "xl.safetensors", family)
    plain = laid_over(path, Extras())
    widths = {part: plain.parts[part].shapes[TABLE][1] for part in ("text_encoder", "text_encoder_2")}
    pair = {"clip_l": rand(2, widths["text_encoder"]), "clip_g": rand(2, widths["text_encoder_2"])}
    file = checkpoints.write_safetensors(tmp_path / "pair.safetensors", pair, dtype="F32")
    detected = laid_over(path, Extras(embeddings=(EmbeddingFile(file),)))
    for part, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        table = read(detected.parts[part], TABLE)
        np.testing.assert_array_equal(table[-2:], pair[key])
        np.testing.assert_array_equal(table[:-2], read(plain.parts[part], TABLE))
    assert [config.added_tokens for config in detected.family.text_encoders] == [2, 2]
    single = checkpoints.write_safetensors(tmp_path / "one.safetensors", {"emb_params": pair["clip_l"]})
    with pytest.raises(ConversionError, match="holds nothing for the model's text_encoder_2"):
        laid_over(path, Extras(embeddings=(EmbeddingFile(single),)))


def rand(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def pickled(checkpoints, tmp_path_factory) -> Path:
    """The tiny checkpoint as torch saves it, and as a diffusers folder of .bin files."""
    folder = tmp_path_factory.mktemp("pickles")
    tensors = checkpoints.values(checkpoints.ldm_checkpoint(checkpoints.TINY))
    state = {key: torch.from_numpy(value).half() for key, value in tensors.items()}
    torch.save({"state_dict": state, "global_step": 7, "epoch": 1}, folder / "tiny.ckpt")
    return folder / "tiny.ckpt"


def test_pickles_are_opened_on_request_only(pickled, tiny_checkpoint):
    with pytest.raises(CheckpointError, match=r"this is a PyTorch pickle in a zip.*--allow-pickle"):
        open_checkpoint(pickled)
    found, expected = open_checkpoint(pickled, allow_pickle=True), open_checkpoint(tiny_checkpoint)
    for key, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected.tensors[key].read(), err_msg=key)
        assert (tensor.dtype, tensor.shape) == (expected.tensors[key].dtype, expected.tensors[key].shape)
        np.testing.assert_array_equal(tensor.read(1, 3), expected.tensors[key].read(1, 3))
    assert len(found.tensors) > 500


def test_a_folder_of_pickles_converts_to_the_same_bytes(tiny_diffusers, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "folder"
    shutil.copytree(tiny_diffusers, folder)
    for path in [*folder.rglob("*.safetensors")]:
        stem = "pytorch_model" if path.parent.name == "text_encoder" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    options = ConvertOptions(part="text_encoder")
    with pytest.raises(CheckpointError, match=r"expected .*\.safetensors, found .*\.bin.*--allow-pickle"):
        convert_checkpoint(folder, tmp_path / "model", options)
    convert_checkpoint(folder, tmp_path / "model", replace(options, extras=Extras(allow_pickle=True)))
    convert_checkpoint(tiny_diffusers, tmp_path / "same", options)
    inside = "TextEncoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert (tmp_path / "model" / inside).read_bytes() == (tmp_path / "same" / inside).read_bytes()


def test_the_pickled_embedding_of_a1111(tiny_checkpoint, tmp_path):
    vectors = torch.from_numpy(rand(2, 64))
    path = tmp_path / "Zork.pt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "zork", "step": 9}, path)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        laid_over(tiny_checkpoint, Extras(embeddings=(EmbeddingFile(path),)))
    detected = laid_over(tiny_checkpoint, Extras(embeddings=(EmbeddingFile(path),), allow_pickle=True))
    np.testing.assert_array_equal(read(detected.parts["text_encoder"], TABLE)[-2:], vectors.numpy())


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (self.trace.write_text, ("was here",))


def test_a_pickle_that_holds_a_program_is_not_run(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": Evil(tmp_path / "trace")}, path)
    with pytest.raises(CheckpointError, match="weights-only loader refuses this file"):
        open_checkpoint(path, allow_pickle=True)
    assert not (tmp_path / "trace").exists()


def test_bombs_and_lies(tmp_path):
    def archive(name: str, compression: int, entries: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", compression) as file:
            for entry, data in entries.items():
                file.writestr(entry, data)
        return tmp_path / name

    bomb = archive("bomb.ckpt", zipfile.ZIP_DEFLATED, {"archive/data.pkl": b"\0" * (64 << 20)})
    with pytest.raises(CheckpointError, match="is compressed"):
        open_checkpoint(bomb, allow_pickle=True)
    stretched = tmp_path / "stretched.ckpt"
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, stretched)  # four bytes that claim 4 TB
    with pytest.raises(CheckpointError, match="claims 4000000000000 bytes"):
        open_checkpoint(stretched, allow_pickle=True)
    legacy = tmp_path / "legacy.ckpt"
    torch.save({"w": torch.zeros(3)}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since PyTorch 1\.6"):
        open_checkpoint(legacy, allow_pickle=True)
    nothing = tmp_path / "nothing.ckpt"
    torch.save([torch.zeros(3)], nothing)
    with pytest.raises(CheckpointError, match="no named tensors"):
        open_checkpoint(nothing, allow_pickle=True)


@pytest.mark.filterwarnings("ignore")  # whatever torch and zipfile say of damaged files
def test_damaged_pickles_are_refused_and_never_worse(tmp_path):
    """300 files with bytes turned over or cut short: an error of ours, or plain tensors."""
    good_path, path = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    torch.save({"state_dict": {f"layer.{i}.weight": torch.randn(4, 4) for i in range(8)}, "epoch": 3}, good_path)
    good, chance, refused = good_path.read_bytes(), random.Random(6), 0
    program = good.index(b"state_dict")
    for _ in range(300):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            near = chance.random() < 0.7  # most damage where it means something
            at = program + chance.randrange(-60, 800) if near else chance.randrange(len(data))
            data[at] = chance.randrange(256)
        path.unlink(missing_ok=True)
        path.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.1 else data)
        try:
            for tensor in open_checkpoint(path, allow_pickle=True).tensors.values():
                assert tensor.read().size == math.prod(tensor.shape) <= 1000
        except GlassineError:
            refused += 1
    assert refused > 150
