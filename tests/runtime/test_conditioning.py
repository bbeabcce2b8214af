"""Chunks, weights and clip skip, against transformers' CLIP and computations of the tests' own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from glassine.errors import EngineError, RequestError
from glassine.runtime.conditioning import EncodedPrompt, chunk_ids, encode_prompt, split_chunks
from glassine.runtime.prompt import Span, parse_prompt
from glassine.runtime.tokenizer import BOS, EOS, Tokenizer, byte_symbols

Array = np.ndarray[Any, Any]
WIDTH, LAYERS = 32, 3


@pytest.fixture(scope="module")
def text_model() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    model = CLIPTextModel(config).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    torch.nn.init.normal_(final_norm(model).bias, mean=0.3)  # as trained, so that the mean of a chunk is not 0
    return model


def final_norm(model: CLIPTextModel) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))


def hidden(model: CLIPTextModel, ids: Any) -> tuple[list[Array], Array]:
    """Every layer behind the final LayerNorm, and the pooled output."""
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(ids)).long(), output_hidden_states=True)
        return [final_norm(model)(state).numpy() for state in out.hidden_states[1:]], out.pooler_output.numpy()


@pytest.fixture(scope="module")
def predict(text_model: CLIPTextModel) -> Callable[..., dict[str, Array]]:
    """A text encoder that reuses its output buffers, as an engine may."""
    buffers = {
        "last_hidden_state": np.empty((1, 77, WIDTH), np.float32),
        "pooled_outputs": np.empty((1, WIDTH), np.float32),
        "hidden_states": np.empty((LAYERS, 77, WIDTH), np.float32),
    }

    def run(*, input_ids: Array) -> dict[str, Array]:
        assert input_ids.shape == (1, 77)
        assert input_ids.dtype == np.float32
        layers, pooled = hidden(text_model, input_ids)
        buffers["hidden_states"][:] = np.concatenate(layers)
        buffers["last_hidden_state"][:] = layers[-1]
        buffers["pooled_outputs"][:] = pooled
        return buffers

    return run


def framed(ids: list[int]) -> list[int]:
    return [49406, *ids] + [49407] * (76 - len(ids))


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_a_short_prompt_is_clips_own_answer(
    clip: Tokenizer, predict: Any, text_model: CLIPTextModel, clip_skip: int
) -> None:
    found = encode_prompt(predict, clip, "a photo of a cat", clip_skip=clip_skip)
    layers, pooled = hidden(text_model, [framed([320, 1125, 539, 320, 2368])])
    assert np.array_equal(found.context, layers[-clip_skip])
    assert found.pooled is not None
    assert np.array_equal(found.pooled, pooled)
    assert found.context.dtype == np.float32
    assert found.notices == ()


@pytest.mark.parametrize("emphasis", ["original", "no_norm"])
def test_weights_multiply_tokens_and_the_mean_is_restored(
    clip: Tokenizer, predict: Any, text_model: CLIPTextModel, emphasis: Any
) -> None:
    found = encode_prompt(predict, clip, "a (red:1.5) [fluffy] cat", emphasis=emphasis).context
    red, fluffy = clip.encode("red"), clip.encode("fluffy")
    ids = [*clip.encode("a"), *red, *fluffy, *clip.encode("cat")]
    z = hidden(text_model, [framed(ids)])[0][-1].astype(np.float64)
    expected = z.copy()
    expected[0, 2 : 2 + len(red)] *= 1.5
    expected[0, 2 + len(red) : 2 + len(red) + len(fluffy)] /= 1.1
    if emphasis == "original":
        expected *= z.mean() / expected.mean()
    np.testing.assert_allclose(found, expected, rtol=5e-7, atol=0)  # measured 1.5e-7


def test_long_prompts_are_chunks_encoded_one_by_one(clip: Tokenizer, predict: Any, text_model: CLIPTextModel) -> None:
    words = [f"word{i}" for i in range(40)]
    ids = clip.encode(" ".join(words))
    assert 75 < len(ids) <= 150
    found = encode_prompt(predict, clip, " ".join(words), tokens=154)
    expected = [hidden(text_model, [framed(part)])[0][-1] for part in (ids[:75], ids[75:])]
    assert np.array_equal(found.context, np.concatenate(expected, axis=1))
    assert np.array_equal(found.pooled, hidden(text_model, [framed(ids[:75])])[1])


def test_each_chunk_restores_its_own_mean(clip: Tokenizer, predict: Any) -> None:
    both = encode_prompt(predict, clip, "(red:2) BREAK (blue:0.5)", tokens=154).context
    red, blue = (encode_prompt(predict, clip, text).context for text in ("(red:2)", "(blue:0.5)"))
    assert np.array_equal(both, np.concatenate([red, blue], axis=1))


def attention(query: Array, context: Array) -> Array:
    scores = query @ context.T
    share = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(share / share.sum(axis=1, keepdims=True) @ context)


def test_a_short_prompt_draws_the_same_in_a_longer_context(clip: Tokenizer, predict: Any) -> None:
    short = encode_prompt(predict, clip, "a (red:1.2) cat").context[0].astype(np.float64)
    long = encode_prompt(predict, clip, "a (red:1.2) cat", tokens=231).context[0].astype(np.float64)
    query = np.random.default_rng(0).standard_normal((5, WIDTH))
    assert long.shape == (231, WIDTH)
    np.testing.assert_allclose(attention(query, long), attention(query, short), rtol=1e-12)  # measured 1e-15


def test_what_does_not_come_out_even_is_padded_with_the_empty_prompt(clip: Tokenizer, predict: Any) -> None:
    found = encode_prompt(predict, clip, "red BREAK blue", tokens=231).context
    parts = [encode_prompt(predict, clip, text).context for text in ("red", "blue", "")]
    assert np.array_equal(found, np.concatenate(parts, axis=1))


def test_the_same_chunk_is_encoded_once(clip: Tokenizer, predict: Any) -> None:
    calls = []

    def counting(*, input_ids: Array) -> Any:
        calls.append(input_ids)
        return predict(input_ids=input_ids)

    encode_prompt(counting, clip, "red BREAK red BREAK (red:1.2)", tokens=231)
    assert len(calls) == 1


def test_what_does_not_fit_is_named(clip: Tokenizer, predict: Any) -> None:
    text = " ".join(["cat"] * 75 + ["Dragon,", "in", "a", "castle"])
    found = encode_prompt(predict, clip, text)
    assert np.array_equal(found.context, encode_prompt(predict, clip, " ".join(["cat"] * 75)).context)
    assert found.notices == ("cut: the model reads 77 tokens, 5 of the prompt's did not fit: dragon , in a castle",)


def test_a_break_without_a_next_chunk_is_passed_over_and_said(clip: Tokenizer, predict: Any) -> None:
    found = encode_prompt(predict, clip, "red BREAK cat")
    assert np.array_equal(found.context, encode_prompt(predict, clip, "red cat").context)
    assert found.notices == ("BREAK is passed over: the model reads 77 tokens, and there is no next chunk of 75",)


def test_a_prompt_of_10000_characters(clip: Tokenizer, predict: Any) -> None:
    text = ("(masterpiece:1.1), best quality, " * 400)[:10000]
    found = encode_prompt(predict, clip, text, tokens=231)
    assert found.context.shape == (1, 231, WIDTH)
    (notice,) = found.notices
    assert re.match(r"cut: the model reads 231 tokens, \d{4} of the prompt's did not fit: .* \.\.\. .*", notice)
    assert len(notice) < 400


def test_syntax_that_is_not_followed_is_said(clip: Tokenizer, predict: Any) -> None:
    found = encode_prompt(predict, clip, "<lora:film:1>a cat AND a dog")
    assert [notice.split(" is ")[0] for notice in found.notices] == ["<lora:film:1>", "AND"]
    assert np.array_equal(found.context, encode_prompt(predict, clip, "a cat and a dog").context)


def test_words_a_small_model_was_not_taught_are_said(predict: Any) -> None:
    symbols = [*byte_symbols(), *(symbol + "</w>" for symbol in byte_symbols()), "re", "red</w>", BOS, EOS]
    tokenizer = Tokenizer({symbol: id for id, symbol in enumerate(symbols)}, [("r", "e"), ("re", "d</w>")])
    assert encode_prompt(predict, tokenizer, "a (red:1.2) BREAK red").notices[1:] == ()
    (notice,) = encode_prompt(predict, tokenizer, "(dragon:1.2) a red [dragon]").notices
    assert notice == "this small model was not taught 'dragon'; it knows, among others: red"


def test_sd2_pads_with_zero_behind_the_end(clip: Tokenizer) -> None:
    (chunk,), _ = split_chunks(clip, parse_prompt("a cat"), limit=1)
    assert chunk_ids(clip, chunk, 0) == (49406, 320, 2368, 49407) + (0,) * 73
    assert chunk_ids(clip, chunk) == (49406, 320, 2368) + (49407,) * 74


class Letters:
    """A tokenizer whose tokens are letters; the comma is ','."""

    bos, eos, comma = 1, 2, ord(",")

    def together(self, ids: list[int]) -> list[list[int]]:
        return [[id] for id in ids]

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def boundaries_by_definition(text: str) -> list[str]:
    """Where unlimited chunks of 75 break: behind the last comma among the last 20 letters, unless a comma follows."""
    chunks = []
    while len(text) > 75:
        comma = text.rfind(",", 55, 75)
        end = 75 if text[75] == "," or comma < 0 else comma + 1
        chunks.append(text[:end])
        text = text[end:]
    return [*chunks, text]


@given(st.lists(st.tuples(st.text("a", max_size=90), st.sampled_from(["", ",", ",,"])), max_size=6))
@settings(max_examples=300, deadline=None)
def test_chunks_break_behind_commas(parts: list[tuple[str, str]]) -> None:
    text = "".join(letters + commas for letters, commas in parts)
    tokenizer: Any = Letters()
    chunks, cut = split_chunks(tokenizer, [Span(text)] if text else [], limit=100)
    assert ["".join(map(chr, chunk.ids)) for chunk in chunks] == boundaries_by_definition(text)
    assert all(len(chunk.weights) == len(chunk.ids) for chunk in chunks)
    assert cut == []


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a" * 55 + "," + "a" * 60, 56),  # the last comma is 20 tokens from the end: the words behind it move
        ("a" * 54 + "," + "a" * 60, 75),  # 21
        ("a" * 60 + "," + "a" * 14 + ",aa", 75),  # full, and the comma that follows opens the next chunk
        ("a" * 60 + "," + "a" * 14 + "aaa", 61),
        ("a" * 74 + ",aa", 75),
        ("," + "a" * 80, 75),
    ],
)
def test_how_far_back_a_comma_breaks(text: str, first: int) -> None:
    tokenizer: Any = Letters()
    chunks, _ = split_chunks(tokenizer, [Span(text)], limit=9)
    assert [len(chunk.ids) for chunk in chunks] == [first, len(text) - first]


@given(st.text("a,", max_size=400), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_between_chunks_and_what_is_cut(text: str, limit: int) -> None:
    tokenizer: Any = Letters()
    chunks, cut = split_chunks(tokenizer, [Span(text, 1.5)] if text else [], limit=limit)
    assert "".join(chr(id) for chunk in chunks for id in chunk.ids) + "".join(chr(id or 0) for id in cut) == text
    assert len(chunks) <= limit
    assert not cut or len(chunks[-1].ids) == 75  # the last chunk is filled before anything is cut


def test_breaks_at_the_ends(clip: Tokenizer) -> None:
    def words(prompt: str) -> list[str]:
        return [clip.decode(chunk.ids) for chunk in split_chunks(clip, parse_prompt(prompt), limit=9)[0]]

    assert words("") == [""]
    assert words("BREAK a") == ["", "a"]  # as A1111: the first chunk is empty
    assert words("a BREAK") == ["a"]
    assert words("a BREAK BREAK b") == ["a", "", "b"]


def answer(**outputs: Array) -> Callable[..., dict[str, Array]]:
    return lambda input_ids: outputs


LAST = np.ones((1, 77, 4), np.float32)


@pytest.mark.parametrize(
    ("predict", "settings", "error", "message"),
    [
        (answer(last_hidden_state=LAST), {"clip_skip": 2}, RequestError, "gives one layer only"),
        (
            answer(last_hidden_state=LAST, hidden_states=LAST),
            {"clip_skip": 2},
            RequestError,
            "clip skip 2: expected 1 to 1",
        ),
        (answer(states=LAST), {}, EngineError, "'last_hidden_state' is missing"),
        (answer(last_hidden_state=LAST[:, :76]), {}, EngineError, r"is \(1, 76, 4\), expected 3 dimensions with 77"),
        (answer(last_hidden_state=LAST), {"tokens": 100}, RequestError, "100 tokens, expected a multiple of 77"),
        (answer(last_hidden_state=LAST), {"tokens": 0}, RequestError, "0 tokens, expected a multiple of 77"),
    ],
)
def test_encoders_that_cannot_do_it(
    clip: Tokenizer, predict: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        encode_prompt(predict, clip, "a", **settings)


@pytest.mark.parametrize("weight", ["9" * 50, "9" * 400])
def test_weights_without_measure_are_refused(clip: Tokenizer, weight: str) -> None:
    with pytest.raises(RequestError, match="not finite; lower them"):
        encode_prompt(answer(last_hidden_state=LAST), clip, f"(a:{weight})")


def test_an_encoder_without_pooled_output(clip: Tokenizer) -> None:
    found = encode_prompt(answer(last_hidden_state=LAST), clip, "a")
    assert isinstance(found, EncodedPrompt)
    assert found.pooled is None
