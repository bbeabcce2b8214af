"""Write docs/collage.png with the embedded family: `python docs/write_collage_sheet.py MODEL`.

MODEL is the embedded checkpoint, converted for collages:
`glassine convert models/tiny/tiny.safetensors MODEL --attention einsum --collage`.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from glassine.runtime.collage import Collage, Layer
from glassine.runtime.collage_picture import render
from glassine.runtime.pipeline import Pipeline

PROMPT = "a red star and a blue circle, white background"
SETTINGS = {"guidance_scale": 5.0, "seed": 3}
GAP = 12


def cutout(shape: str, colour: tuple[int, int, int], side: int = 400) -> Image.Image:
    """Return a shape cut out of coloured paper, RGBA."""
    picture = Image.new("RGBA", (side, side))
    draw, middle = ImageDraw.Draw(picture), side / 2
    if shape == "circle":
        draw.ellipse([10, 10, side - 10, side - 10], fill=(*colour, 255))
    else:
        points = np.arange(10)
        angles, reach = points * np.pi / 5 - np.pi / 2, np.where(points % 2, 0.19, 0.48) * side
        corners = zip(middle + reach * np.cos(angles), middle + reach * np.sin(angles), strict=True)
        draw.polygon(list(corners), fill=(*colour, 255))
    return picture


def scene(star: tuple[int, int] = (8, 26), circle: tuple[int, int] = (140, 128)) -> Collage:
    """Return a star and a circle with these corners, cut out roughly, on paper."""
    words = {"attract": 0.1, "repel": 0.1}
    layers = [
        Layer(
            cutout("circle", (60, 75, 150)), "a blue circle", x=circle[0], y=circle[1], width=104, change=0.5, **words
        ),
        Layer(
            cutout("star", (160, 60, 55)),
            "a red star",
            x=star[0],
            y=star[1],
            width=150,
            rotation=15,
            change=0.7,
            **words,
        ),
    ]
    return Collage(layers, background="#d8d4c8", background_change=0.6)


def main() -> None:
    """Draw: the maps above, then the collage, the same with another star, and one with its layers moved."""
    collage = scene()
    with Pipeline.load(Path(sys.argv[1])) as pipe:
        maps = Image.fromarray(render(pipe, collage, pipe.request({"prompt": PROMPT, **SETTINGS})))
        drawn = pipe(PROMPT, image=collage, **SETTINGS)
        circle, star = collage.layers
        layers = [dataclasses.replace(circle, change=0.0), dataclasses.replace(star, change=0.9)]
        again = dataclasses.replace(collage, layers=layers, background_change=0.0, previous=drawn)
        other = pipe(PROMPT, image=again, **{**SETTINGS, "seed": 8})
        moved = pipe(PROMPT, image=scene(star=(98, 96), circle=(16, 20)), **SETTINGS)
    side = (maps.width - 4 * GAP) // 3
    sheet = Image.new("RGB", (maps.width, maps.height + side + GAP), "white")
    sheet.paste(maps, (0, 0))
    for index, picture in enumerate((drawn, other, moved)):
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (GAP + index * (side + GAP), maps.height))
    sheet.save(Path(__file__).parent / "collage.png", optimize=True)


if __name__ == "__main__":
    main()
