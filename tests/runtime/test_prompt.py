"""The prompt syntax: cases by hand, and trees written as prompts and read back."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassine.runtime.prompt import Span, parse_prompt, unsupported

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("", []),
        ("plain words, and more", [("plain words, and more", 1)]),
        ("a (red) hat", [("a ", 1), ("red", UP), (" hat", 1)]),
        ("a [red] hat", [("a ", 1), ("red", DOWN), (" hat", 1)]),
        ("((red))", [("red", UP * UP)]),
        ("[[red]]", [("red", DOWN * DOWN)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red : 1.3 )", [("red ", 1.3)]),
        ("(red:-.5)(blue:+2.)", [("red", -0.5), ("blue", 2)]),
        ("(red:0)", [("red", 0)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("(a)(b)", [("ab", UP)]),
        # brackets that are never closed, or never opened
        ("(red hat", [("red hat", UP)]),
        ("a [red (hat", [("a ", 1), ("red ", DOWN), ("hat", UP * DOWN)]),
        ("red) hat]", [("red) hat]", 1)]),
        ("red:1.3) hat", [("red:1.3) hat", 1)]),
        ("(red:1.3", [("red:1.3", UP)]),
        # a number that is none, and colons in the text
        ("(red:1.2.3)", [("red:1.2.3", UP)]),
        ("(red:)", [("red:", UP)]),
        ("16:9, (ratio 4:3:1.5)", [("16:9, ", 1), ("ratio 4:3", 1.5)]),
        ("[red:1.3]", [("red:1.3", DOWN)]),
        # escapes
        (r"\(red\) \[hat\] \\", [(r"(red) [hat] " + "\\", 1)]),
        (r"(a \) b:2)", [("a ) b", 2)]),
        (r"C:\new \x", [(r"C:\new \x", 1)]),
        ("end\\", [("end\\", 1)]),
        # BREAK: a word of its own, in capitals
        ("a BREAK b", [("a", 1), (None, 1), ("b", 1)]),
        ("a,\n BREAK\t,b", [("a,", 1), (None, 1), (",b", 1)]),
        ("BREAK BREAK a BREAK", [(None, 1), (None, 1), ("a", 1), (None, 1)]),
        ("BREAKFAST unBREAK break", [("BREAKFAST unBREAK break", 1)]),
        ("(a BREAK b:2)", [("a", 2), (None, 1), ("b", 2)]),
        # what is taken out
        ("a <lora:film grain:0.8>hat", [("a hat", 1)]),
        ("1 < 2 > 0", [("1 < 2 > 0", 1)]),
    ],
)
def test_cases(prompt: str, spans: list[tuple[str | None, float]]) -> None:
    found = [(span.text, span.weight) for span in parse_prompt(prompt)]
    assert [text for text, _ in found] == [text for text, _ in spans]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in spans], rel=1e-12)


@dataclass(frozen=True)
class Node:
    """A piece of a prompt: text, or children between brackets."""

    text: str = ""
    children: tuple[Node, ...] = ()
    bracket: str = ""
    weight: float | None = None

    def write(self) -> str:
        if not self.bracket:
            return "".join("\\" + c if c in "()[]\\" else c for c in self.text)
        inside = "".join(child.write() for child in self.children)
        if self.bracket == "[":
            return f"[{inside}]"
        return f"({inside})" if self.weight is None else f"({inside}:{self.weight:.3f})"

    def read(self, weight: float = 1.0) -> list[tuple[str, float]]:
        """The weight of every character, by recursion: no stack, no ranges."""
        if not self.bracket:
            return [(c, weight) for c in self.text]
        factor = DOWN if self.bracket == "[" else UP if self.weight is None else round(self.weight, 3)
        return [pair for child in self.children for pair in child.read(weight * factor)]


TEXT = st.text(st.sampled_from("abc ,.()[]\\é猫\n"), min_size=1, max_size=8).map(lambda text: Node(text=text))
TREES = st.recursive(
    TEXT,
    lambda nodes: st.builds(
        Node,
        children=st.lists(nodes, min_size=1, max_size=3).map(tuple),
        bracket=st.sampled_from("(["),
        weight=st.none() | st.floats(-2, 2, allow_nan=False),
    ),
    max_leaves=12,
)


@given(st.lists(TREES, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_tree_written_as_a_prompt_is_read_back(trees: list[Node]) -> None:
    spans = parse_prompt("".join(tree.write() for tree in trees))
    found = [(c, span.weight) for span in spans for c in span.text or ""]
    expected = [pair for tree in trees for pair in tree.read()]
    assert [c for c, _ in found] == [c for c, _ in expected]
    assert [w for _, w in found] == pytest.approx([w for _, w in expected], rel=1e-9, abs=1e-12)


@given(st.text(st.sampled_from("ab:1.5()[]\\ BREAK\n<>|"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_prompt(text: str) -> None:
    spans = parse_prompt(text)
    assert all(math.isfinite(span.weight) for span in spans)
    pairs = itertools.pairwise(spans)
    assert all(a.text is None or b.text is None or a.weight != b.weight for a, b in pairs), "neighbours were not merged"
    plain = "".join(c for c in text if c not in "()[]\\:.15 \n<>|")
    kept = "".join(c for span in spans for c in (span.text or "BREAK") if c not in "()[]\\:.15 \n<>|")
    assert kept == plain  # brackets and numbers may be syntax, words never are


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 10000,
        "[a" * 5000,
        " " * 10000,
        ":" * 10000,
        ":" + "1" * 9999,
        "(:" + " " * 9999,
        "<lora:" * 1600,
        "[a:" * 3000,
    ],
)
def test_ten_thousand_hostile_characters_are_read(prompt: str) -> None:
    text = "".join(span.text or "" for span in parse_prompt(prompt))
    assert text == prompt.replace("(", "").replace("[", "")
    assert unsupported(prompt) == ()


def test_what_is_not_followed_is_said() -> None:
    assert unsupported(r"a (cat:1.2) [dim] \[a:b:0.5\] BREAK 16:9 [ratio 16:x]") == ()
    notices = unsupported("<lora:film:1> <lora:film:1> [red:blue:0.5] [cow|horse] a AND b")
    assert [notice.split(" is ")[0] for notice in notices] == ["<lora:film:1>", "[red:blue:0.5]", "[cow|horse]", "AND"]


def test_break_has_no_weight() -> None:
    assert parse_prompt("((BREAK))") == [Span(None)]
