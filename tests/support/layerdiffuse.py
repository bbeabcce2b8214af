"""LayerDiffuse's released files without their weights: keys and shapes, weights by a formula, what its modules gave.

`golden` holds inputs and outputs of the official modules with these weights (random numbers seeded by the key). Keys of
SDXL's patches follow from the published grammar and file sizes.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
Shapes = dict[str, tuple[int, ...]]


@cache
def released() -> dict[str, Shapes]:
    """Keys and shapes by file name."""
    with gzip.open(GOLDEN / "layerdiffuse_keys.json.gz", "rt") as file:
        files = json.load(file)["files"]
    return {name: {key: tuple(shape) for key, shape in keys.items()} for name, keys in files.items()}


@cache
def attentions() -> list[str]:
    """diffusers' names of the attentions of Stable Diffusion 1.5, in the order of `hookers.layers`."""
    with gzip.open(GOLDEN / "layerdiffuse_keys.json.gz", "rt") as file:
        return list(json.load(file)["attentions"])


@cache
def golden() -> Mapping[str, np.ndarray]:
    """Inputs and outputs of the official modules."""
    return dict(np.load(GOLDEN / "layerdiffuse.npz"))


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight that the goldens were made with."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) >= 2:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 1 + 0.1 * values if key.endswith("weight") else 0.05 * values
    return values.astype(np.float32)


def weights(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, np.ndarray]:
    """A file's weights; `prefix` is part of the seeds, not of the names."""
    return {key: weight(prefix + key, shape) for key, shape in shapes.items()}


def unit_shapes(
    frames: int,
    *,
    channels: int = 320,
    context: int | None = None,
    control: bool = False,
    rank: int = 256,
    signal: int = 256,
) -> Shapes:
    """One attention of an SD 1.5 file; `context` is the width of the text, None for attention to itself."""
    inner = channels if context is None else context
    shapes: Shapes = {}
    for frame in range(frames):
        for name, columns in (("q", channels), ("k", inner), ("v", inner), ("out", channels)):
            shapes[f"to_{name}_lora.{frame}.down.weight"] = (rank, columns)
            shapes[f"to_{name}_lora.{frame}.up.weight"] = (channels, rank)
    shapes |= {"temporal_n.weight": (channels,), "temporal_n.bias": (channels,)}
    for letter in "iqkvo":
        shapes |= {f"temporal_{letter}.weight": (channels, channels), f"temporal_{letter}.bias": (channels,)}
    for frame in range(frames) if control else ():
        place = f"control_convs.{frame}"
        shapes |= {f"{place}.0.weight": (signal, signal, 3, 3), f"{place}.0.bias": (signal,)}
        shapes |= {f"{place}.2.weight": (channels, signal, 1, 1), f"{place}.2.bias": (channels,)}
    return shapes


def sharing_shapes(units: list[tuple[str, int, int]], context: int, frames: int, *, control: bool = False) -> Shapes:
    """A small SD 1.5 file, of rank 4, for a UNet with these attentions (name, channels, level)."""
    shapes: Shapes = {}
    for index, (unit, channels, _) in enumerate(units):
        text = context if unit.endswith("attn2") else None
        unit_of = unit_shapes(frames, channels=channels, context=text, control=control, rank=4, signal=16)
        shapes |= {f"hookers.layers.{index}.{key}": shape for key, shape in unit_of.items()}
    widths = (3, 8, 8, 8, 8, 12, 12, 16, 16)
    places = [(f"blocks_0.{2 * i}", widths[i], widths[i + 1]) for i in range(8)]
    places += [(f"blocks_{block}.{i}", 16, 16) for block in (1, 2, 3) for i in (0, 2)]
    for place, inner, outer in places if control else ():
        shapes |= {
            f"kwargs_encoder.{place}.weight": (outer, inner, 3, 3),
            f"kwargs_encoder.{place}.bias": (outer,),
        }
    return shapes


def projection_shapes(*, channels: int = 320, context: int | None = None) -> Shapes:
    """The attention's own projections, which such a file patches."""
    inner = channels if context is None else context
    return {
        "to_q.weight": (channels, channels),
        "to_k.weight": (channels, inner),
        "to_v.weight": (channels, inner),
        "to_out.0.weight": (channels, channels),
        "to_out.0.bias": (channels,),
    }
