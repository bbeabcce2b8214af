"""Words where their layers are: what the collage UNet reads besides the usual, at every step.

    score(q, k) += g(sigma) M(k) (attract v(q) - repel (1 - v(q)))     for every token k of a layer's words

v is the layer's visible weight at the place of the query q, M(k) the largest score of the token, which the network
finds itself. The weight g falls with the noise: where things lie is decided early. It counts for the prompt alone,
never for the negative one.

The UNet takes masks that stay, v and v - 1 of every layer for each of its levels, and a small table that changes with
every step; see `models/collage.py`. Layers with the very same words share them: those are kept away only from where
none of them is.

Source: Collage Diffusion (Sarukkai et al. 2023, arXiv 2303.00262); g is that of its published code, at the true sigma
of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glassine.runtime.control import at_size
from glassine.runtime.denoiser import Control, Inputs, NetworkCall

Float = NDArray[np.float32]
Specs = Mapping[str, tuple[tuple[int, ...], str]]

COLLAGE_UNET = "collage_unet"
MASKS, TABLE = "collage_masks_", "collage_table"  # the UNet's inputs; behind MASKS stands the level


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWords:
    """Which tokens belong to which layer, and how strongly.

    visible: (layers, H, W) float32. columns: of the context, each layer's. attract, repel: each layer's.
    """

    visible: Float
    columns: tuple[tuple[int, ...], ...]
    attract: tuple[float, ...]
    repel: tuple[float, ...]


class LayerAttention:
    """What a collage adds to every call of its UNet, as the denoiser's `control`.

    Args:
        words: of the layers.
        inputs: of the collage UNet. rows: of a call.
        further: what steers the picture besides, such as control nets.
    """

    def __init__(self, words: PlacedWords, inputs: Specs, rows: int, further: Control | None = None) -> None:
        (_, tokens, _, masks), _ = inputs[TABLE]
        self._further = further
        self._masks = {
            name: np.repeat(masks_of(words, shape[2], shape[3], masks)[None], rows, axis=0)
            for name, (shape, _) in inputs.items()
            if name.startswith(MASKS)
        }
        self._weights = weights_of(words, tokens, masks)
        self._table = np.zeros((rows, *self._weights.shape), np.float32)

    def __call__(self, call: NetworkCall) -> Inputs:
        """Return the masks and the table of a call, written again at the next one, and what steers it besides."""
        g = np.float32(weight_at(call.sigma))
        self._table[:] = 0
        for index, row in enumerate(call.rows):
            if row.branch == "cond":
                np.multiply(self._weights, g, out=self._table[index])
        further = {} if self._further is None else self._further(call)
        return {**self._masks, TABLE: self._table, **further}


def weight_at(sigma: float) -> float:
    """Return g: ln(ln(sigma + 1.01) + 1), 1.3 where all is noise and 0.01 at the end."""
    return math.log(math.log(sigma + 1.01) + 1)


def masks_of(words: PlacedWords, height: int, width: int, count: int) -> Float:
    """Return the masks of one level, (count, height, width): v of every layer, then of every layer v - 1.

    v is the mean over what each place covers, so that layers that add up to 1 still do. What is not used is 0.
    """
    masks = np.zeros((count, height, width), np.float32)
    for i, columns in enumerate(words.columns):
        seen = np.sum([v for v, other in zip(words.visible, words.columns, strict=True) if other == columns], axis=0)
        masks[i] = at_size(words.visible[i], height, width)
        masks[count // 2 + i] = at_size(np.minimum(seen, np.float32(1)), height, width) - 1
    return masks


def weights_of(words: PlacedWords, tokens: int, count: int) -> Float:
    """Return how strongly each token is drawn to each mask, (tokens, 1, count)."""
    weights = np.zeros((tokens, 1, count), np.float32)
    for i, columns in enumerate(words.columns):
        weights[list(columns), 0, i] = words.attract[i]
        weights[list(columns), 0, count // 2 + i] = words.repel[i] / words.columns.count(columns)
    return weights


def most_layers(inputs: Specs) -> int:
    """Return how many layers with words a collage UNet takes."""
    return inputs[TABLE][0][3] // 2
