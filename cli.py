"""The `glassine` command."""

import click


@click.group()
def main() -> None:
    """Stable Diffusion on Core ML, with a strength for every pixel."""
