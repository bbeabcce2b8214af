"""What the verbs say about LoRAs and other weights that are laid over a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import options

if TYPE_CHECKING:
    from glassine.convert.extras import Extras

extras_options = options(
    click.option("--lora", "loras", multiple=True, metavar="FILE[=S]",
                 help="Merge a LoRA at strength S (1), or UNET,TEXT; may be repeated."),
    click.option("--vae", type=click.Path(path_type=Path), help="Take the VAE of this file."),
    click.option("--ema", is_flag=True, help="Take the UNet's running average, where the file has one."),
)  # fmt: skip


def extras_of(asked: dict[str, Any]) -> Extras:
    """Take the extras out of the convert verb's parameters."""
    from glassine.convert.extras import Extras
    from glassine.convert.lora import LoraFile

    loras = tuple(LoraFile.parse(words) for words in asked.pop("loras"))
    return Extras(loras=loras, vae=asked.pop("vae"), ema=asked.pop("ema"))
