"""Where words of a prompt stand among the tokens that a UNet reads: exactly, or an error that says why not.

prompt -> its text without weights and brackets, in pieces that are spelled alone -> columns of the context

Words are looked for in the text as the text encoder reads it (lower case, single spaces), from the beginning of one
piece to the end of another: "red" is not found in "hundred". The columns are those of `conditioning.py`: chunks of 77
with a start token each, what was carried over to the next chunk there, and a prompt that fills two contexts in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from glassine.errors import RequestError
from glassine.runtime.conditioning import CHUNK, chunks_of
from glassine.runtime.prompt import Span, parse_prompt
from glassine.runtime.tokenizer import Piece, Tokenizer, clean

_AROUND = 24  # characters beside a find that a message quotes


class _Place(NamedTuple):
    """A piece of the text, and its columns; none where it found no room."""

    start: int
    end: int
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt's plain text and where its pieces stand in the context of `tokens` tokens."""

    text: str
    places: tuple[_Place, ...]
    tokens: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: str, tokens: int) -> PromptTokens:
        """Read a prompt in the syntax of `prompt.py`.

        Raises:
            RequestError: words that a small vocabulary cannot spell.
        """
        spans = parse_prompt(prompt)
        columns: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks_of(tokenizer, spans, tokens)[0]):
            for at, number in enumerate(chunk.numbers, start=index * CHUNK + 1):
                columns.setdefault(number, []).append(at)
        text, places, count = _plain(spans), [], 0
        for piece in _pieces(tokenizer, spans):
            numbers = range(count, count := count + len(piece.ids or ()))
            kept = [columns[number] for number in numbers if number in columns]
            whole = tuple(sorted(itertools.chain(*kept))) if len(kept) == len(numbers) else ()
            places.append(_Place(piece.start, piece.end, whole))
        return cls(text, tuple(places), tokens)

    def find(self, words: str, occurrence: int | None = None) -> tuple[int, ...]:
        """Return the columns of the context that `words` stand in.

        Args:
            words: part of the prompt, with or without its weights, brackets and escapes.
            occurrence: which one, from 1, where they stand there several times.

        Raises:
            RequestError: they are not there, several times, or were cut.
        """
        wanted = _plain(parse_prompt(words))
        finds = list(self._finds(wanted))
        if not finds:  # brackets that are text, escaped in the prompt alone
            finds = list(self._finds(clean(words)))
        if not finds:
            inside = ", only as parts of other words" if wanted and wanted in self.text else ""
            raise RequestError(
                f'the words "{words}" are not in the prompt "{self.text}"{inside}; write them as they stand there'
            )
        if occurrence is None and len(finds) > 1:
            shown = "; ".join(f"{number}: {self._around(find)}" for number, find in enumerate(finds, start=1))
            raise RequestError(
                f'the words "{words}" stand {len(finds)} times in the prompt ({shown}); say which of them: '
                f"occurrence 1 to {len(finds)}"
            )
        number = 1 if occurrence is None else occurrence
        if not 1 <= number <= len(finds):
            raise RequestError(
                f'the words "{words}" have no occurrence {number} in the prompt; expected 1 to {len(finds)}'
            )
        found = finds[number - 1]
        if not all(place.columns for place in found):
            raise RequestError(
                f'the words "{words}" found no room, the model reads {self.tokens} tokens; shorten the prompt, or '
                "convert the model with --tokens 154 or 231"
            )
        return tuple(sorted(column for place in found for column in place.columns))

    def _finds(self, wanted: str) -> Iterator[tuple[_Place, ...]]:
        """The pieces of every occurrence, in order."""
        starts = {place.start: i for i, place in enumerate(self.places)}
        ends = {place.end: i for i, place in enumerate(self.places)}
        at = self.text.find(wanted) if wanted else -1
        while at >= 0:
            first, last = starts.get(at), ends.get(at + len(wanted))
            if first is not None and last is not None:
                yield self.places[first : last + 1]
            at = self.text.find(wanted, at + 1)

    def _around(self, found: Sequence[_Place]) -> str:
        start, end = found[0].start, found[-1].end
        before, after = self.text[max(0, start - _AROUND) : start], self.text[end : end + _AROUND]
        return f"{before}[{self.text[start:end]}]{after}"


def _parts(spans: Sequence[Span]) -> Iterator[tuple[int, str]]:
    """Where the clean text of each span begins in that of the prompt, and it."""
    at, gap = 0, False
    for span in spans:
        if span.text is None:
            gap = True
            continue
        own = clean(span.text)
        gap = (gap or span.text[:1].isspace()) and at > 0
        if own:
            at += gap
            yield at, own
            at += len(own)
            gap = False
        gap = gap or span.text[-1:].isspace()


def _plain(spans: Sequence[Span]) -> str:
    """The prompt without its syntax."""
    text = ""
    for start, own in _parts(spans):
        text = text.ljust(start) + own
    return text


def _pieces(tokenizer: Tokenizer, spans: Sequence[Span]) -> Iterator[Piece]:
    """What is spelled alone, placed in the prompt's plain text."""
    for start, own in _parts(spans):
        for piece in tokenizer.pieces(own):
            yield Piece(start + piece.start, start + piece.end, piece.ids)
