r"""Prompt text -> weighted spans: the syntax of stable-diffusion-webui (A1111), which people's prompts are written in.

    (x)        weight of x times 1.1         [x]         divided by 1.1
    (x:1.3)    times 1.3                     \( \) \[ \] \\   the character itself
    BREAK      fills up the chunk of 75 tokens and starts the next

Brackets nest and multiply; a bracket never closed runs to the end; one never opened is text. A number that is not
one (`(x:1.2.3)`) is text. BREAK works inside brackets too, where A1111 reads it as a word. What A1111 knows and we do
not (`[a:b:0.5]`, `[a|b]`, AND) is plain text here, `<lora:name:1>` and its like are no text at all: `unsupported` names
what is not followed. LoRAs are in a model's weights or not: `network_tags` tells the one who opens it which are wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

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


def plain_text(prompt: str) -> str:
    """Return the text of a prompt, without weights, brackets and tags; a BREAK is a space."""
    return "".join(" " if span.text is None else span.text for span in parse_prompt(prompt))


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


class NetworkTag(NamedTuple):
    """A LoRA that a prompt asks for, at its strengths for the UNet and the text encoders."""

    name: str
    unet: float
    text: float


def network_tags(prompt: str) -> dict[str, NetworkTag | None]:
    """Return the LoRAs in a prompt, as they stand there -> what they mean; None for what cannot be read.

    <lora:name>, <lora:name:0.8>, <lora:name:TEXT:UNET>, <lora:name:te=TEXT:unet=UNET>; <lyco:...> means the same.
    """
    return {found: _tag(found) for found in _NETWORK.findall(prompt)}


def _tag(found: str) -> NetworkTag | None:
    kind, name, *numbers = found[1:-1].split(":")
    named = dict(number.split("=", 1) for number in numbers if "=" in number)
    plain = [number for number in numbers if "=" not in number]
    if kind == "hypernet" or not name or len(plain) > 2 or not named.keys() <= {"te", "unet"}:
        return None
    try:
        text = float(named.get("te", plain[0] if plain else 1.0))
        unet = float(named.get("unet", plain[1] if len(plain) > 1 else text))
    except ValueError:
        return None
    return NetworkTag(name, unet, text) if math.isfinite(text) and math.isfinite(unet) else None


def without_tags(prompt: str, merged: Collection[NetworkTag]) -> str:
    """Return the prompt without the tags of LoRAs that are in the model's weights: they have done what they ask for."""
    for found, tag in network_tags(prompt).items():
        if tag in merged:
            prompt = prompt.replace(found, "")
    return prompt


def unsupported(prompt: str) -> tuple[str, ...]:
    """Return a notice for each piece of A1111 syntax in `prompt` that Glassine does not follow."""
    networks = [
        f"{found} is left out of the prompt: it is not in this model's weights ('glassine generate' merges the LoRAs "
        "of a prompt, 'glassine lora' those that are to stay)"
        for found in network_tags(prompt)
    ]
    schedules = [
        f"{found} is drawn as plain text: prompts that change or combine while drawing are not supported"
        for found in dict.fromkeys(_SCHEDULE.findall(_NETWORK.sub("", prompt)))
    ]
    return (*networks, *schedules)
