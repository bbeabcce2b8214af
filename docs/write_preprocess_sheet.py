"""Write docs/preprocess.png, what each preprocessor makes of a drawing: `python docs/write_preprocess_sheet.py`."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from glassine.runtime.preprocess import Preprocess, hint
from glassine.runtime.preprocess.pose import draw

SIDE, BORDER, LINE = 192, 8, 18
SHOWN = (
    "none", "canny", "scribble", "lineart", "threshold", "invert",
    "luminance", "blur,sigma=5", "grid,cell=24", "shuffle", "inpaint", "pose",
)  # fmt: skip


def scene() -> np.ndarray:
    """Return a house on a hill under a sun, (192, 192, 3) uint8, drawn four times as large and averaged down."""
    size = 4 * SIDE
    y, x = np.mgrid[:size, :size] / size
    canvas = np.stack([150 + 80 * y, 185 + 50 * y, 235 + 0 * y], axis=-1)
    canvas[(x - 0.78) ** 2 + (y - 0.2) ** 2 < 0.012] = (255, 214, 110)
    canvas[y > 0.55 + 0.06 * np.sin(5 * x)] = (120, 160, 95)
    canvas[y > 0.72 + 0.05 * np.sin(4 * x + 2)] = (86, 130, 72)
    canvas[(np.abs(x - 0.4 - 0.1 * np.sin(6 * y)) < 0.5 * (y - 0.62)) & (y > 0.66)] = (205, 185, 150)
    pixels = canvas.astype(np.uint8)
    for corners, colour in (
        ([(0.22, 0.66), (0.22, 0.44), (0.58, 0.44), (0.58, 0.66)], (232, 222, 200)),
        ([(0.17, 0.45), (0.40, 0.24), (0.63, 0.45)], (176, 74, 56)),
        ([(0.36, 0.66), (0.36, 0.53), (0.44, 0.53), (0.44, 0.66)], (94, 66, 50)),
        ([(0.26, 0.57), (0.26, 0.50), (0.32, 0.50), (0.32, 0.57)], (70, 110, 150)),
        ([(0.48, 0.57), (0.48, 0.50), (0.54, 0.50), (0.54, 0.57)], (70, 110, 150)),
    ):
        shape = (np.array(corners) * size).astype(np.int32)
        cv2.fillPoly(pixels, [shape], colour)
        cv2.polylines(pixels, [shape], True, (48, 36, 32), 6, cv2.LINE_AA)
    return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def someone() -> np.ndarray:
    """Return a person's 18 points, waving."""
    points = [
        (48, 22), (48, 34), (38, 35), (30, 48), (26, 62), (58, 34), (70, 26), (76, 12), (42, 60), (41, 76), (40, 92),
        (54, 60), (56, 76), (58, 92), (45, 19), (51, 19), (42, 21), (54, 21),
    ]  # fmt: skip
    return np.array(points) / 96


def panel(words: str, picture: np.ndarray) -> np.ndarray:
    """Return the map that `words` make of the picture."""
    if words == "pose":
        return draw([someone()], (SIDE, SIDE))
    mask = None
    if words == "inpaint":
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[84:127, 42:112] = 255
    return hint(picture, (SIDE, SIDE), Preprocess.read(words), mask=mask).pixels


def sheet() -> Image.Image:
    """Return all of them with their names, six in a row."""
    across, down = 6, -(-len(SHOWN) // 6)
    step = (SIDE + BORDER, SIDE + BORDER + LINE)
    page = Image.new("RGB", (across * step[0] + BORDER, down * step[1] + BORDER), "white")
    pen, font, picture = ImageDraw.Draw(page), ImageFont.load_default(13), scene()
    for index, words in enumerate(SHOWN):
        corner = (BORDER + index % across * step[0], BORDER + index // across * step[1])
        page.paste(Image.fromarray(panel(words, picture)), (corner[0], corner[1] + LINE))
        pen.text(corner, words.replace(",", " "), fill="black", font=font)
    return page


if __name__ == "__main__":
    sheet().save(Path(__file__).parent / "preprocess.png", optimize=True)
