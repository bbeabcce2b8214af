"""The kinds of LoRA, each as its formula: tensors of a file -> the difference they make to one weight.

W' = W + m * s * delta, with the user's strength m and the file's own scale s = alpha / rank. What is here gives delta,
as rows of the weight laid out as a matrix (out, in * kernel), so that a big weight is changed a piece at a time.

LoRA: Hu et al. 2021, arXiv 2106.09685. LoHa: Hyeon-Woo et al. 2021, arXiv 2108.06098. LoKr and the convolutional forms:
Yeh et al. 2023 (LyCORIS), arXiv 2309.14859. DoRA: Liu et al. 2024, arXiv 2402.09353. What changes a weight by what the
weight is, is in `lora_transforms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Tensor
from glassine.convert.tiles import product
from glassine.errors import ConversionError

Float = NDArray[np.float32]
Shape = tuple[int, ...]
Rows = Callable[[int, int], Float]  # rows [start, stop) of the difference, as (rows, in * kernel), the caller's own


class Delta(NamedTuple):
    """What a file adds to a weight: the weight's shape (out, in, *kernel), the rank that alpha is divided by, and a
    function that reads the tensors and gives the rows. `rank` None: there is no alpha in this kind."""

    shape: Shape
    rank: int | None
    open: Callable[[], Rows]


class Tensors:
    """The tensors of one change, by role."""

    def __init__(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        self.module = module
        self._tensors = tensors

    def __contains__(self, role: str) -> bool:
        return role in self._tensors

    @property
    def roles(self) -> set[str]:
        """What there is."""
        return set(self._tensors)

    def key(self, role: str) -> str:
        """The file's key."""
        return self._tensors[role].key

    def shape(self, role: str, rank: int | None = None) -> Shape:
        """The shape of a tensor that is there, of `rank` dimensions if said."""
        tensor = self._tensors[role]
        if rank is not None and len(tensor.shape) != rank:
            raise ConversionError(
                f'{tensor.path}: tensor "{tensor.key}" has shape {tensor.shape}, expected {rank} dimensions'
            )
        return tensor.shape

    def read(self, role: str) -> Float:
        """The values, float32, in their shape."""
        tensor = self._tensors[role]
        return tensor.read().astype(np.float32).reshape(tensor.shape)

    def alpha(self, default: float) -> float:
        """The file's alpha for this module, or `default` where it has none."""
        if "alpha" not in self:
            return default
        values = self.read("alpha").reshape(-1)
        if values.size != 1 or not np.isfinite(values[0]):
            tensor = self._tensors["alpha"]
            raise ConversionError(f'{tensor.path}: tensor "{tensor.key}" is no number: {values[:4]}')
        return float(values[0])

    def under(self, **roles: str) -> Tensors:
        """Some of the tensors, under other roles: `under(down="b2")`."""
        return Tensors(self.module, {role: self._tensors[own] for role, own in roles.items()})

    def expect_fit(self, condition: bool, role: str, weight: Shape) -> None:
        """Raise for a tensor that does not fit the weight it changes."""
        if not condition:
            tensor = self._tensors[role]
            raise ConversionError(
                f'{tensor.path}: tensor "{tensor.key}" has shape {tensor.shape}, but the weight is {weight}'
            )

    def expect(self, condition: bool, *roles: str) -> None:
        """Raise for tensors whose shapes do not belong together."""
        if not condition:
            first = self._tensors[roles[0]]
            shapes = ", ".join(f"{self.key(role)} {self.shape(role)}" for role in roles)
            raise ConversionError(f"{first.path}: these shapes do not fit one another: {shapes}")


def _ones(shape: Shape) -> bool:
    return all(size == 1 for size in shape)


def lora(t: Tensors) -> Delta:
    """up @ down; of a convolution the kernel is in `down`, or in `mid` (Tucker decomposition)."""
    down, up = t.shape("down"), t.shape("up")
    t.expect(len(down) >= 2 and len(up) >= 2 and down[0] > 0 and _ones(up[2:]), "down", "up")
    if "mid" in t:
        return _tucker_lora(t, down, up)
    t.expect(up[1] == down[0], "down", "up")

    def open_rows() -> Rows:
        a, b = t.read("down").reshape(down[0], -1), t.read("up").reshape(up[0], -1)
        return lambda start, stop: product(b[start:stop], a)

    return Delta((up[0], *down[1:]), down[0], open_rows)


def _tucker_lora(t: Tensors, down: Shape, up: Shape) -> Delta:
    mid = t.shape("mid")
    t.expect(len(mid) >= 2 and mid[:2] == (up[1], down[0]) and up[1] > 0 and _ones(down[2:]), "mid", "down", "up")

    def open_rows() -> Rows:
        a, b = t.read("down").reshape(down[:2]), t.read("up").reshape(up[:2])
        core = np.einsum("nm...,mj->nj...", t.read("mid"), a).reshape(up[1], -1)
        return lambda start, stop: product(b[start:stop], core)

    return Delta((up[0], down[1], *mid[2:]), down[0], open_rows)


def loha(t: Tensors) -> Delta:
    """The Hadamard product of two low-rank matrices."""
    if ("hada_t1" in t) != ("hada_t2" in t):
        raise ConversionError(f"{t.module}: of hada_t1 and hada_t2 only one is there")
    halves = [_half(t, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
    t.expect(halves[0].shape == halves[1].shape, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def open_rows() -> Rows:
        first, second = (half.open() for half in halves)
        return lambda start, stop: first(start, stop) * second(start, stop)

    return Delta(halves[0].shape, halves[0].rank, open_rows)


def _half(t: Tensors, a: str, b: str, core: str) -> Delta:
    """a @ b; with a core, sum over ij of core[i, j, ...] a[i, p] b[j, r]."""
    left, right = t.shape(a, 2), t.shape(b, 2)
    if core not in t:
        t.expect(left[1] == right[0] > 0, a, b)

        def open_plain() -> Rows:
            x, y = t.read(a), t.read(b)
            return lambda start, stop: product(x[start:stop], y)

        return Delta((left[0], right[1]), right[0], open_plain)
    kernel = t.shape(core)
    t.expect(len(kernel) >= 2 and kernel[:2] == (left[0], right[0]) and min(kernel[:2]) > 0, core, a, b)

    def open_core() -> Rows:
        x = t.read(a)
        inner = np.einsum("ij...,jr->ir...", t.read(core), t.read(b)).reshape(kernel[0], -1)
        return lambda start, stop: np.asarray(x[:, start:stop].T @ inner, np.float32)

    return Delta((left[1], right[1], *kernel[2:]), right[0], open_core)


def lokr(t: Tensors) -> Delta:
    """The Kronecker product of two matrices, each full or of low rank; without a low rank there is no scale."""
    first = _full_or_half(t, "lokr_w1", "lokr_w1_a", "lokr_w1_b", "")
    second = _full_or_half(t, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    t.expect(len(first.shape) == 2 and len(second.shape) >= 2, *sorted(t.roles - {"alpha", "dora", "magnitude"}))
    (a, b), (c, d) = first.shape, second.shape[:2]
    inner = math.prod(second.shape[1:])

    def open_rows() -> Rows:
        left, right = first.open()(0, a), second.open()(0, c)

        def rows(start: int, stop: int) -> Float:
            index = np.arange(start, stop)
            outer: Float = left[index // c][:, :, None] * right[index % c][:, None, :]
            return outer.reshape(stop - start, b * inner)

        return rows

    rank = second.rank if second.rank is not None else first.rank
    return Delta((a * c, b * d, *second.shape[2:]), rank, open_rows)


def _full_or_half(t: Tensors, full: str, a: str, b: str, core: str) -> Delta:
    if full not in t:
        if not {a, b} <= t.roles:
            raise ConversionError(f"{t.module}: neither {full} nor both of {a} and {b} are there")
        return _half(t, a, b, core)
    shape = t.shape(full)

    def open_rows() -> Rows:
        values = t.read(full).reshape(shape[0], -1)
        return lambda start, stop: values[start:stop]

    return Delta(shape, None, open_rows)


def full(t: Tensors) -> Delta:
    """The difference itself."""
    shape = t.shape("diff")

    def open_rows() -> Rows:
        values = t.read("diff").reshape(shape[0], -1) if shape else t.read("diff").reshape(1, 1)
        return lambda start, stop: values[start:stop].copy()

    return Delta(shape, None, open_rows)


BIASES = {"bias", "up_bias"}  # a difference of the bias itself, and the bias of PEFT's upper matrix

# Kind by the tensors it needs, with those it may have besides. A bias goes with every kind.
_SCALED = {"alpha", "dora", "magnitude"}
_KINDS: tuple[tuple[set[str], set[str], Callable[[Tensors], Delta]], ...] = (
    ({"down", "up"}, {"mid", *_SCALED}, lora),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2", *_SCALED}, loha),
    ({"diff"}, set(), full),
)


def delta_of(t: Tensors) -> Delta | None:
    """Return what the tensors add to the weight, or None if they change its bias alone.

    Raises:
        ConversionError: tensors that make no known kind, or whose shapes do not fit one another.
    """
    roles = t.roles - BIASES
    for needed, optional, make in _KINDS:
        if needed <= roles <= needed | optional:
            return make(t)
    if roles & {"lokr_w1", "lokr_w1_a"} and all(role.startswith("lokr_") for role in roles - _SCALED):
        return lokr(t)
    if not roles:
        return None
    raise ConversionError(
        f"{t.module}: the keys {', '.join(sorted(t.key(role) for role in roles))} make no LoRA, LoHa, LoKr, GLoRA, "
        "full difference, (IA)3, OFT or BOFT; the file is incomplete or of a kind that Glassine does not know"
    )


def rescaled(weight: Float, magnitude: Float, by_columns: bool) -> Float:
    """DoRA: give every row (or column) of `weight` (out, in * kernel) the norm that `magnitude` says.

    Args:
        weight: (out, in, kernel). magnitude: (out,), or (in,) with `by_columns`.
    """
    axes = (0, 2) if by_columns else (1, 2)
    norm = np.sqrt(np.square(weight, dtype=np.float64).sum(axis=axes, keepdims=True))
    wanted = magnitude.reshape(1, -1, 1) if by_columns else magnitude.reshape(-1, 1, 1)
    # A row of zeros has no direction to scale: it stays.
    return np.asarray(weight * np.divide(wanted, norm, out=np.ones_like(norm), where=norm > 0), np.float32)
