r"""Prompt text -> weighted spans: the syntax of stable-diffusion-webui (A1111), which people's prompts are written in.

    (x)        weight of x times 1.1         [x]         divided by 1.1
    (x:1.3)    times 1.3                     \( \) \[ \] \\   the character itself
    BREAK      fills up the chunk of 75 tokens and starts the next

Brackets nest and multiply; a bracket never closed runs to the end; one never opened is text. A number that is not
one (`(x:1.2.3)`) is text. BREAK works inside brackets too, where A1111 reads it as a word. What A1111 knows and we do
not (`[a:b:0.5]`, `[a|b]`, AND) is plain text here, `<lora:name:1>` and its like are taken out: `unsupported` says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""\\[()\[\]\\]                                       # an escaped character
      | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)  # the end of "(x:1.3)"
      | \s*\b(?P<cut>BREAK)\b\s*
      | \s+ | \w+ | [\s\S]""",
    re.VERBOSE,
)
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_SCHEDULE = re.compile(r"(?<!\\)\[[^\[\]]*(?::\s*\d*\.?\d+\s*|\|[^\[\]]*)\]|\bAND\b")


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text and the weight of its tokens. `text` None is a BREAK."""

    text: str | None
    weight: float = 1.0


def parse_prompt(prompt: str) -> list[Span]:
    """Return the weighted spans of `prompt`; neighbours of equal weight are one span, an empty prompt is none."""
    texts: list[str | None] = []
    weights: list[float] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for i in range(open_at[bracket].pop(), len(weights)):
            weights[i] *= factor

    for match in _TOKEN.finditer(_NETWORK.sub("", prompt)):
        token, weight = match.group(), match["weight"]
        if token in open_at:
            open_at[token].append(len(texts))
        elif weight is not None and open_at["("]:
            close("(", float(weight))
        elif token == ")" and open_at["("]:
            close("(", 1.1)
        elif token == "]" and open_at["["]:
            close("[", 1 / 1.1)
        else:
            texts.append(None if match["cut"] else token[-1] if token[0] == "\\" else token)
            weights.append(1.0)
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while open_at[bracket]:
            close(bracket, factor)
    return _merged(texts, weights)


def _merged(texts: list[str | None], weights: list[float]) -> list[Span]:
    spans: list[Span] = []
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            spans.append(Span(None))
        elif spans and spans[-1].text is not None and spans[-1].weight == weight:
            spans[-1] = Span(spans[-1].text + text, weight)
        else:
            spans.append(Span(text, weight))
    return spans


def unsupported(prompt: str) -> tuple[str, ...]:
    """Return a notice for each piece of A1111 syntax in `prompt` that Glassine does not follow."""
    networks = [
        f"{found} is left out of the prompt: LoRAs are merged when the model is converted"
        for found in dict.fromkeys(_NETWORK.findall(prompt))
    ]
    schedules = [
        f"{found} is drawn as plain text: prompts that change or combine while drawing are not supported"
        for found in dict.fromkeys(_SCHEDULE.findall(_NETWORK.sub("", prompt)))
    ]
    return (*networks, *schedules)
