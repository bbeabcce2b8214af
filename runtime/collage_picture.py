"""A picture of what a collage will do, before anything is drawn.

the composite | what is seen of each layer, in its colour | how many steps may change what
below: the prompt, words in the colour of their layer; each layer with its strengths and its tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from glassine.runtime import map_picture
from glassine.runtime.change_map import n_table, to_cells
from glassine.runtime.collage import Arranged, Collage, arrange
from glassine.runtime.collage_inputs import columns_of
from glassine.runtime.request import Request
from glassine.runtime.run import sigmas_of
from glassine.runtime.schedule import last_steps
from glassine.runtime.token_spans import PromptTokens

if TYPE_CHECKING:
    from glassine.runtime.pipeline import Pipeline

Bytes = NDArray[np.uint8]

# Okabe and Ito's colours, told apart also without colour vision; the background is grey.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (0, 114, 178), (213, 94, 0), (240, 228, 66))
_BEHIND = (225, 225, 225)
_PANEL, _GAP, _LINE = 384, 12, 20  # pixels
_INK = (20, 20, 20)


def render(pipe: Pipeline, collage: Collage, request: Request) -> Bytes:
    """Return the sheet, (H, W, 3) uint8; no network runs.

    Raises:
        RequestError: as `collage.arrange`, or words that are not in the prompt.
    """
    arranged = arrange(collage, *pipe.size)
    tokens = PromptTokens.of(pipe.tokenizer, request.prompt, pipe.manifest.tokens)
    columns = columns_of(tokens, arranged.layers)
    sigmas = last_steps(sigmas_of(pipe.schedule, request), request.strength)
    n = n_table(to_cells(arranged.change), sigmas, request.rule, total=request.steps, schedule=pipe.schedule)
    panels = [arranged.pixels, _seen(arranged), map_picture.render(n, len(sigmas) - 1, arranged.pixels)]
    return _sheet(panels, arranged, tokens, columns)


def _seen(arranged: Arranged) -> Bytes:
    """Every layer in its colour, in the share in which it is seen, over a faint composite."""
    colours = np.array([_COLOURS[i % len(_COLOURS)] for i in range(len(arranged.layers))], np.float32)
    behind = 1 - arranged.visible.sum(axis=0)
    mixed = np.tensordot(arranged.visible, colours, axes=(0, 0)) + behind[..., None] * np.array(_BEHIND, np.float32)
    return np.asarray(np.rint(np.clip(0.8 * mixed + 0.2 * arranged.pixels, 0, 255)), np.uint8)


def _sheet(panels: list[Bytes], arranged: Arranged, tokens: PromptTokens, columns: list[tuple[int, ...]]) -> Bytes:
    pictures = [Image.fromarray(panel) for panel in panels]
    pictures = [
        picture.resize((_PANEL, round(picture.height * _PANEL / picture.width)), Image.Resampling.LANCZOS)
        for picture in pictures
    ]
    width = len(pictures) * (_PANEL + _GAP) + _GAP
    font = ImageFont.load_default(size=13)
    words = _words(tokens, columns, font, width - 2 * _GAP)
    top = max(picture.height for picture in pictures) + 2 * _GAP
    rows = words[-1][1] + 1 if words else 0
    sheet = Image.new("RGB", (width, top + (rows + len(arranged.layers)) * _LINE + 2 * _GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (_GAP + i * (_PANEL + _GAP), _GAP))
    draw = ImageDraw.Draw(sheet)
    for x, row, word, colour in words:
        at = (_GAP + x, top + row * _LINE)
        if colour is not None:
            draw.rectangle([at[0] - 2, at[1] + 16, at[0] + font.getlength(word) + 1, at[1] + 18], fill=colour)
        draw.text(at, word, fill=_INK, font=font)
    for i, own in enumerate(columns):
        y = top + (rows + i) * _LINE + _GAP
        draw.rectangle([_GAP, y + 3, _GAP + 12, y + 15], fill=_COLOURS[i % len(_COLOURS)])
        draw.text((_GAP + 20, y), _line(arranged, i, own), fill=_INK, font=font)
    return np.asarray(sheet)


def _line(arranged: Arranged, index: int, columns: tuple[int, ...]) -> str:
    """One layer in words."""
    said = arranged.strengths[index]
    words = f"tokens {', '.join(map(str, columns))}, attract {said.attract:.2f}, repel {said.repel:.2f}, "
    rest = f"change {said.change:.2f}, control {said.control:.2f}, seen on {arranged.visible[index].mean():.0%}"
    return f"{arranged.layers[index].name}: {words if columns else ''}{rest}"


def _words(
    tokens: PromptTokens, columns: list[tuple[int, ...]], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[tuple[float, int, str, tuple[int, int, int] | None]]:
    """Every piece of the prompt: where it is written (pixels, row), and the colour of the layer that it belongs to."""
    placed: list[tuple[float, int, str, tuple[int, int, int] | None]] = []
    x, row, end = 0.0, 0, 0
    for place in tokens.places:
        word = tokens.text[place.start : place.end]
        x += font.getlength(" ") if place.start > end else 0
        if x + font.getlength(word) > width:
            x, row = 0.0, row + 1
        owner = next((i for i, own in enumerate(columns) if own and set(place.columns) & set(own)), None)
        placed.append((x, row, word, None if owner is None else _COLOURS[owner % len(_COLOURS)]))
        x, end = x + font.getlength(word), place.end
    return placed
