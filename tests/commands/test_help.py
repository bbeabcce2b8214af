"""Every verb has help with an example, and what help lists is what exists."""

import importlib.util
import re
from pathlib import Path
from typing import get_args

import click
import pytest

import glassine as package
from glassine.cli import main
from glassine.commands.options import RULES, SAMPLERS, SPACINGS, UNITS

ROOT = Path(package.__file__).parent
VERBS = {
    words: command
    for name, verb in sorted(main.commands.items())
    for words, command in {
        name: verb,
        **({f"{name} {part}": inner for part, inner in verb.commands.items()} if isinstance(verb, click.Group) else {}),
    }.items()
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_an_example(glassine, verb):
    text = glassine(*verb.split(), "--help").stdout
    assert f"Example:\n    glassine {verb}" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained(verb):
    bare = [p.opts[-1] for p in VERBS[verb].params if isinstance(p, click.Option) and not p.help]
    assert bare == []


@pytest.mark.parametrize("verb", VERBS)
def test_the_summary_fits_on_its_line(verb):
    assert "..." not in VERBS[verb].get_short_help_str(limit=60)


def test_names_on_the_command_line_are_the_registries():
    from glassine.runtime.change_map import RULES as RULE_NAMES
    from glassine.runtime.engine.contract import ComputeUnits
    from glassine.runtime.samplers import SAMPLERS as SAMPLER_TABLE
    from glassine.runtime.schedule import SPACINGS as SPACING_TABLE

    assert set(SAMPLERS) == set(SAMPLER_TABLE)
    assert set(SPACINGS) == set(SPACING_TABLE)
    assert set(RULES) == set(RULE_NAMES)
    assert get_args(ComputeUnits) == UNITS


def test_examples_in_the_documentation_parse():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    commands = [line.strip() for text in texts for line in re.findall(r"^ {4}glassine .*$", text, re.M)]
    assert commands
    for command in commands:
        _, verb, *words = command.split("#")[0].split()
        verb = f"{verb} {words[0]}" if words and f"{verb} {words[0]}" in VERBS else verb
        known = {name for p in VERBS[verb].params for name in p.opts}
        assert {word for word in words if word.startswith("-")} <= known | {"-h", "--help"}, command


def test_an_unknown_verb_is_a_usage_error(glassine):
    assert glassine("paint").exit_code == 2


def test_the_reference_page_is_what_help_says():
    spec = importlib.util.spec_from_file_location("write_cli_reference", ROOT / "docs" / "write_cli_reference.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == writer.reference(), "run: python docs/write_cli_reference.py"
