"""Words of a prompt are found where their tokens stand, once, or it is said why not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassine.errors import RequestError
from glassine.runtime.conditioning import CHUNK, chunk_ids, chunks_of
from glassine.runtime.prompt import parse_prompt
from glassine.runtime.token_spans import PromptTokens
from glassine.runtime.tokenizer import Tokenizer

LONG = "a photo of " + ", ".join(f"thing {chr(97 + i)}" for i in range(26))  # 3 + 26 * 3 - 1 tokens: 80, two chunks


def context(clip: Tokenizer, prompt: str, tokens: int) -> list[int]:
    """The ids of all tokens of the context, chunk after chunk: what the text encoder reads."""
    chunks, _ = chunks_of(clip, parse_prompt(prompt), tokens)
    return [id for chunk in chunks for id in chunk_ids(clip, chunk)]


def spelled(clip: Tokenizer, prompt: str, words: str, tokens: int = CHUNK, occurrence: int | None = None) -> list[int]:
    """The ids that stand where `words` were found."""
    ids = context(clip, prompt, tokens)
    assert len(ids) == tokens
    return [ids[column] for column in PromptTokens.of(clip, prompt, tokens).find(words, occurrence)]


@pytest.mark.parametrize(
    ("prompt", "words", "columns"),
    [
        ("a red star", "a red star", (1, 2, 3)),
        ("a red star and a blue circle", "blue circle", (6, 7)),
        ("A Red  STAR", "red star", (2, 3)),
        ("a (red:1.3) star", "red star", (2, 3)),
        ("a ((red) star:0.5)", "a red star", (1, 2, 3)),
        ("a (red:1.3) star", "(red:1.3) star", (2, 3)),
        (r"a star \(red\)", "star (red)", (2, 3, 4, 5)),
        (r"a star \(red\)", r"star \(red\)", (2, 3, 4, 5)),
        ("<lora:ink:0.8> a red star", "red star", (2, 3)),
        ("a red star, [blue] circle", "blue circle", (5, 6)),
        ("(a:1.2)(red:1.3)star", "aredstar", (1, 2, 3)),  # brackets part words that nothing else does
        ("hundred red stars", "red", (2,)),  # not the end of "hundred"
        ("don't", "don't", (1, 2)),
        ("two 42 stars", "42", (2, 3)),  # digits are tokens of their own
        ("caf&eacute; noir", "café", (1,)),
        ("a photo of an axolotl", "axolotl", (5, 6, 7, 8)),  # one word, four tokens
    ],
)
def test_columns(clip: Tokenizer, prompt: str, words: str, columns: tuple[int, ...]) -> None:
    assert PromptTokens.of(clip, prompt, CHUNK).find(words) == columns


def test_a_prompt_that_is_repeated_has_its_words_in_every_chunk(clip: Tokenizer) -> None:
    assert PromptTokens.of(clip, "a red star", 231).find("star") == (3, 80, 157)


def test_long_prompts_go_on_in_the_next_chunk(clip: Tokenizer) -> None:
    tokens = PromptTokens.of(clip, LONG, 154)
    # The first chunk gives everything behind its last comma to the second.
    assert tokens.find("thing y") == (77 + 1, 77 + 2)
    assert spelled(clip, LONG, "thing x, thing y", 154) == clip.encode("thing x, thing y")
    # Three chunks for a prompt of two: the third is empty.
    assert tokens.find("thing z") == PromptTokens.of(clip, LONG, 231).find("thing z")


def test_break_starts_the_next_chunk(clip: Tokenizer) -> None:
    prompt = "a red star BREAK a blue circle"
    assert PromptTokens.of(clip, prompt, 154).find("blue circle") == (79, 80)
    assert PromptTokens.of(clip, prompt, 77).find("star a blue") == (3, 4, 5)  # there is no next one


def test_added_words_keep_together(clip_folder: object) -> None:
    own = Tokenizer.load(clip_folder)
    own.add_words({"<cup>": range(49408, 49411)})
    tokens = PromptTokens.of(own, "a red <cup> of tea", CHUNK)
    assert tokens.find("red <cup>") == (2, 3, 4, 5)
    assert tokens.find("tea") == (7,)
    # One that finds no room in a full chunk is left out; what is shorter, and comes after it, is not.
    tokens = PromptTokens.of(own, "star " * 74 + "<cup> tea", CHUNK)
    assert tokens.find("tea") == (75,)
    with pytest.raises(RequestError, match='"<cup>" found no room, the model reads 77 tokens'):
        tokens.find("<cup>")


@pytest.mark.parametrize(
    ("prompt", "words", "occurrence", "message"),
    [
        ("a red star", "blue", None, 'the words "blue" are not in the prompt "a red star"; write them as they stand'),
        ("hundreds", "red", None, "only as parts of other words"),
        ("a red star", "", None, "are not in the prompt"),
        ("a red star", "  ", None, "are not in the prompt"),
        ("", "star", None, "are not in the prompt"),
        (
            "a star by a star",
            "star",
            None,
            r"2 times in the prompt \(1: a \[star\] by a star; 2: a star by a \[star\]\)",
        ),
        ("a star by a star", "star", None, "say which of them: occurrence 1 to 2"),
        ("a star by a star", "star", 3, "no occurrence 3 in the prompt; expected 1 to 2"),
        ("a star by a star", "star", 0, "no occurrence 0"),
        ("red " * 80 + "star", "star", None, r"found no room, .* convert the model with --tokens 154 or 231"),
    ],
)
def test_refused(clip: Tokenizer, prompt: str, words: str, occurrence: int | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PromptTokens.of(clip, prompt, CHUNK).find(words, occurrence)


def test_which_of_several(clip: Tokenizer) -> None:
    tokens = PromptTokens.of(clip, "a star by a star or star", CHUNK)
    assert [tokens.find("star", occurrence) for occurrence in (1, 2, 3)] == [(2,), (5,), (7,)]
    assert tokens.find("a star", 2) == (4, 5)
    assert PromptTokens.of(clip, "red red red", CHUNK).find("red red", 2) == (2, 3)  # they may overlap


WORDS = ("red", "star", "cup", "Tee", "blue,", "noir", "café", "42", "it's", "axolotl", "a")


@st.composite
def prompts(draw: st.DrawFn) -> tuple[str, str]:
    """A prompt with weights, and some consecutive words of it."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40))
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, len(words) - 1))
    dressed = []
    for word in words:
        kind = draw(st.sampled_from(["{}", "{}", "({})", "[{}]", "({}:1.3)", "(({}))"]))
        dressed.append(kind.format(word))
    gap = draw(st.sampled_from([" ", "  ", "\n"]))
    return gap.join(dressed), " ".join(words[first : last + 1])


@settings(max_examples=150, deadline=None)
@given(prompts(), st.sampled_from([77, 154, 231]))
def test_what_is_found_spells_the_words(clip: Tokenizer, case: tuple[str, str], tokens: int) -> None:
    """Every occurrence's columns hold the ids of the words, in each copy of the prompt, and no two share one."""
    prompt, words = case
    read = PromptTokens.of(clip, prompt, tokens)
    ids, wanted = context(clip, prompt, tokens), clip.encode(words)
    starts: list[int] = []
    for occurrence in range(1, 42):
        try:
            columns = read.find(words, occurrence)
        except RequestError as refused:
            said = str(refused)
        else:
            assert [ids[column] for column in columns] == wanted * (len(columns) // len(wanted))
            starts.append(columns[0])
            continue
        if "found no room" not in said:
            break
    assert "no occurrence" in said
    assert occurrence > 1
    assert starts == sorted(set(starts))
