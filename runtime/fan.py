"""The strength fan: one picture in columns of rising strength, to see which strength is wanted.

One run draws all columns at once through a change map; they see each other through attention and normalisation, so
it is an approximation and says so. The exact fan makes one run a column and shares what can be shared exactly: the
source's latents, the prompts' encodings and the noise. Source: Differential Diffusion, section 4.3 (arXiv 2306.00950).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from glassine.errors import RequestError
from glassine.runtime.inputs import Inputs
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import Result, Run

Bytes = NDArray[np.uint8]
CELL = 8
_STRIP = 28  # pixels of the caption below the columns


class Column(NamedTuple):
    """One column: its strength in [0, 1] and its pixels [left, right), multiples of a latent cell."""

    strength: float
    left: int
    right: int


def columns(width: int, count: int) -> list[Column]:
    """Divide `width` pixels into `count` columns of strength 0 to 1.

    Raises:
        RequestError: fewer than two columns, or columns narrower than a latent cell.
    """
    if not 2 <= count <= width // CELL:
        raise RequestError(f"a fan of {count} columns: expected 2 to {width // CELL} for {width} pixels")
    edges = [round(i * width / count / CELL) * CELL for i in range(count + 1)]
    return [Column(i / (count - 1), edges[i], edges[i + 1]) for i in range(count)]


def fan_map(fan: list[Column], height: int) -> NDArray[np.float32]:
    """Return the change map of a fan: (height, width) float32."""
    row = np.concatenate([np.full(column.right - column.left, column.strength, np.float32) for column in fan])
    return np.tile(row, (height, 1))


def approximate_fan(pipe: Pipeline, request: Request, inputs: Inputs, fan: list[Column]) -> Run:
    """Prepare the one run that draws all columns."""
    _expect_image(inputs)
    return pipe.run(request, dataclasses.replace(inputs, change_map=fan_map(fan, pipe.size[1])))


def exact_fan(pipe: Pipeline, request: Request, inputs: Inputs, fan: list[Column]) -> Iterator[tuple[Column, Run]]:
    """Prepare one run a column: the whole picture at the column's strength."""
    _expect_image(inputs)
    width, height = pipe.size
    for column in fan:
        uniform = np.full((height, width), column.strength, np.float32)
        yield column, pipe.run(request, dataclasses.replace(inputs, change_map=uniform))


def assemble(parts: list[tuple[Column, Result]]) -> Bytes:
    """Cut each column out of its own picture: (H, W, 3) uint8."""
    return np.concatenate([result.pixels[:, column.left : column.right] for column, result in parts], axis=1)


def label(pixels: Bytes, fan: list[Column], words: str) -> Bytes:
    """Write the strengths below the columns, and below them what kind of fan this is."""
    height, width = pixels.shape[:2]
    sheet = Image.new("RGB", (width, height + 2 * _STRIP), "white")
    sheet.paste(Image.fromarray(pixels), (0, 0))
    write = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for column in fan:
        middle = ((column.left + column.right) / 2, height + _STRIP / 2)
        write.text(middle, f"{column.strength:.2f}", fill="black", font=font, anchor="mm")
        write.line([(column.left, height), (column.left, height + 6)], fill="black")
    write.text((width / 2, height + 1.5 * _STRIP), words, fill="gray", font=font, anchor="mm")
    return np.asarray(sheet)


def _expect_image(inputs: Inputs) -> None:
    if inputs.image is None:
        raise RequestError("a strength fan shows how much of a picture changes; give the picture (--image)")
