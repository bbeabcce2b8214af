"""What `glassine convert` says about further networks, beside a checkpoint or alone: control, transparency, collage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import FOLDER, options

if TYPE_CHECKING:
    from glassine.convert.network import Further

further_options = options(
    click.option("--base", type=FOLDER,
                 help="Add SOURCE, a ControlNet, a T2I-Adapter or a LayerDiffuse [KIND=]FILE, to this model folder; "
                      "without OUT. --name is then the net's, and --batch 1 makes one that costs nothing where "
                      "guidance is not steered."),
    click.option("--control", multiple=True, metavar="FILE",
                 help="A ControlNet or T2I-Adapter for the folder, called by its file's name; may be repeated."),
    click.option("--transparent", multiple=True, metavar="[KIND=]FILE",
                 help="A file of LayerDiffuse: decoder, encoder or a patch for the UNet; may be repeated. KIND, where "
                      "keys and name cannot tell: fg2bg, bg2fg, fg2ble, bg2ble; decoder or encoder for this family."),
    click.option("--collage", type=click.IntRange(1, 64), is_flag=False, flag_value=8, metavar="[LAYERS]",
                 help="Also a UNet that draws words where their layers lie (glassine collage), for so many layers with "
                      "words at most; 8 if no number is said. With --base and no SOURCE it is added to that folder."),
    click.option("--patch-strength", type=click.FloatRange(-3, 3), default=1.0, show_default=True,
                 help="Of a LayerDiffuse patch for SDXL."),
    click.option("--offset-scale", type=float,
                 help="Factor of a transparent encoder.  [default: 1; 300 for ld_diffusers_*]"),
)  # fmt: skip


def further_of(asked: dict[str, Any]) -> tuple[Further, ...]:
    """Take the further networks out of the parameters of a conversion that makes a folder."""
    from glassine.convert.control import Control, control_networks

    controls = [Control(Path(word)) for word in asked.pop("control")]
    listed = (partial(control_networks, controls),) if controls else ()
    return (*listed, *_transparent(asked.pop("transparent"), asked), *_collage(asked.pop("collage")))


def further_of_file(source: Path | None, asked: dict[str, Any]) -> tuple[Further, ...]:
    """What the one file adds to a folder that is there, or --collage without a file."""
    from glassine.convert.control import Control, control_networks
    from glassine.convert.control_files import is_control
    from glassine.convert.transparency import TransparentFile

    collage = _collage(asked.pop("collage"))
    if source is None:
        return collage
    said = TransparentFile.parse(str(source)).kind  # KIND=FILE
    if said is None and is_control(source):
        return (partial(control_networks, [Control(source, name=asked["name"], batch=asked["batch"])]), *collage)
    return (*_transparent((str(source),), asked), *collage)


def _collage(layers: int | None) -> tuple[Further, ...]:
    from glassine.convert.collage import collage_networks

    return () if layers is None else (partial(collage_networks, layers),)


def _transparent(words: Sequence[str], asked: dict[str, Any]) -> tuple[Further, ...]:
    from glassine.convert.transparency import TransparentFile, transparent_networks

    strength, scale = (asked.pop(name) for name in ("patch_strength", "offset_scale"))
    files = [TransparentFile.parse(word, strength=strength, offset_scale=scale) for word in words]
    return (partial(transparent_networks, files),) if files else ()


def check_places(source: Path | None, base: Path | None, out: Path | None, asked: dict[str, Any]) -> None:
    """Refuse a folder to make beside one to add to, and neither of them.

    Raises:
        click.UsageError: as said.
    """
    if source is None and (base is None or asked["collage"] is None):
        raise click.UsageError("Missing argument 'SOURCE': the checkpoint, or with --base what adds to that folder.")
    if base is None and out is None:
        raise click.UsageError("Missing argument 'OUT': the folder to make; or --base, one to add to.")
    if base is not None and out is not None:
        raise click.UsageError("OUT is the folder to make, --base one to add to: say one of them.")
    if base is not None and (asked["transparent"] or asked["control"]):
        raise click.UsageError("With --base the file to add is SOURCE itself, [KIND=]FILE.")
