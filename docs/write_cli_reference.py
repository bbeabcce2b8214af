"""Write docs/cli.md from the command's own help: `python docs/write_cli_reference.py`. A test holds the two equal."""

from pathlib import Path

import click
from click.testing import CliRunner

from glassine.cli import main

INTRODUCTION = """# The command

Written by `python docs/write_cli_reference.py` from the help texts. Results go to stdout (paths, or one JSON object
with `--json`), everything else to stderr. Exit codes: 0 done, 1 it could not be done (the message says what to do),
2 it was asked for wrongly.
"""


def reference() -> str:
    """Return the whole page."""

    def help_of(*arguments: str) -> str:
        text = CliRunner().invoke(main, [*arguments, "--help"], prog_name="glassine", terminal_width=100).stdout
        return "\n".join(line.rstrip() for line in text.splitlines())

    verbs = []
    for name, verb in main.commands.items():
        verbs.append((name,))
        verbs += [(name, part) for part in verb.commands] if isinstance(verb, click.Group) else []
    sections = [f"## glassine {' '.join(words)}\n\n```text\n{help_of(*words)}\n```\n" for words in verbs]
    return "\n".join([INTRODUCTION, f"```text\n{help_of()}\n```\n", *sections])


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
