"""The `glassine` command: the group of verbs, and the one edge where errors become a message and an exit code.

Results go to stdout (paths, or one JSON object with --json), everything else to stderr. Exit codes are click's: 0 done,
1 it could not be done, 2 it was asked for wrongly.
"""

from __future__ import annotations

import errno
from typing import Any

import click

from glassine import __version__
from glassine.commands.about import demo, doctor
from glassine.commands.batch import batch
from glassine.commands.bench import bench
from glassine.commands.cache import cache
from glassine.commands.collage import collage
from glassine.commands.draw import fan, generate, show_map
from glassine.commands.inspect import inspect
from glassine.commands.layers import compose, layers
from glassine.commands.lora import lora
from glassine.commands.models import convert, verify
from glassine.commands.preprocess import preprocess
from glassine.commands.recipe import recipe
from glassine.commands.tune import tune
from glassine.errors import GlassineError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Verbs(click.Group):
    """Turns Glassine's errors into one line on stderr and exit code 1, at this edge and nowhere else."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs in the order one meets them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb that was asked for."""
        try:
            return super().invoke(ctx)
        except GlassineError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" at {error.filename}" if error.filename else ""
            raise click.ClickException(f"the disk is full{where}; free some space and run the same command") from error


@click.group(cls=Verbs, context_settings=CONTEXT)
@click.version_option(__version__, package_name="glassine", message="glassine %(version)s")
def main() -> None:
    """Stable Diffusion on Core ML, with a strength for every pixel.

    \b
    Example:
      glassine convert dreamshaper.safetensors dreamshaper
      glassine generate dreamshaper "a paper boat on a lake" -o boat.png
      glassine generate dreamshaper "a swan" --image boat.png --map gradient:left-right -o swan.png
    """


for verb in (
    convert,
    generate,
    show_map,
    fan,
    batch,
    layers,
    collage,
    compose,
    preprocess,
    lora,
    recipe,
    inspect,
    verify,
    cache,
    bench,
    tune,
    demo,
    doctor,
):
    main.add_command(verb)
