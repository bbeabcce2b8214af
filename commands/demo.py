"""`glassine demo`: converts the embedded tiny family and draws with it everything Glassine does, in under a minute.

The pictures, and one contact sheet of them with captions and timings, stay in the output folder.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from glassine.runtime.change_map import n_table, parse, to_cells
from glassine.runtime.compose import checkerboard, flatten, opaque, over
from glassine.runtime.control import Control
from glassine.runtime.engine import EngineOptions
from glassine.runtime.fan import columns, fan_map, label
from glassine.runtime.image import save_png
from glassine.runtime.map_picture import render
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import sigmas_of
from glassine.runtime.schedule import STABLE_DIFFUSION

FAMILY = Path(__file__).parents[1] / "models" / "tiny"
TINY = FAMILY / "tiny.safetensors"
PROMPT = "a big red star in the middle, blue background"
OTHER = "a big yellow circle in the middle, blue background"
INSIDE = "a big green heart in the middle, blue background"
ALONE = "a big glass cyan circle"
FILLED = 4  # the panel with the filled hole
STEERED = "a red star, blue background"
EDGES = "canny"  # the family's control net
RAMP = "gradient:left-right"
SPOT = "ellipse:15%,15%,70%,70%:soft=24"
SETTINGS: dict[str, Any] = {"guidance_scale": 5.0, "steps": 20, "output": "numpy"}
COLUMNS, CELL, GAP, HEAD = 3, 256, 16, 56  # the contact sheet; pixels: a picture, the space between, the caption above

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of the demo: (H, W, 3) or (H, W, 4) uint8, what it shows, and the seconds it took."""

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
        steered = (draw_edges, draw_control) if f"control:{EDGES}" in pipe.manifest.parts else ()
        clear = (draw_transparent, draw_layers) if "transparent_unet" in pipe.manifest.parts else ()
        for draw in (draw_prompt, draw_plan, draw_map, draw_spot, draw_inpaint, draw_fan, *steered, *clear):
            panels.append(draw(pipe, panels))
            report(f"{panels[-1].caption}: {panels[-1].seconds:.1f} s")
    if model is None:
        with Pipeline.load(convert_tiny(out / "model-lcm", report, lcm=True), options) as pipe:
            panels.append(draw_lcm(pipe, panels))
            report(f"{panels[-1].caption}: {panels[-1].seconds:.1f} s")
    paths = [out / f"{index}-{panel.name}.png" for index, panel in enumerate(panels, 1)]
    for path, panel in zip(paths, panels, strict=True):
        save_png(path, panel.pixels, overwrite=True)
    sheet = out / "contact-sheet.png"
    save_png(sheet, contact_sheet(panels), overwrite=True)
    return [sheet, *paths]


def convert_tiny(folder: Path, report: Report, *, lcm: bool = False) -> Path:
    """Convert the embedded family into `folder`, replacing what an earlier demo left there.

    lcm: with its LCM-LoRA merged, and without the networks for control and transparency.
    """
    from glassine.convert.control import Control as ControlFile
    from glassine.convert.control import control_networks
    from glassine.convert.extras import Extras
    from glassine.convert.folder import ConvertOptions, convert_checkpoint
    from glassine.convert.imports import import_coremltools_quietly_later
    from glassine.convert.lora import LoraFile
    from glassine.convert.transparency import TransparentFile, transparent_networks

    start = time.perf_counter()
    import_coremltools_quietly_later()
    nets = partial(control_networks, [ControlFile(FAMILY / "tiny_control_canny.safetensors", name=EDGES)])
    files = [
        TransparentFile(path=FAMILY / f"tiny_transparent_{name}.safetensors") for name in ("attn", "decoder", "encoder")
    ]
    further = (nets, partial(transparent_networks, files))
    options = ConvertOptions(attention="einsum", layout="channels_last", overwrite=True, further=further)
    if lcm:
        loras = Extras(loras=(LoraFile(FAMILY / "tiny_lcm_lora.safetensors"),))
        options = ConvertOptions(attention="einsum", layout="channels_last", overwrite=True, extras=loras)
    convert_checkpoint(TINY, folder, options)
    name = "with its LCM-LoRA" if lcm else "converted"
    report(f"the embedded tiny model, {name}: {time.perf_counter() - start:.1f} s")
    return folder


def draw_prompt(pipe: Pipeline, _: list[Panel]) -> Panel:
    """Text to image."""
    return _timed("prompt", f'"{PROMPT}"', lambda: pipe(PROMPT, seed=2, **SETTINGS))


def draw_plan(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """What the ramp will change when."""
    return _timed("plan", "a change map: how many of 20 steps may touch what", lambda: _plan(RAMP, panels[0].pixels))


def draw_map(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """The first picture again: kept at the left, free at the right."""
    return _timed(
        "map", f'with it: "{OTHER}"', lambda: pipe(OTHER, image=panels[0].pixels, change_map=RAMP, seed=12, **SETTINGS)
    )


def draw_spot(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """What the soft hole will change when."""
    return _timed("spot", "a soft hole; the rest stays byte for byte", lambda: _plan(SPOT, panels[0].pixels))


def draw_inpaint(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """A soft hole in the corner of the first picture, filled."""
    return _timed(
        "inpaint",
        f'in the hole: "{INSIDE}"',
        lambda: pipe(INSIDE, image=panels[0].pixels, change_map=SPOT, seed=5, **SETTINGS),
    )


def draw_fan(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """The first picture in columns, each with more strength than the one before."""
    width, height = pipe.size
    strips = columns(width, 8)
    ramp = fan_map(strips, height)

    def draw() -> NDArray[np.uint8]:
        pixels = pipe(OTHER, image=panels[0].pixels, change_map=ramp, seed=12, **SETTINGS)
        return label(pixels, strips, "approximate: one run")

    return _timed("fan", f'a strength fan, 0 to 1: "{OTHER}"', draw)


def draw_edges(pipe: Pipeline, _: list[Panel]) -> Panel:
    """A drawing's edges: a star where the prompt alone would hardly put it."""
    from glassine.runtime.preprocess import Preprocess, hint

    width, height = pipe.size
    points = np.arange(10)
    angles, reach = points * np.pi / 5 - 1.27, np.where(points % 2, 0.105, 0.234) * min(pipe.size)
    corners = zip(0.68 * width + reach * np.cos(angles), 0.35 * height + reach * np.sin(angles), strict=True)
    drawing = Image.new("RGB", pipe.size)
    ImageDraw.Draw(drawing).polygon(list(corners), fill="white")
    return _timed(
        "edges", "a drawn hint: the edges of a star", lambda: hint(drawing, pipe.size, Preprocess(name="canny")).pixels
    )


def draw_control(pipe: Pipeline, panels: list[Panel]) -> Panel:
    """The edges decide where the shape goes."""
    controls = [Control(EDGES, panels[-1].pixels)]
    return _timed("control", f'with them: "{STEERED}"', lambda: pipe(STEERED, seed=4, controls=controls, **SETTINGS))


def draw_transparent(pipe: Pipeline, _: list[Panel]) -> Panel:
    """A picture with an alpha channel."""
    return _timed("transparent", f'with alpha: "{ALONE}"', lambda: pipe(ALONE, seed=3, transparent=True, **SETTINGS))


def draw_layers(_: Pipeline, panels: list[Panel]) -> Panel:
    """The transparent picture over another one."""
    layers = [opaque(panels[FILLED].pixels), panels[-1].pixels]
    return _timed("layers", "laid over the filled picture", lambda: over(layers))


def draw_lcm(pipe: Pipeline, _: list[Panel]) -> Panel:
    """Text to image in four steps."""
    settings = {**SETTINGS, "steps": 4, "guidance_scale": 1.0, "sampler": "lcm"}
    return _timed("lcm", f'four LCM steps: "{PROMPT}"', lambda: pipe(PROMPT, seed=2, **settings))


def contact_sheet(panels: list[Panel]) -> NDArray[np.uint8]:
    """Lay the panels out with captions; (H, W, 3) uint8."""
    rows = -(-len(panels) // COLUMNS)
    size = (COLUMNS * CELL + (COLUMNS + 1) * GAP, rows * (CELL + HEAD) + (rows + 1) * GAP)
    sheet = Image.new("RGB", size, "white")
    write = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        x, y = GAP + column * (CELL + GAP), GAP + row * (CELL + HEAD + GAP)
        words = textwrap.wrap(f"{panel.caption} ({panel.seconds:.1f} s)", 42)
        write.multiline_text((x, y + HEAD - 6), "\n".join(words), fill="black", font=font, anchor="ld")
        picture = ImageOps.contain(Image.fromarray(_shown(panel.pixels)), (CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + HEAD))
    return np.asarray(sheet)


def _shown(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A transparent picture over a checkerboard, any other as it is."""
    height, width, channels = pixels.shape
    return flatten(pixels, checkerboard(width, height)) if channels == 4 else pixels


def _plan(words: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    steps = SETTINGS["steps"]
    sigmas = sigmas_of(STABLE_DIFFUSION, Request(steps=steps))
    return render(n_table(to_cells(parse(words, width, height)), sigmas), steps, pixels)


def _timed(name: str, caption: str, draw: Callable[[], NDArray[np.uint8]]) -> Panel:
    start = time.perf_counter()
    pixels = draw()
    return Panel(name, caption, pixels, time.perf_counter() - start)
