"""What is said of a drawing, and the small CLIP-format vocabulary it is said in.

A caption names what it likes: words have synonyms, attributes are left out, their order changes. Every word of the
grammar is one token; the vocabulary still has CLIP's form (bytes, merges, two special tokens), so any CLIP tokenizer
reads it, and words it was not trained on come out as several tokens that mean nothing to the family.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glassine.models.tiny.train.drawings import BACKGROUNDS, COLOURS, MATERIALS, SHAPES, SIZES, Drawings

TOKENS = 77
PLACES = {
    (0, 0): ("in the middle", "in the centre", "in the center"),
    (-1, 0): ("on the left",), (1, 0): ("on the right",), (0, -1): ("at the top",), (0, 1): ("at the bottom",),
    (-1, -1): ("in the top left corner", "at the top left"), (1, -1): ("in the top right corner", "at the top right"),
    (-1, 1): ("in the bottom left corner", "at the bottom left"),
    (1, 1): ("in the bottom right corner", "at the bottom right"),
}  # fmt: skip
SIZE_WORDS = {"small": ("small", "little"), "medium": ("",), "big": ("big", "large")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "crescent": ("crescent", "moon"), "cross": ("cross", "plus")}
GROUNDS = {
    "plain": ("{} background", "on a {} background", "plain {} background"),
    "gradient": ("{} gradient background", "on a {} gradient"),
    "striped": ("{} striped background", "on {} stripes", "{way} {} stripes"),
    "dotted": ("{} dotted background", "on {} dots"),
    "checkered": ("{} checkered background", "on a {} checkerboard"),
}
WAYS = ("vertical", "diagonal", "horizontal", "diagonal")  # of stripes, by angle


def captions(drawings: Drawings, each: int, seed: int, *, omit: float = 0.12, ground: bool = True) -> list[list[str]]:
    """Describe every drawing `each` times.

    Args:
        omit: how often an attribute (size, place, background; colour half as often) is left out.
        ground: False never mentions a background (for objects on nothing).
    """
    rng = random.Random(seed)
    rows = zip(*(getattr(drawings, name).tolist() for name in _Facts._fields), strict=True)
    return [[_caption(rng, facts, omit, ground) for _ in range(each)] for facts in map(_Facts._make, rows)]


class _Facts(NamedTuple):
    """What of one drawing can be said; the fields are columns of Drawings."""

    shape: list[int]
    colour: list[int]
    material: list[int]
    present: list[float]
    size: list[int]
    place: list[list[int]]
    kind: int
    ground: int
    angle: int


def _caption(rng: random.Random, facts: _Facts, omit: float, ground: bool) -> str:
    first = _thing(rng, facts, 0, omit)
    if facts.present[1]:
        second = _thing(rng, facts, 1, omit)
        if rng.random() < omit:
            text = f"{first} and {second}"
        else:
            text = f"{first} {_place(rng, facts, 0)} and {second} {_place(rng, facts, 1)}"
    else:
        quiet = omit if any(facts.place[0]) else 4 * omit  # the middle goes without saying
        text = first if rng.random() < quiet else f"{first} {_place(rng, facts, 0)}"
    if not ground or rng.random() < omit:
        return text
    phrase = rng.choice(GROUNDS[BACKGROUNDS[facts.kind]])
    phrase = phrase.format(list(COLOURS)[facts.ground], way=WAYS[facts.angle])
    if phrase.startswith("on "):
        return f"{text} {phrase}"
    return f"{phrase}, {text}" if rng.random() < 0.15 else f"{text}, {phrase}"


def _thing(rng: random.Random, facts: _Facts, which: int, omit: float) -> str:
    size, material, shape = list(SIZES)[facts.size[which]], MATERIALS[facts.material[which]], SHAPES[facts.shape[which]]
    words = [
        "" if rng.random() < omit else rng.choice(SIZE_WORDS[size]),
        "" if material == "solid" else material,
        "" if rng.random() < omit / 2 else list(COLOURS)[facts.colour[which]],
    ]
    if rng.random() < 0.2:
        rng.shuffle(words)
    words = [word for word in words if word]
    noun = rng.choice(SHAPE_WORDS.get(shape, (shape,)))
    article = "an" if [*words, noun][0][0] in "aeiou" else "a"
    return " ".join([article, *words, noun])


def _place(rng: random.Random, facts: _Facts, which: int) -> str:
    x, y = facts.place[which]
    return rng.choice(PLACES[x, y])


def words() -> list[str]:
    """Return every word the grammar can say, sorted."""
    phrases = [*SHAPES, *COLOURS, *MATERIALS[1:], *WAYS, "a", "an", "and"]
    for group in (PLACES, SIZE_WORDS, SHAPE_WORDS, GROUNDS):
        phrases += [phrase.replace("{way}", "").replace("{}", "") for phrases_ in group.values() for phrase in phrases_]
    return sorted({word for phrase in phrases for word in phrase.split()})


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build the vocabulary: token -> id, and the merges in order of rank.

    Ids as in CLIP: 256 bytes, the same ending a word, one token a merge, <|startoftext|>, <|endoftext|>. The merges are
    byte pair encoding run on the grammar's words until every word is one token.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words()]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in spelled):
        pairs = Counter(pair for word in spelled for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]
    letters = _bytes()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _bytes() -> list[str]:
    # CLIP writes each of the 256 bytes as one character: those that print first, then the rest from U+0100 on.
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printing] + [chr(256 + n) for n in range(256 - len(printing))]


def tokenize(texts: list[str]) -> Tensor:
    """Return token ids (len(texts), 77) of captions the grammar wrote: start, one token a word, end to the end."""
    vocab, _ = vocabulary()
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    rows = np.full((len(texts), TOKENS), end)
    for row, text in zip(rows, texts, strict=True):
        ids = [start, *(vocab[word + "</w>"] for word in text.replace(",", " ,").split())]
        row[: len(ids)] = ids
    return torch.from_numpy(rows)
