"""The verb that shows what a control network will see: preprocess."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import FILE, as_json, engine_of, engine_options, give, overwrite, read_size, say

if TYPE_CHECKING:
    from glassine.runtime.preprocess.catalogue import Kind


@click.command()
@click.argument("how", required=False)
@click.argument("picture", type=FILE, required=False)
@click.option("--out", "-o", type=FILE, default=Path("hint.png"), show_default=True, help="The picture to write.")
@click.option(
    "--size",
    callback=lambda _, __, value: read_size(value) if value else None,
    metavar="WxH",
    help="The model's, in pixels.  [default: the picture's, down to multiples of 8]",
)
@click.option("--fit", type=click.Choice(["crop", "fit", "stretch"]), default="crop", show_default=True,
              help="A picture of another shape: cut it, add margins, or stretch it.")  # fmt: skip
@click.option("--resolution", type=int, metavar="PIXELS",
              help="Short side at which the preprocessor looks.  [default: pixel perfect]")  # fmt: skip
@click.option("--mask", type=FILE, help="For inpaint: white is repainted.")
@overwrite
@engine_options
@click.option("--list", "wants_list", is_flag=True, help="Print every preprocessor with its settings, and leave.")
@as_json
def preprocess(how: str | None, picture: Path | None, out: Path, wants_list: bool, as_json: bool, **asked: Any) -> None:
    """Show what a control network will see.

    HOW is a preprocessor, its network if it needs one, and settings: NAME[=FILE][,SETTING=VALUE ...].

    \b
      none       the picture as it is: a map made elsewhere
      canny      edges, one pixel wide
      scribble   rough strokes (XDoG)
      lineart    drawn lines, grey
      threshold  white where the darkest channel is bright
      invert     the negative: black lines on paper become white on black
      tile       the picture with less detail
      blur       the picture blurred
      luminance  lightness, to be recoloured
      intensity  largest channel, to be recoloured
      shuffle    the picture's content moved about
      grid       squares of the picture's colours
      inpaint    the picture with a mask cut out; needs a mask
      depth      near white, far black; needs a depth network
      normal     which way surfaces face; needs a normal network
      softedge   soft lines; needs an edge or line-art network
      segment    a colour for every class of ADE20K; needs a segmentation network
      pose       people as stick figures; macOS finds them, or keypoints from a file

    \b
    Example:
      glassine preprocess canny photo.png -o edges.png
      glassine preprocess canny,low=50,high=150 photo.png --size 512x768 -o edges.png
      glassine preprocess depth=depth.onnx,multiple=14 photo.png -o depth.png
      glassine preprocess pose=keypoints.json photo.png -o pose.png
      glassine preprocess inpaint photo.png --mask door.png -o cut.png
    """
    from glassine.runtime.image import check_output, read_picture, save_png
    from glassine.runtime.preprocess import KINDS, Preprocess, hint

    if wants_list:
        give(_told(KINDS), _listed(KINDS), as_json)
        return
    if how is None or picture is None:
        raise click.UsageError("give HOW and PICTURE, or --list")
    wanted = Preprocess.read(how, fit=asked["fit"], resolution=asked["resolution"])
    check_output(out, overwrite=asked["overwrite"])
    size = asked["size"]
    if size is None:
        width, height = read_picture(picture).size
        size = (max(8, width // 8 * 8), max(8, height // 8 * 8))
    made = hint(picture, size, wanted, mask=asked["mask"], engine=engine_of(asked))
    for notice in made.notices:
        say(f"note: {notice}")
    save_png(out, made.pixels, overwrite=asked["overwrite"])
    report = {"path": str(out), "preprocessor": wanted.name, "width": size[0], "height": size[1]}
    give({**report, "notices": made.notices}, str(out), as_json)


def _told(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    return {
        name: {
            "says": kind.says,
            "needs": kind.needs,
            "settings": {s.name: {"default": s.default, "range": s.range, "says": s.says} for s in kind.settings},
        }
        for name, kind in kinds.items()
    }


def _listed(kinds: Mapping[str, Kind]) -> str:
    lines = []
    for name, kind in kinds.items():
        lines.append(f"{name:<11}{kind.says}")
        lines += [f"{'':13}{s.name}={s.default}  {s.range}: {s.says}" for s in kind.settings]
    return "\n".join(lines)
