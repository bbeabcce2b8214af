"""Body poses: people as the 18 points of OpenPose, and their drawing, exactly as the pose net was trained to see it.

Points come from an OpenPose JSON file, from a network of the user's that gives heat maps, or from macOS (`vision.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, RequestError
from glassine.runtime.engine import EngineOptions
from glassine.runtime.image import Bytes
from glassine.runtime.preprocess.network import open_network

# A person: 18 rows (x, y), shares of the picture's width and height, NaN where a point is not seen. The rows: nose,
# neck, right shoulder, elbow, wrist, the left ones, right hip, knee, ankle, the left ones, right eye, left, right ear,
# left.
Person = NDArray[np.float64]

_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
_HALF_WIDTH = 4  # pixels, of a limb; also the radius of a joint
# Where others keep our 18 points; None: the neck, which COCO lacks, is the middle of the shoulders.
_BODY_25 = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)
_COCO_17 = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


def pose(pixels: Bytes, *, model: Path | None, engine: EngineOptions | None, score: float) -> Bytes:
    """Draw the people in a picture, (H, W, 3) uint8, or those of a JSON file.

    Args:
        model: keypoints as FILE.json, a network as FILE.onnx or FILE.mlpackage; None asks macOS.
        score: points the finder is less sure of than this are left out, 0 to 1.

    Raises:
        RequestError: the JSON file is not OpenPose's, or there is nobody in the picture.
        MissingDependency: this is not a Mac and no model was given, or a library is missing.
    """
    height, width = pixels.shape[:2]
    if model is None:
        from glassine.runtime.preprocess.vision import find_people

        people, source = find_people(pixels, score), "the picture"
    elif model.suffix == ".json":
        people, source = read_people(model, (width, height), score), str(model)
    else:
        heat = open_network(model, engine)(pixels, normal="imagenet")
        people, source = [_from_heat(heat, score, str(model))], "the picture"
    people = [person for person in people if np.isfinite(person).any()]
    if not people:
        raise RequestError(f"pose: nobody was found in {source}; expected at least one point with a score of {score:g}")
    return draw(people, (width, height))


def draw(people: Sequence[Person], size: tuple[int, int]) -> Bytes:
    """Draw people on black, (height, width, 3) uint8: limbs at 0.6 of their colour, then joints.

    A limb is an ellipse as long as the limb and 8 pixels wide, a joint a disc of radius 4. Source: ControlNet 1.1.
    """
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    for person in people:
        points = person * size
        for (a, b), colour in zip(_LIMBS, _COLOURS, strict=False):
            if np.isfinite(points[[a, b]]).all():
                _limb(canvas, points[a], points[b], colour)
        for point, colour in zip(points, _COLOURS, strict=True):
            if np.isfinite(point).all():
                cv2.circle(canvas, (int(point[0]), int(point[1])), _HALF_WIDTH, colour, thickness=-1)
    return canvas


def _limb(canvas: Bytes, a: NDArray[np.float64], b: NDArray[np.float64], colour: tuple[int, int, int]) -> None:
    middle, along = (a + b) / 2, a - b
    length, angle = math.hypot(*along), math.degrees(math.atan2(along[1], along[0]))
    axes = (int(length / 2), _HALF_WIDTH)
    ellipse = np.array(cv2.ellipse2Poly((int(middle[0]), int(middle[1])), axes, int(angle), 0, 360, 1))
    cv2.fillConvexPoly(canvas, ellipse, [int(channel * 0.6) for channel in colour])


def read_people(path: Path, size: tuple[int, int], score: float = 0.3) -> list[Person]:
    """Read an OpenPose JSON file: "people", each with "pose_keypoints_2d" of 18 or 25 times (x, y, score).

    Args:
        size: (width, height) of the picture that x and y are pixels of, unless the file has "canvas_width" and
            "canvas_height"; coordinates that are all at most 1 are shares already.
        score: points below it, and those with score 0, are not seen.

    Raises:
        RequestError: the file cannot be read, or is of another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as JSON ({error}); expected a file as OpenPose writes it") from None
    if isinstance(content, list) and len(content) == 1:
        content = content[0]  # one picture of a batch, as the A1111 extension writes it
    try:
        if "canvas_width" in content:
            size = (int(content["canvas_width"]), int(content["canvas_height"]))
        rows = [_rows(person["pose_keypoints_2d"]) for person in content["people"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{path}: is no OpenPose file ({type(error).__name__}: {error}); expected "
            '{"people": [{"pose_keypoints_2d": [x, y, score, ...]}]} with 18 or 25 points a person'
        ) from None
    largest = max((float(row[:, :2].max()) for row in rows), default=0.0)
    unit = (1, 1) if largest <= 1 else size
    if min(unit) <= 0:
        raise RequestError(f"{path}: the canvas is {size[0]}x{size[1]}, expected its size in pixels")
    return [np.where(row[:, 2:] >= max(score, 1e-6), row[:, :2] / unit, np.nan) for row in rows]


def _rows(numbers: Any) -> NDArray[np.float64]:
    flat = np.asarray(numbers if numbers is not None else [], np.float64)
    if flat.size == 0:
        return np.zeros((18, 3))
    rows = flat.reshape(-1, 3)
    if len(rows) not in (18, 25) or not np.isfinite(rows).all():
        raise ValueError(f"{len(rows)} points")
    return rows[list(_BODY_25)] if len(rows) == 25 else rows


def _from_heat(heat: NDArray[np.float32], score: float, name: str) -> Person:
    """Return one person from heat maps (points, h, w): COCO's 17, or OpenPose's 18 with or without background."""
    if len(heat) not in (17, 18, 19):
        raise EngineError(
            f"{name}: its output has {len(heat)} channels, expected a heat map a point: COCO's 17 or OpenPose's 18"
        )
    height, width = heat.shape[1:]
    best = heat.reshape(len(heat), -1)
    y, x = np.divmod(best.argmax(axis=1), width)
    points = np.stack([(x + 0.5) / width, (y + 0.5) / height], axis=-1)
    points[best.max(axis=1) < score] = np.nan
    return points[:18] if len(heat) > 17 else from_coco(points)


def from_coco(points: NDArray[np.float64]) -> Person:
    """Return COCO's 17 points (x, y) as OpenPose's 18."""
    neck = points[[5, 6]].mean(axis=0)
    return np.stack([neck if index is None else points[index] for index in _COCO_17])
