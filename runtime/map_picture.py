"""A picture of the n-table over the source: what a change map will do, before anything is drawn.

the source in grey, tinted where it may change: from blue (one evaluation) to yellow (all of them);
a white line around what is kept; below, a scale with the numbers of evaluations
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from glassine.runtime.change_map import CELL

Bytes = NDArray[np.uint8]

# From dark to light as well as from blue to yellow, so that it also reads without colour vision.
_RAMP = np.array([(38, 52, 140), (62, 104, 174), (66, 151, 160), (104, 190, 122), (176, 214, 82), (253, 231, 60)])
_TINT = 0.62
_STRIP = 56  # pixels of the scale below the picture
_INK, _FAINT = (20, 20, 20), (150, 150, 150)


def render(n: NDArray[np.integer[Any]], steps: int, pixels: Bytes) -> Bytes:
    """Return the source (H, W, 3) uint8 tinted by n, over a labelled scale: (H + scale, W, 3) uint8.

    Args:
        n: (1, 1, h, w) evaluations that may touch each cell; h = H / 8, w = W / 8.
        steps: S, the evaluations of the run.
        pixels: (H, W, 3) uint8, the source.
    """
    cells = n[0, 0].repeat(CELL, axis=0).repeat(CELL, axis=1)
    grey = (pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    colours = _colours(steps)
    tinted = (1 - _TINT) * (0.25 * 255 + 0.75 * grey) + _TINT * colours[cells]
    picture = np.where(cells[..., None] > 0, tinted, 0.35 * 255 + 0.65 * grey)
    picture[_edges(cells)] = 255
    sheet = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + _STRIP), "white")
    sheet.paste(Image.fromarray(picture.round().astype(np.uint8)), (0, 0))
    _draw_scale(sheet, colours, n, steps, top=pixels.shape[0])
    return np.asarray(sheet)


def _colours(steps: int) -> NDArray[np.float64]:
    """(steps + 1, 3): one colour for each n; 0 is the grey of what stays."""
    at = np.linspace(0, len(_RAMP) - 1, max(steps, 1))
    ramp = np.stack([np.interp(at, np.arange(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)], axis=1)
    return np.concatenate([[(200, 200, 200)], ramp])


def _edges(cells: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Pixels at the border of what may change and what may not: the line that matters most."""
    live = cells > 0
    edges = np.zeros_like(live)
    edges[:, 1:] |= live[:, 1:] != live[:, :-1]
    edges[1:, :] |= live[1:, :] != live[:-1, :]
    return edges


def _draw_scale(
    sheet: Image.Image, colours: NDArray[np.float64], n: NDArray[np.integer[Any]], steps: int, top: int
) -> None:
    """One box for each n from 0 to S, a bar over those that occur, and a sentence."""
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    left, right = 8, sheet.width - 8
    edges = np.linspace(left, right, steps + 2).round().astype(int).tolist()
    share = np.bincount(n.ravel(), minlength=steps + 1) / n.size
    every = -(-(len(str(steps)) * 7 + 6) * (steps + 1) // (right - left))  # numbers must not run into each other
    for k, (x0, x1) in enumerate(itertools.pairwise(edges)):
        colour = (int(colours[k, 0]), int(colours[k, 1]), int(colours[k, 2]))
        ink = _INK if share[k] > 0 else _FAINT
        draw.rectangle([x0, top + 10, max(x0, x1 - 1), top + 24], fill=colour)
        if share[k] > 0:
            draw.rectangle([x0, top + 6, max(x0, x1 - 1), top + 8], fill=_INK)
        if k in (0, steps) or (k % every == 0 and k + every <= steps):
            draw.text(((x0 + x1) / 2, top + 31), str(k), fill=ink, font=font, anchor="mm")
    full = share[steps] if steps > 0 else 0.0
    shares = f"0 (kept): {share[0]:.0%}, some: {share[1:steps].sum():.0%}, all {steps}: {full:.0%}"
    words = f"evaluations that may change a cell   {shares}"
    fits = font.getlength(words) <= right - left
    draw.text((left, top + 47), words if fits else shares, fill=_INK, font=font, anchor="lm")
