"""How a transparent picture looks: over a background, and as the VAE drew it; files beside the picture itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from glassine.runtime.request import Request
    from glassine.runtime.run import Result


def check_views(path: Path, request: Request, size: tuple[int, int], asked: dict[str, Any]) -> None:
    """Refuse, before drawing, views of an opaque picture, views that are in the way, and --no-padding where it pads."""
    from glassine.runtime.compose import background
    from glassine.runtime.image import check_output
    from glassine.runtime.transparency import check_decoder_size

    views = _views(path, asked)
    if views and not request.transparent:
        raise click.UsageError("--background and --keep-grey are about transparent pictures; say --transparent too")
    for view in views.values():
        check_output(view, overwrite=asked["overwrite"])
    if "over" in views:
        background(asked["background"], *size)
    if asked["no_padding"]:
        check_decoder_size(*size)


def save_views(path: Path, result: Result, asked: dict[str, Any]) -> None:
    """Write a transparent picture as it looks over a background, and as the VAE drew it."""
    from glassine.runtime.compose import background, flatten
    from glassine.runtime.image import save_png

    height, width = result.pixels.shape[:2]
    for kind, view in _views(path, asked).items():
        if kind == "over":
            pixels = flatten(result.pixels, background(asked["background"], width, height))
        elif result.grey is not None:
            pixels = result.grey
        else:  # a map under which nothing may change: nothing was decoded
            continue
        save_png(view, pixels, overwrite=asked["overwrite"])


def _views(path: Path, asked: dict[str, Any]) -> dict[str, Path]:
    """The views that were asked for, by their kind: files beside the picture."""
    wanted = {"over": asked["background"] is not None, "grey": asked["keep_grey"]}
    return {kind: path.with_name(f"{path.stem}-{kind}.png") for kind, asked_for in wanted.items() if asked_for}
