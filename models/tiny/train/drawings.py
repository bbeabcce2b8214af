"""Drawings that never end: parameters sampled up front, pictures rendered on the device where they are needed.

A shape is an outline; its signed distance field is computed once and every drawing samples it, scaled and turned. All
lengths are fractions of the picture's side, so the same drawing can be rendered at any size. Colours are straight sRGB
in [0, 1]; the picture is alpha-composited without gamma, as everywhere in Glassine.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "crescent", "cross", "diamond", "flower")
COLOURS = {
    "red": (0.86, 0.14, 0.14), "orange": (0.98, 0.55, 0.08), "yellow": (0.98, 0.88, 0.16), "green": (0.14, 0.62, 0.26),
    "cyan": (0.22, 0.82, 0.86), "blue": (0.14, 0.30, 0.86), "purple": (0.50, 0.18, 0.70), "pink": (0.98, 0.56, 0.76),
    "white": (0.96, 0.96, 0.96), "black": (0.07, 0.07, 0.07),
}  # fmt: skip
MATERIALS = ("solid", "glass", "glowing")
BACKGROUNDS = ("plain", "gradient", "striped", "dotted", "checkered")
SIZES = {"small": (0.15, 0.18), "medium": (0.21, 0.26), "big": (0.30, 0.35)}  # radius / side
ANGLES = (0, 45, 90, 135)  # of stripes, dots, gradients: 0 varies along x
FIELD = 1.6  # a distance field covers [-FIELD, FIELD] squared, in radii
TEXELS = 256


class Drawings(NamedTuple):
    """The parameters of N drawings of one or two objects: one row a drawing, objects in the second axis."""

    shape: Tensor  # (N, 2) index into SHAPES
    colour: Tensor  # (N, 2) index into COLOURS
    material: Tensor  # (N, 2) index into MATERIALS
    present: Tensor  # (N, 2) 1.0 where there is an object
    size: Tensor  # (N, 2) index into SIZES
    place: Tensor  # (N, 2, 2) -1, 0, 1: left/top, centre, right/bottom
    radius: Tensor  # (N, 2) / side
    centre: Tensor  # (N, 2, 2) x, y / side
    turn: Tensor  # (N, 2) radians
    rgb: Tensor  # (N, 2, 3)
    kind: Tensor  # (N,) index into BACKGROUNDS
    ground: Tensor  # (N,) index into COLOURS: the background's colour
    angle: Tensor  # (N,) index into ANGLES
    period: Tensor  # (N,) / side
    phase: Tensor  # (N, 2) in periods
    tones: Tensor  # (N, 2, 3) the background's two colours

    def take(self, rows: Tensor | slice) -> Drawings:
        """Return the drawings of these rows."""
        return Drawings(*(column[rows] for column in self))

    def to(self, device: torch.device | str) -> Drawings:
        """Return the drawings on another device."""
        return Drawings(*(column.to(device) for column in self))


def sample(count: int, seed: int, *, solid: float = 0.7, single: float = 0.85) -> Drawings:
    """Draw the parameters of `count` drawings.

    Args:
        solid: share of objects of plain material; the rest is glass and glow in halves.
        single: share of drawings with one object.
    """
    rng = np.random.default_rng(seed)
    colours = len(COLOURS)
    # Object 0, object 1 and the background never share a colour.
    ground = rng.integers(colours, size=count)
    colour = (ground[:, None] + rng.permuted(np.tile(np.arange(1, colours), (count, 1)), axis=1)[:, :2]) % colours
    present = np.ones((count, 2), np.float32)
    present[:, 1] = rng.random(count) >= single
    material = np.where(rng.random((count, 2)) < solid, 0, rng.integers(1, 3, size=(count, 2)))
    size, place = _layout(rng, present[:, 1] > 0)
    low, high = np.array(list(SIZES.values())).T
    radius = low[size] + (high - low)[size] * rng.random((count, 2))
    room = 0.5 - 1.08 * radius[..., None]
    centre = 0.5 + room * (place * rng.uniform(0.8, 1.0, place.shape) + (place == 0) * rng.normal(0, 0.06, place.shape))
    palette = np.array(list(COLOURS.values()))
    rgb = palette[colour] + rng.normal(0, 0.02, (count, 2, 3))
    kind = rng.integers(len(BACKGROUNDS), size=count)
    base = palette[ground] + rng.normal(0, 0.02, (count, 3))
    dark = base @ np.array([0.3, 0.59, 0.11]) < 0.6
    second = np.where(dark[:, None], base + (1 - base) * 0.32, base * 0.76)
    return Drawings(
        shape=_ints(rng.integers(len(SHAPES), size=(count, 2))),
        colour=_ints(colour),
        material=_ints(material),
        present=_floats(present),
        size=_ints(size),
        place=_ints(place),
        radius=_floats(radius),
        centre=_floats(centre),
        turn=_floats(rng.uniform(-0.2, 0.2, (count, 2))),
        rgb=_floats(rgb.clip(0, 1)),
        kind=_ints(kind),
        ground=_ints(ground),
        angle=_ints(rng.integers(len(ANGLES), size=count)),
        period=_floats(rng.uniform(0.16, 0.26, count)),
        phase=_floats(rng.random((count, 2))),
        tones=_floats(np.stack([base, second], axis=1).clip(0, 1)),
    )


def _layout(rng: np.random.Generator, pair: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (N, 2) sizes and (N, 2, 2) places: anywhere for one object, opposite sides for a pair."""
    count = len(pair)
    size = rng.integers(3, size=(count, 2))
    size[pair] = rng.integers(2, size=(int(pair.sum()), 2))
    place = rng.integers(-1, 2, size=(count, 2, 2))
    place[rng.random(count) < 0.3, 0] = 0  # the middle is the most usual place
    axis = rng.integers(2, size=count)
    side = rng.choice(np.array([-1, 1]), size=count)
    for row in np.flatnonzero(pair):
        place[row] = 0
        place[row, :, axis[row]] = side[row], -side[row]
    return size, place


def _ints(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int64))


def _floats(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def render(drawings: Drawings, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Render pictures, and their objects alone.

    Returns:
        picture (N, 3, size, size); rgb (N, 3, size, size), the objects' straight colour, which goes on under
        transparent pixels; alpha (N, 1, size, size); all in [0, 1].
    """
    device = drawings.radius.device
    axis = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y], dim=-1)  # (size, size, 2)
    rgb, alpha = _object(drawings, 0, points, size)
    rgb1, alpha1 = _object(drawings, 1, points, size)
    over = alpha1 + alpha * (1 - alpha1)
    rgb = torch.where(over > 1e-4, (rgb1 * alpha1 + rgb * alpha * (1 - alpha1)) / over.clamp(min=1e-4), rgb)
    ground = _background(drawings, points, size)
    return ground + (rgb - ground) * over, rgb, over


def _object(drawings: Drawings, which: int, points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the straight colour (N, 3, s, s) and the alpha (N, 1, s, s) of one object a drawing."""
    radius = drawings.radius[:, which, None, None]
    turn = drawings.turn[:, which, None, None]
    offset = (points[None] - drawings.centre[:, which, None, None, :]) / radius[..., None]
    cos, sin = torch.cos(turn), torch.sin(turn)
    local = torch.stack([offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin], -1)
    fields = _fields(str(points.device))[drawings.shape[:, which]]
    distance = F.grid_sample(fields, local / FIELD, padding_mode="border", align_corners=False)[:, 0]  # in radii
    cover = (0.5 - distance * radius * size).clamp(0, 1)

    light = -(0.5 * offset[..., 0] + 0.8 * offset[..., 1])  # the light comes from the top left
    rgb = (drawings.rgb[:, which, :, None, None] + 0.09 * light.clamp(-1, 1)[:, None]).clamp(0, 1)
    shine = torch.exp(-((offset[..., 0] + 0.3) ** 2 + (offset[..., 1] + 0.35) ** 2) / 0.04)
    glass = cover * (0.38 + 0.52 * torch.exp(distance / 0.07) + 0.3 * shine).clamp(max=0.95)
    glow = torch.maximum(cover, 0.75 * (1 - distance.clamp(min=0) / 0.55).clamp(min=0) ** 2)
    material = drawings.material[:, which, None, None]
    alpha = torch.where(material == 0, cover, torch.where(material == 1, glass, glow))
    white = torch.where(
        material == 1, 0.8 * shine, torch.where(material == 2, 0.45 * (-distance / 0.5).clamp(0, 1), 0.0)
    )
    rgb = rgb + (1 - rgb) * white[:, None]
    return rgb, (alpha * drawings.present[:, which, None, None])[:, None]


def _background(drawings: Drawings, points: Tensor, size: int) -> Tensor:
    """Return (N, 3, s, s): plain, gradient, stripes, dots or checks of two tones."""
    period = drawings.period[:, None, None]
    theta = (drawings.angle * (torch.pi / len(ANGLES)))[:, None, None]
    x, y = points[None, ..., 0] - 0.5, points[None, ..., 1] - 0.5
    u = x * torch.cos(theta) + y * torch.sin(theta)
    v = y * torch.cos(theta) - x * torch.sin(theta)

    def wave(along: Tensor, phase: Tensor) -> Tensor:
        # Signed distance in pixels to the nearest border of a stripe half a period wide.
        turns = along / period + phase[:, None, None]
        return (0.25 - (turns - turns.floor() - 0.5).abs()) * period * size

    a, b = wave(u, drawings.phase[:, 0]), wave(v, drawings.phase[:, 1])
    middle = period * size * 0.25
    dots = 0.62 * 2 * middle - torch.sqrt((middle - a) ** 2 + (middle - b) ** 2)
    checks = torch.minimum(a.abs(), b.abs()) * torch.sign(a) * torch.sign(b)
    kind = drawings.kind[:, None, None]
    edge = torch.where(kind == 2, a, torch.where(kind == 3, dots, checks))
    ramp = (0.5 + u / 1.2).clamp(0, 1)
    mix = torch.where(kind == 0, 0.0, torch.where(kind == 1, ramp, (0.5 + edge).clamp(0, 1)))[:, None]
    first, second = drawings.tones[:, 0, :, None, None], drawings.tones[:, 1, :, None, None]
    return first + (second - first) * mix


def edges(pictures: Tensor, low: float = 100.0, high: float = 200.0) -> Tensor:
    """Find the edges of (N, 3, H, W) pictures in [0, 1] as Canny's detector does: (N, 1, H, W) of 0 and 1.

    Thresholds are in OpenCV's units (|gx| + |gy| of a 3x3 Sobel on 8-bit grey).
    """
    grey = (pictures * pictures.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True) * 255
    ramp = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([ramp, ramp.T])[:, None])
    gx, gy = gradient[:, :1], gradient[:, 1:]
    strength = gx.abs() + gy.abs()
    # The neighbours across the edge: along x, y or a diagonal, whichever the gradient is nearest to.
    steep, flat = gy.abs() > 2.4142 * gx.abs(), gy.abs() < 0.4142 * gx.abs()
    around = F.pad(strength, (1, 1, 1, 1))
    height, width = grey.shape[-2:]

    def shifted(dy: int, dx: int) -> Tensor:
        return around[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    same = gx * gy > 0
    before = torch.where(
        flat, shifted(0, -1), torch.where(steep, shifted(-1, 0), torch.where(same, shifted(-1, -1), shifted(-1, 1)))
    )
    after = torch.where(
        flat, shifted(0, 1), torch.where(steep, shifted(1, 0), torch.where(same, shifted(1, 1), shifted(1, -1)))
    )
    ridge = (strength > before) & (strength >= after)
    weak = (ridge & (strength > low)).float()
    found = (ridge & (strength > high)).float()
    for _ in range(8):  # weak pixels join strong ones they touch
        found = F.max_pool2d(found, 3, stride=1, padding=1) * weak
    return found


@cache
def _fields(device: str) -> Tensor:
    """Return the distance fields of all shapes, (shapes, 1, TEXELS, TEXELS) in radii, negative inside."""
    axis = (np.arange(TEXELS) + 0.5) / TEXELS * 2 * FIELD - FIELD
    x, y = np.meshgrid(axis, axis)
    points = np.stack([x, y], -1).reshape(-1, 2)
    fields = [_distance(points, outlines(name)).reshape(1, TEXELS, TEXELS) for name in SHAPES]
    return torch.from_numpy(np.stack(fields).astype(np.float32)).to(device)


def _distance(points: NDArray[np.float64], loops: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the signed distance of (P, 2) points to the area between closed outlines (even-odd rule)."""
    nearest = np.full(len(points), np.inf)
    inside = np.zeros(len(points), bool)
    for loop in loops:
        for start, end in zip(loop, np.roll(loop, -1, axis=0), strict=True):
            side, to_point = end - start, points - start
            along = np.clip(to_point @ side / (side @ side), 0, 1)
            nearest = np.minimum(nearest, ((to_point - along[:, None] * side) ** 2).sum(1))
            crosses = (start[1] > points[:, 1]) != (end[1] > points[:, 1])
            if start[1] != end[1]:
                at = start[0] + (points[:, 1] - start[1]) / (end[1] - start[1]) * side[0]
                inside ^= crosses & (points[:, 0] < at)
    return np.sqrt(nearest) * np.where(inside, -1, 1)


def outlines(shape: str) -> list[NDArray[np.float64]]:
    """Return the closed outlines of a shape, each (V, 2) x, y in radii, y down."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    petals = list(0.44 + 0.64 * np.abs(np.cos(2.5 * (turn - np.pi))) ** 0.7)
    arm, end = 0.34, 1.0
    quarter = np.array([(-arm, -end), (arm, -end), (arm, -arm)])
    table = {
        "circle": [0.92 * circle],
        "square": [0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])],
        "triangle": [_around([1.1], 3) + np.array([0, 0.2])],
        "star": [_around([1.12, 0.46], 10)],
        "heart": [_heart(turn)],
        "ring": [0.98 * circle, 0.56 * circle],
        "crescent": [_crescent()],
        "cross": [np.concatenate([_turned(quarter, quarters) for quarters in range(4)])],
        "diamond": [np.array([(0, -1.12), (0.7, 0), (0, 1.12), (-0.7, 0)])],
        "flower": [_around(petals, 96)],
    }
    return table[shape]


def _around(radii: list[float], count: int) -> NDArray[np.float64]:
    """Return `count` points round the origin from the top, clockwise, their distances cycling through `radii`."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False) - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.resize(radii, count)[:, None]


def _turned(points: NDArray[np.float64], quarters: int) -> NDArray[np.float64]:
    """Return points turned clockwise (y is down) by quarter turns."""
    for _ in range(quarters):
        points = np.stack([-points[:, 1], points[:, 0]], 1)
    return points


def _heart(turn: NDArray[np.float64]) -> NDArray[np.float64]:
    x = 16 * np.sin(turn) ** 3
    y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return np.stack([x, -(y + 2.5)], 1) / 16.5


def _crescent() -> NDArray[np.float64]:
    # A disc without a smaller one to its right; both outlines pass through the two horns at x = 0.42.
    horn, centre = np.arccos(0.42), 0.6
    hole, back = np.hypot(np.sin(horn), 0.42 - centre), np.arctan2(np.sin(horn), 0.42 - centre)
    outer, inner = np.linspace(horn, 2 * np.pi - horn, 72), np.linspace(2 * np.pi - back, back, 48)[1:-1]
    back_edge = np.stack([centre + hole * np.cos(inner), hole * np.sin(inner)], 1)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), back_edge]) + np.array([0.15, 0])
