"""Write docs/cli.md from the command's own help: `python docs/write_cli_reference.py`. A test holds the two equal."""

from pathlib import Path

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

    sections = [f"## glassine {verb}\n\n```text\n{help_of(verb)}\n```\n" for verb in main.commands]
    return "\n".join([INTRODUCTION, f"```text\n{help_of()}\n```\n", *sections])


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
