"""Prompt -> context: weighted spans -> chunks of 77 token ids -> text encoder -> (1, tokens, width).

CLIP reads 77 tokens: start, 75 of text, end. Longer prompts are cut into chunks that are encoded one by one and laid
end to end along the tokens, as stable-diffusion-webui (A1111) does. A UNet has a fixed number of tokens, so a prompt of
fewer chunks is repeated or padded to it, and what exceeds it is cut and named in a notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, RequestError
from glassine.runtime.engine.contract import Predict
from glassine.runtime.prompt import Span, parse_prompt, unsupported
from glassine.runtime.request import Emphasis
from glassine.runtime.tokenizer import Tokenizer

Float = NDArray[np.float32]

CHUNK = 77  # tokens of one call: start, TEXT tokens, end
TEXT = 75
COMMA_REACH = 20  # a full chunk gives up to this many tokens behind its last comma to the next one (A1111's default)
_SHOWN = 240  # characters of a cut prompt that a notice quotes


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """What the UNet is told.

    context: (1, tokens, width) float32. pooled: (1, d) float32 or None if the encoder has none.
    notices: what was cut, left out or not understood, for the user.
    """

    context: Float
    pooled: Float | None
    notices: tuple[str, ...] = ()


@dataclass(slots=True)
class Chunk:
    """Up to 75 token ids, their weights, and which of the prompt's tokens each is, counted from 0."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def tail(self, start: int) -> Chunk:
        """Cut everything from `start` on off and return it."""
        rest = Chunk(self.ids[start:], self.weights[start:], self.numbers[start:])
        del self.ids[start:], self.weights[start:], self.numbers[start:]
        return rest


def encode_prompt(
    predict: Predict,
    tokenizer: Tokenizer,
    text: str,
    *,
    tokens: int = CHUNK,
    clip_skip: int = 1,
    own_skip: int = 1,
    emphasis: Emphasis = "original",
    pad: int | None = None,
) -> EncodedPrompt:
    """Encode one prompt.

    Args:
        predict: the text encoder: input_ids (1, 77) float32 -> last_hidden_state (SDXL: hidden_embeds) (1, 77, width)
            and, where it has them, pooled_outputs (1, d) and hidden_states (layers, 77, width), all of them behind the
            final LayerNorm or none.
        text: a prompt in the syntax of `prompt.py`.
        tokens: tokens of the UNet's context, a multiple of 77.
        clip_skip: 1 = the last layer, 2 = the one before it (A1111's numbering).
        own_skip: the layer that last_hidden_state is, in the same numbering.
        emphasis: "original" restores the mean of each chunk after weighting, "no_norm" does not.
        pad: id behind the end token; None is the end token itself (CLIP-L). SD2 and OpenCLIP bigG: 0.

    Raises:
        RequestError: words a small vocabulary cannot spell, weights out of range, a clip skip the encoder lacks.
        EngineError: the encoder does not answer as described.
    """
    if tokens % CHUNK or tokens < CHUNK:
        raise RequestError(f"the context has {tokens} tokens, expected a multiple of {CHUNK}")
    spans = parse_prompt(text)
    chunks, cut = chunks_of(tokenizer, spans, tokens)
    encoded: dict[tuple[int, ...], tuple[Float, Float | None]] = {}
    states = []
    for chunk in chunks:
        ids = chunk_ids(tokenizer, chunk, pad)
        if ids not in encoded:
            encoded[ids] = _encode(predict, ids, clip_skip, own_skip)
        states.append(emphasise(encoded[ids][0], chunk.weights, emphasis))
    pooled = encoded[chunk_ids(tokenizer, chunks[0], pad)][1]
    notices = (*unsupported(text), *_unknown_notices(tokenizer, spans), *_cut_notices(tokenizer, cut, tokens))
    return EncodedPrompt(context=np.concatenate(states, axis=1), pooled=pooled, notices=notices)


def side_by_side(encoded: Sequence[EncodedPrompt]) -> EncodedPrompt:
    """Join what several text encoders made of one prompt: widths add up, the last one's pooled output counts.

    Source: SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.1).
    """
    context = np.concatenate([prompt.context for prompt in encoded], axis=2)
    return EncodedPrompt(context=context, pooled=encoded[-1].pooled, notices=encoded[0].notices)


def chunks_of(tokenizer: Tokenizer, spans: Iterable[Span], tokens: int) -> tuple[list[Chunk], list[int | None]]:
    """Return the chunks that fill a context of `tokens` tokens, and what found no room in them."""
    chunks, cut = split_chunks(tokenizer, spans, limit=tokens // CHUNK)
    return _filled(chunks, tokens // CHUNK), cut


def split_chunks(tokenizer: Tokenizer, spans: Iterable[Span], *, limit: int) -> tuple[list[Chunk], list[int | None]]:
    """Cut weighted spans into at most `limit` chunks, at least one, and return what found no room too.

    A chunk that is full breaks behind its last comma if that is no more than 20 tokens back, except the last one:
    there is no next chunk to carry the words to. For the same reason a BREAK in the last chunk is passed over, and
    stands as None among the ids without room. An embedding's tokens stay together: what is left of a chunk is padded.
    """
    chunks = [Chunk()]
    cut: list[int | None] = []
    number = 0
    for ids, weight in _weighted_ids(tokenizer, spans):
        chunk, last = chunks[-1], len(chunks) == limit
        full = ids is not None and len(chunk.ids) + len(ids) > TEXT
        if last and (full or ids is None):
            cut += [None] if ids is None else ids
        elif ids is None:
            chunks.append(Chunk())
        else:
            if full and len(ids) > 1:
                chunks.append(Chunk())
            elif full:
                start = TEXT if ids[0] == tokenizer.comma else _break_at(chunk.ids, tokenizer.comma)
                chunks.append(chunk.tail(start))
            chunks[-1].ids += ids
            chunks[-1].weights += [weight] * len(ids)
            chunks[-1].numbers += range(number, number + len(ids))
        number += 0 if ids is None else len(ids)
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()  # a BREAK at the end opens no chunk
    return chunks, cut


def chunk_ids(tokenizer: Tokenizer, chunk: Chunk, pad: int | None = None) -> tuple[int, ...]:
    """Return the 77 ids of a chunk: start, text, end, and `pad` (None: the end token) to the end."""
    ids = (tokenizer.bos, *chunk.ids, tokenizer.eos)
    return ids + (tokenizer.eos if pad is None else pad,) * (CHUNK - len(ids))


def emphasise(states: Float, weights: list[float], emphasis: Emphasis) -> Float:
    """Multiply the hidden states of a chunk's text tokens by their weights.

    Args:
        states: (1, 77, width). weights: one per text token; start, end and padding have weight 1.
        emphasis: "original" then multiplies everything by mean(before) / mean(after), as A1111 does.

    Raises:
        RequestError: a weight is so large, or weights cancel so exactly, that the result is not finite.
    """
    if all(weight == 1.0 for weight in weights):
        return states
    factors = np.ones((1, states.shape[1], 1), np.float32)
    with np.errstate(all="ignore"):  # judged by the result
        factors[0, 1 : 1 + len(weights), 0] = weights
        weighted = states * factors
        if emphasis == "original":
            weighted *= np.float32(states.mean(dtype=np.float64) / weighted.mean(dtype=np.float64))
    if not np.isfinite(weighted).all():
        raise RequestError(
            f"prompt: weights up to {max(map(abs, weights)):g} make numbers that are not finite; lower them"
        )
    return weighted


def _weighted_ids(tokenizer: Tokenizer, spans: Iterable[Span]) -> Iterator[tuple[list[int] | None, float]]:
    """Yield (ids, weight) of every token, or embedding of several; None is a BREAK."""
    for span in spans:
        if span.text is None:
            yield None, 1.0
        else:
            yield from ((ids, span.weight) for ids in tokenizer.together(tokenizer.encode(span.text)))


def _break_at(ids: list[int], comma: int | None) -> int:
    """Return where a full chunk breaks: behind its last comma if that is near enough, else at its end."""
    for back in range(1, COMMA_REACH + 1):
        if ids[-back] == comma:
            return len(ids) - back + 1
    return len(ids)


def _filled(chunks: list[Chunk], count: int) -> list[Chunk]:
    """Return `count` chunks: the prompt's own repeated if that comes out even, else padded with the empty prompt.

    Attention over the same keys and values k times is attention over them once, so a repeated prompt draws what it
    draws in a UNet made for its own length.
    """
    if count % len(chunks) == 0:
        return chunks * (count // len(chunks))
    return chunks + [Chunk()] * (count - len(chunks))


def _encode(predict: Predict, ids: tuple[int, ...], clip_skip: int, own_skip: int) -> tuple[Float, Float | None]:
    """Return the hidden states (1, 77, width) that clip skip chooses, and the pooled output (1, d)."""
    outputs = predict(input_ids=np.array([ids], np.float32))
    own = _output(outputs, "hidden_embeds" if "hidden_embeds" in outputs else "last_hidden_state", 3)
    # What Apple's converter calls so in SDXL's first encoder is no vector, and nobody reads it.
    vector = outputs.get("pooled_outputs")
    pooled = None if vector is None or vector.ndim != 2 else np.array(vector, np.float32)
    if clip_skip == own_skip:
        return own, pooled
    if "hidden_states" not in outputs:
        raise RequestError(
            f"clip skip {clip_skip}: this text encoder gives one layer only; "
            f"use clip skip {own_skip} or convert the checkpoint with 'glassine convert'"
        )
    layers = _output(outputs, "hidden_states", 3)
    if not 1 <= clip_skip <= len(layers):
        raise RequestError(f"clip skip {clip_skip}: expected 1 to {len(layers)}, the layers of this text encoder")
    return layers[-clip_skip][None], pooled


def _output(outputs: Mapping[str, NDArray[np.generic]], name: str, rank: int) -> Float:
    """Copy one output: an engine may use its buffers again in the next call."""
    array = outputs.get(name)
    if array is None or array.ndim != rank or (rank == 3 and array.shape[1] != CHUNK):
        raise EngineError(
            f"text encoder: output {name!r} is {'missing' if array is None else array.shape}, "
            f"expected {rank} dimensions{f' with {CHUNK} tokens' if rank == 3 else ''}; convert the model again"
        )
    return np.array(array, np.float32)


def _unknown_notices(tokenizer: Tokenizer, spans: Iterable[Span]) -> Iterator[str]:
    unknown = dict.fromkeys(word for span in spans if span.text is not None for word in tokenizer.unknown(span.text))
    if unknown:
        words = ", ".join(map(repr, unknown))
        yield f"this small model was not taught {words}; it knows, among others: {', '.join(tokenizer.words)}"


def _cut_notices(tokenizer: Tokenizer, cut: list[int | None], tokens: int) -> Iterator[str]:
    if None in cut:
        yield f"BREAK is passed over: the model reads {tokens} tokens, and there is no next chunk of 75"
    ids = [id for id in cut if id is not None]
    if ids:
        text = tokenizer.decode(ids)
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        yield f"cut: the model reads {tokens} tokens, {len(ids)} of the prompt's did not fit: {text}"
