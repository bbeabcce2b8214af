"""Writes clip_tokens.json.gz: 2,000 nasty strings and the ids that open_clip's tokenizer gives them.

    pip download --no-deps open_clip_torch==3.3.0
    unzip open_clip_torch-3.3.0-py3-none-any.whl 'open_clip/tokenizer.py' 'open_clip/bpe_simple_vocab_16e6.txt.gz'
    python tests/golden/make_clip_tokens.py open_clip/tokenizer.py

Written with ftfy 6.3.1, regex 2026.11 and Python 3.11. Only characters that Unicode has had for many years are used,
so that the answer does not depend on those versions.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

COUNT = 2000
TARGET = Path(__file__).with_name("clip_tokens.json.gz")

WORDS = """a photo of an astronaut riding horse masterpiece best quality highly detailed trending on artstation 8k uhd
dslr f/1.8 85mm rim-light cyberpunk neon it's don't you're they'll I'd we've O'Brien rock'n'roll café naïve coöperate
Straße MÜNCHEN ΟΔΥΣΣΕΥΣ İstanbul ıgdır Ǆungla ﬁne ﬀect Ⅻ ½ ² ™ © № 100% $5 C++ x² 3.14 1girl (blue:1.2) ((hair))
[dark] {red|green} __wild__ embedding:thing <lora:x:0.8> a_b-c+d=e #tag @user /path\\to \\(x\\) "quoted" `tick` ~ ^ | ;
THE 'S 'T 'RE 'VE 'M 'LL 'D 'Ll y'all'd've ''' ... ?!?! --- ___""".split()
RANGES = {
    "latin": (0xC0, 0x24F),
    "greek": (0x391, 0x3A1),
    "cyrillic": (0x410, 0x44F),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x627, 0x63A),
    "devanagari": (0x905, 0x939),
    "thai": (0xE01, 0xE2E),
    "hangul": (0xAC00, 0xD7A3),
    "kana": (0x3041, 0x3096),
    "cjk": (0x4E00, 0x9FA5),
    "fullwidth": (0xFF01, 0xFF5E),
    "halfwidth": (0xFF66, 0xFF9D),
    "maths": (0x1D400, 0x1D454),
    "combining": (0x300, 0x33F),
    "arrows": (0x2190, 0x21FF),
    "box": (0x2500, 0x257F),
    "emoji": (0x1F600, 0x1F640),
    "digits": (0x660, 0x669),
    "super": (0x2070, 0x2070),
    "ascii": (0x21, 0x7E),
}
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "1️⃣", "🧑‍🚀", "🐱"]
QUOTES = ["“", "”", "‘", "’", "„", "«", "»", "…", "–", "—", "ﬁ", "ﬂ", "ŉ"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\x85", "\x0b"]
CONTROLS = [
    "\x00",
    "\x07",
    "\x1b[31m",
    "\x1b",
    "\x7f",
    "\ufeff",
    "\u202e",
    "\u200d",
    "\ufffd",
    "\x9f",
    "\ud83d",
    "\udc00",
]
ENTITIES = ["&amp;", "&lt;", "&gt;", "&quot;", "&eacute;", "&EACUTE;", "&#39;", "&#x1F431;", "&amp;amp;", "&amp;lt;", "&nbsp;",
            "&notanentity;", "&", "&#0;", "&#xD800;", "&hellip"]  # fmt: skip
SPECIALS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<start_of_text>",
    "<end_of_text>",
    "<START_OF_TEXT>",
    "</w>",
    "a</w>",
    "!</w>",
]


def letters(rng: random.Random, most: int = 12) -> str:
    low, high = rng.choice(list(RANGES.values()))
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, most)))


def mojibake(rng: random.Random) -> str:
    text = rng.choice(["café", "naïve – “quoted”", "Überstraße", "日本語", "l’été", "©2020", "🐱"])
    for _ in range(rng.randint(1, 2)):
        text = text.encode("utf-8").decode(rng.choice(["latin-1", "cp1252"]), errors="replace")
    return text


def piece(rng: random.Random) -> str:
    kinds = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(WORDS),
        lambda: rng.choice(WORDS).upper(),
        lambda: rng.choice(WORDS).title() + rng.choice(WORDS),
        lambda: letters(rng),
        lambda: letters(rng),
        lambda: "".join(c + chr(rng.randint(0x300, 0x33F)) for c in rng.choice(WORDS)),
        lambda: rng.choice(EMOJI) * rng.randint(1, 2),
        lambda: rng.choice(QUOTES) + rng.choice(WORDS) + rng.choice(QUOTES),
        lambda: rng.choice(ENTITIES),
        lambda: html.escape(html.escape(rng.choice(WORDS))),
        lambda: mojibake(rng),
        lambda: rng.choice(CONTROLS),
        lambda: rng.choice(SPECIALS),
        lambda: str(rng.randint(0, 10**6)),
    ]
    return rng.choice(kinds)()


def strings() -> list[str]:
    rng = random.Random(20)
    made = [
        "",
        " ",
        "a",
        "!",
        "\n",
        "İ",
        "ς Σ ΑΣ",
        "'S",
        "it'ſ",
        "<ſtart_of_text>",
        "<end_of_text>",
        "x" * 500,
        "é" * 300,
        "ab" * 250,
        "🐱" * 60,
    ]
    while len(made) < COUNT:
        pieces = [piece(rng) for _ in range(rng.randint(1, 9))]
        text = "".join(p + rng.choice(["", " ", " ", ", ", rng.choice(SPACES)]) for p in pieces)
        if text not in made:
            made.append(text)
    return made


def open_clip_tokenizer(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def main() -> None:
    tokenizer = open_clip_tokenizer(Path(sys.argv[1]))
    texts = strings()
    golden = {"strings": texts, "ids": [tokenizer.encode(text) for text in texts]}
    packed = gzip.compress(json.dumps(golden, separators=(",", ":")).encode("ascii"), 9, mtime=0)
    TARGET.write_bytes(packed)
    print(f"{TARGET}: {len(texts)} strings, {sum(map(len, golden['ids']))} ids, {len(packed)} bytes")


if __name__ == "__main__":
    main()
