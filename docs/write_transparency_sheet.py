"""Write docs/transparency.png with the embedded family: `python docs/write_transparency_sheet.py MODEL`.

MODEL is the folder that `glassine demo` leaves behind (glassine-demo/model), or any with the transparent networks.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine.runtime.compose import checkerboard, flatten, opaque, over
from glassine.runtime.pipeline import Pipeline

SETTINGS = {"guidance_scale": 5.0, "output": "numpy"}
CLEAR = {"transparent": True, **SETTINGS}
GAP = 12


def panels(pipe: Pipeline) -> list[NDArray[np.uint8]]:
    """Return what docs/transparency.md speaks of, row by row."""
    width, height = pipe.size
    checks = checkerboard(width, height)
    star = pipe.run(pipe.request({"prompt": "a big red star in the middle", "seed": 3, **_drawn(CLEAR)})).finish()
    glass = pipe("a big glass cyan circle in the middle", seed=3, **CLEAR)
    glow = pipe("a glowing green heart", seed=3, **CLEAR)
    back = pipe("a small yellow circle at the top left, blue striped background", seed=7, **SETTINGS)
    edited = pipe(
        "a big yellow star in the middle", image=star.pixels, change_map="gradient:left-right", seed=3, **CLEAR
    )
    stack = over([opaque(back), glass, glow])
    return [star.grey, flatten(star.pixels, checks), flatten(star.pixels, np.full_like(checks, (32, 64, 96))),
            flatten(glass, checks), flatten(glow, checks), stack[..., :3],
            back, flatten(edited, checks), flatten(edited, back)]  # fmt: skip


def _drawn(settings: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name != "output"}


def main() -> None:
    """Draw, and lay the pictures out in rows of three."""
    with Pipeline.load(Path(sys.argv[1])) as pipe:
        pictures = panels(pipe)
        width, height = pipe.size
    rows = -(-len(pictures) // 3)
    sheet = Image.new("RGB", (3 * width + 2 * GAP, rows * height + (rows - 1) * GAP), "white")
    for index, pixels in enumerate(pictures):
        sheet.paste(Image.fromarray(pixels), (index % 3 * (width + GAP), index // 3 * (height + GAP)))
    sheet.save(Path(__file__).parent / "transparency.png", optimize=True)


if __name__ == "__main__":
    main()
