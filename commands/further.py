"""What `glassine convert` says about further networks: LayerDiffuse's files, beside a checkpoint or into a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import FOLDER, options

if TYPE_CHECKING:
    from glassine.convert.network import Further

further_options = options(
    click.option("--base", type=FOLDER,
                 help="Add SOURCE, a LayerDiffuse file, to this model folder; without OUT."),
    click.option("--transparent", multiple=True, metavar="[KIND=]FILE",
                 help="A file of LayerDiffuse: decoder, encoder or a patch for the UNet; may be repeated. KIND, where "
                      "keys and name cannot tell: fg2bg, bg2fg, fg2ble, bg2ble; decoder or encoder for this family."),
    click.option("--patch-strength", type=click.FloatRange(-3, 3), default=1.0, show_default=True,
                 help="Of a LayerDiffuse patch for SDXL."),
    click.option("--offset-scale", type=float,
                 help="Factor of a transparent encoder.  [default: 1; 300 for ld_diffusers_*]"),
)  # fmt: skip


def further_of(asked: dict[str, Any]) -> tuple[Further, ...]:
    """Take the further networks out of the convert verb's parameters."""
    from glassine.convert.transparency import TransparentFile, transparent_networks

    words, strength, scale = (asked.pop(name) for name in ("transparent", "patch_strength", "offset_scale"))
    files = [TransparentFile.parse(word, strength=strength, offset_scale=scale) for word in words]
    return (partial(transparent_networks, files),) if files else ()


def check_places(base: Path | None, out: Path | None, asked: dict[str, Any]) -> None:
    """Refuse a folder to make beside one to add to, and neither of them.

    Raises:
        click.UsageError: as said.
    """
    if base is None and out is None:
        raise click.UsageError("Missing argument 'OUT': the folder to make; or --base, one to add to.")
    if base is not None and out is not None:
        raise click.UsageError("OUT is the folder to make, --base one to add to: say one of them.")
    if base is not None and asked["transparent"]:
        raise click.UsageError("With --base the file to add is SOURCE itself, [KIND=]FILE.")
