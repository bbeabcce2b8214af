"""`glassine demo`: converts the embedded tiny family and draws with it everything Glassine does, in under a minute.

The pictures, and one contact sheet of them with captions and timings, stay in the output folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from glassine.runtime.engine import EngineOptions
from glassine.runtime.fan import columns, fan_map
from glassine.runtime.image import save_png
from glassine.runtime.pipeline import Pipeline

TINY = Path(__file__).parents[1] / "models" / "tiny" / "tiny.safetensors"
PROMPT = "a red star, blue background"
OTHER = "a yellow circle, green background"
INPAINT = "a purple heart"
SEED = 7
CELL, GAP, HEAD = 256, 16, 44  # pixels of the contact sheet: a picture, the space between, the caption above it

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of the demo: (H, W, 3) uint8, what it shows, and the seconds it took."""

    name: str
    caption: str
    pixels: NDArray[np.uint8]
    seconds: float


def run(out: Path, model: Path | None, options: EngineOptions, report: Report) -> list[Path]:
    """Convert (unless `model` is a converted folder), draw, and write the pictures into `out`.

    Returns:
        The paths written, the contact sheet first.

    Raises:
        GlassineError: the model cannot be converted, or a picture cannot be drawn or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = model if model is not None else convert_tiny(out / "model", report)
    panels: list[Panel] = []
    with Pipeline.load(folder, options) as pipe:
        for draw in (draw_prompt, draw_map, draw_inpaint, draw_fan):
            panels.append(draw(pipe, panels))
            report(f"{panels[-1].caption}: {panels[-1].seconds:.1f} s")
    paths = [out / f"{index}-{panel.name}.png" for index, panel in enumerate(panels, 1)]
    for path, panel in zip(paths, panels, strict=True):
        save_png(path, panel.pixels, overwrite=True)
    sheet = out / "contact-sheet.png"
    save_png(sheet, contact_sheet(panels), overwrite=True)
    return [sheet, *paths]


def convert_tiny(folder: Path, report: Report) -> Path:
    """Convert the embedded family into `folder`, replacing what an earlier demo left there."""
    from glassine.convert.folder import ConvertOptions, convert_checkpoint

    start = time.perf_counter()
    convert_checkpoint(TINY, folder, ConvertOptions(attention="einsum", layout="channels_last", overwrite=True))
    report(f"converted the embedded family: {time.perf_counter() - start:.1f} s")
    return folder


def draw_prompt(pipe: Pipeline, _: list[Panel]) -> Panel:
    """Text to image."""
    return _timed("prompt", f'"{PROMPT}"', lambda: pipe(PROMPT, seed=SEED, output="numpy"))


def draw_map(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """The first picture again: kept at the left, free at the right."""
    words = "gradient:left-right"
    return _timed(
        "map",
        f'change map, left to right: "{OTHER}"',
        lambda: pipe(OTHER, image=panels[0].pixels, change_map=words, seed=SEED + 1, output="numpy"),
    )


def draw_inpaint(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """A soft hole in the middle of the first picture."""
    words = "ellipse:25%,25%,50%,50%:soft=32"
    return _timed(
        "inpaint",
        f'soft inpaint: "{INPAINT}"',
        lambda: pipe(INPAINT, image=panels[0].pixels, change_map=words, seed=SEED, output="numpy"),
    )


def draw_fan(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """The first picture in columns, each with more strength than the one before."""
    width, height = pipe.size
    fan = fan_map(columns(width, 8), height)
    return _timed(
        "fan",
        f'strength fan, 0 to 1: "{OTHER}"',
        lambda: pipe(OTHER, image=panels[0].pixels, change_map=fan, seed=SEED + 1, output="numpy"),
    )


def contact_sheet(panels: list[Panel], columns: int = 2) -> NDArray[np.uint8]:
    """Lay the panels out with captions; (H, W, 3) uint8."""
    rows = -(-len(panels) // columns)
    size = (columns * CELL + (columns + 1) * GAP, rows * (CELL + HEAD) + (rows + 1) * GAP)
    sheet = Image.new("RGB", size, "white")
    write = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        x, y = GAP + column * (CELL + GAP), GAP + row * (CELL + HEAD + GAP)
        write.text((x, y + 6), panel.caption, fill="black", font=font)
        write.text((x, y + 24), f"{panel.seconds:.1f} s", fill="gray", font=small)
        picture = Image.fromarray(panel.pixels).resize((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x, y + HEAD))
    return np.asarray(sheet)


def _timed(name: str, caption: str, draw: Callable[[], NDArray[np.uint8]]) -> Panel:
    start = time.perf_counter()
    pixels = draw()
    return Panel(name, caption, pixels, time.perf_counter() - start)
