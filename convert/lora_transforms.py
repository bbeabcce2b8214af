"""The kinds of LoRA that change a weight by what it is: rotations, scalings, and GLoRA, each as its formula.

OFT: Qiu et al. 2023, arXiv 2306.07280. BOFT: Liu et al. 2024, arXiv 2311.06243. GLoRA: Chavan et al. 2023, arXiv
2306.07967. (IA)3: Liu et al. 2022, arXiv 2205.05638. kohya and LyCORIS rotate a layer's outputs, the rows of its
weight; PEFT since 0.14 its inputs, the columns. All of them but LyCORIS' BOFT go a strength's share of the way from the
weight to the one they make.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from glassine.convert.lora_kinds import BIASES, Float, Shape, Tensors, lora
from glassine.convert.lora_settings import Settings
from glassine.errors import ConversionError

Transform = Callable[[Float, float], Float]  # (weight (out, in, *kernel), strength) -> the weight with the LoRA in it
Wide = NDArray[np.float64]


def transform_of(t: Tensors, module: str, shape: Shape, settings: Settings) -> Transform | None:
    """Return what the tensors make of the weight of `module`, or None if they are of another kind.

    Args:
        shape: of the weight. settings: PEFT's, where there are any.

    Raises:
        ConversionError: their shapes are not the weight's, or what is not in the file decides what they mean.
    """
    roles = t.roles - BIASES
    if {"oft_blocks"} <= roles <= {"oft_blocks", "rescale", "alpha"}:
        return _oft(t, shape) if len(t.shape("oft_blocks")) != 4 else _butterfly(t, shape)
    if roles == {"oft_R"}:
        return _peft_oft(t, shape, settings)
    if {"oft_r"} <= roles <= {"oft_r", "oft_s"}:
        return _older_peft_oft(t, shape, settings)
    if roles == {"boft_R", "boft_s"}:
        return _peft_butterfly(t, shape)
    if {"a1", "a2", "b1", "b2"} <= roles <= {"a1", "a2", "b1", "b2", "bm", "alpha"}:
        return _glora(t, shape)
    if roles in ({"ia3_l"}, {"ia3_w", "on_input"}):
        factors = _factors(t, module, shape, settings)
        return lambda weight, strength: weight * (1 + np.float32(strength) * (factors - 1))
    return None


def bias_factors(t: Tensors, module: str, shape: Shape, settings: Settings) -> Float | None:
    """What a bias is multiplied by: PEFT's (IA)3 scales what the layer gives, the bias included."""
    if "ia3_l" not in t:
        return None
    factors = _factors(t, module, shape, settings)
    return factors.reshape(-1) if factors.shape[0] == shape[0] else None


def _towards(make: Callable[[Float], Float]) -> Transform:
    """W + m (make(W) - W), with `make` a function of the weight as a matrix (out, in * kernel)."""

    def apply(weight: Float, strength: float) -> Float:
        flat = weight.reshape(weight.shape[0], -1)
        return np.asarray(flat + np.float32(strength) * (make(flat) - flat)).reshape(weight.shape)

    return apply


def _cayley(q: Wide) -> Wide:
    """(I + Q)(I - Q)^-1 of skew-symmetric matrices (..., b, b): a rotation."""
    identity = np.eye(q.shape[-1])
    return np.asarray((identity + q) @ np.linalg.inv(identity - q))


def _skew(t: Tensors, role: str) -> Wide:
    blocks = t.read(role).astype(np.float64)
    if not np.isfinite(blocks).all():
        raise ConversionError(
            f"{t.module}: {t.key(role)} holds numbers that are not finite; no rotation follows from it"
        )
    return np.asarray(blocks - blocks.swapaxes(-1, -2))


def _constrained(t: Tensors, rows: int) -> Wide:
    """B - Bt, scaled down to a Frobenius norm of alpha * rows over all blocks; alpha 0 or none is no limit."""
    q = _skew(t, "oft_blocks")
    constraint, norm = t.alpha(0.0) * rows, float(np.sqrt(np.square(q).sum()))
    return np.asarray(q * (constraint / norm)) if 0 < constraint < norm else q


def _row_factors(t: Tensors, role: str, shape: Shape) -> Float:
    """A factor for every row, (out, 1); 1 where there are none."""
    if role not in t:
        return np.ones((1, 1), np.float32)
    t.expect_fit(math.prod(t.shape(role)) == shape[0], role, shape)
    return t.read(role).reshape(-1, 1)


def _oft(t: Tensors, shape: Shape) -> Transform:
    """kohya's and LyCORIS' OFT: Rt times the rows, block by block; then every row by its factor."""
    blocks = t.shape("oft_blocks", 3)
    t.expect_fit(blocks[1] == blocks[2] and blocks[0] * blocks[1] == shape[0], "oft_blocks", shape)
    rescale = _row_factors(t, "rescale", shape)

    def make(flat: Float) -> Float:
        rotation = _cayley(_constrained(t, shape[0])).astype(np.float32)
        return _on_rows(rotation.swapaxes(1, 2), flat) * rescale

    return _towards(make)


def _on_rows(blocks: Float, flat: Float) -> Float:
    """Multiply the rows (out, n) by a block diagonal matrix of blocks (out / b, b, b)."""
    return np.asarray(blocks @ flat.reshape(len(blocks), blocks.shape[1], -1)).reshape(flat.shape)


def _butterfly(t: Tensors, shape: Shape) -> Transform:
    """LyCORIS' BOFT: stage after stage rotates rows that are 2^i half-blocks apart.

    The strength m is in every stage, R_m = I + m (R - I); the rows' factors are applied whole.
    """
    stages, count, size, again = t.shape("oft_blocks", 4)
    t.expect_fit(stages > 0 and size == again > 0 and count * size == shape[0], "oft_blocks", shape)
    t.expect_fit(size % 2 == 0 and shape[0] % (size << (stages - 1)) == 0, "oft_blocks", shape)
    rescale = _row_factors(t, "rescale", shape)

    def apply(weight: Float, strength: float) -> Float:
        flat = weight.reshape(shape[0], -1)
        for i, rotation in enumerate(_cayley(_constrained(t, shape[0]))):
            stage = (np.eye(size) + strength * (rotation - np.eye(size))).astype(np.float32)
            order = np.arange(shape[0]).reshape(-1, 2, size // 2 << i).swapaxes(1, 2).reshape(-1)
            turned = np.empty_like(flat)
            turned[order] = _on_rows(stage, flat[order])
            flat = turned
        return np.asarray(flat * rescale).reshape(weight.shape)

    return apply


def _on_columns(blocks: Float, flat: Float) -> Float:
    """Multiply by the transpose of a block diagonal matrix from the right; one block stands for all."""
    parts = flat.reshape(len(flat), -1, blocks.shape[1]).swapaxes(0, 1)
    return np.asarray((parts @ blocks.swapaxes(1, 2)).swapaxes(0, 1)).reshape(flat.shape)


def _peft_oft(t: Tensors, shape: Shape, settings: Settings) -> Transform:
    """PEFT's OFT: the upper triangles of skew-symmetric matrices; W Rt, block by block of the columns."""
    columns = math.prod(shape[1:])
    count, elements = t.shape("oft_R", 2)
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    fits = size * (size - 1) // 2 == elements and columns % size == 0 and count in (1, columns // size)
    t.expect_fit(elements > 0 and fits, "oft_R", shape)
    if not settings:
        raise ConversionError(
            f"{t.module}: PEFT's OFT is computed as its adapter_config.json says, and none lies beside the file"
        )
    series = settings.said("use_cayley_neumann", False)
    terms, eps = settings.said("num_cayley_neumann_terms", 5), settings.said("eps", 6e-5)
    if type(terms) is not int or not 1 <= terms <= 64 or type(eps) is not float or not 0 < eps < math.inf:
        raise ConversionError(
            f"{t.module}: PEFT's adapter_config.json says num_cayley_neumann_terms {terms!r} and eps {eps!r}; expected "
            "1 to 64 and a positive number"
        )

    def make(flat: Float) -> Float:
        q = np.zeros((count, size, size))
        rows, above = np.triu_indices(size, 1)
        q[:, rows, above] = t.read("oft_R")
        q -= q.swapaxes(1, 2).copy()
        if settings.said("coft", False):  # constrained: no block further from the identity than that
            norm = np.sqrt(np.square(q).sum(axis=(1, 2), keepdims=True))
            q *= np.minimum(1, eps / math.sqrt(count) / np.maximum(norm, eps / math.sqrt(count)))
        rotation = _neumann(q, terms) if series else _cayley(-q)
        return _on_columns(rotation.astype(np.float32), flat)

    return _towards(make)


def _neumann(q: Wide, terms: int) -> Wide:
    """PEFT's short series for the rotation: I + 2Q + 2Q^2 + ... and one power that counts once."""
    rotation = np.eye(q.shape[-1]) + np.zeros_like(q)
    if terms > 1:
        rotation += 2 * q
    if terms > 2:
        power = q
        for _ in range(max(1, terms - 3)):
            power = power @ q
            rotation += 2 * power
        rotation += power @ q
    return rotation


def _older_peft_oft(t: Tensors, shape: Shape, settings: Settings) -> Transform:
    """PEFT's OFT before 0.16: whole matrices A, and R = (I - S)(I + S)^-1 with S = (A - At) / 2.

    0.14 and 0.15 rotate columns and have a factor for every row (`oft_s`); before that it was the rows, by Rt, the last
    block cut where the rows are no multiple of its size.
    """
    count, size, again = t.shape("oft_r", 3)
    if settings.said("coft", False):
        raise ConversionError(f"{t.module}: constrained OFT of PEFT before 0.16; train or save it with a newer PEFT")
    t.expect_fit(size == again > 0 and count > 0, "oft_r", shape)

    def rotation() -> Float:
        return _cayley(-0.5 * _skew(t, "oft_r")).astype(np.float32)

    if "oft_s" in t:
        columns = math.prod(shape[1:])
        t.expect_fit(columns % size == 0 and count in (1, columns // size), "oft_r", shape)
        factors = _row_factors(t, "oft_s", shape)
        return _towards(lambda flat: _on_columns(rotation(), flat) * factors)
    blocks = -(-shape[0] // size)
    t.expect_fit(count == 1 or count >= blocks, "oft_r", shape)

    def cut(flat: Float) -> Float:
        turned = np.broadcast_to(rotation()[:blocks], (blocks, size, size)).swapaxes(1, 2)
        return _on_rows(turned, np.pad(flat, ((0, blocks * size - len(flat)), (0, 0))))[: len(flat)]

    return _towards(cut)


def _peft_butterfly(t: Tensors, shape: Shape) -> Transform:
    """PEFT's BOFT: stages of rotated columns, each in an order of its own; then every row by its factor."""
    stages, count, size, again = t.shape("boft_R", 4)
    columns = math.prod(shape[1:])
    fits = size == again and count * size == columns and stages > 0
    t.expect_fit(fits and (stages == 1 or (size % 2 == 0 and count % (1 << (stages - 1)) == 0)), "boft_R", shape)
    factors = _row_factors(t, "boft_s", shape)

    def make(flat: Float) -> Float:
        first, *further = _cayley(-0.5 * _skew(t, "boft_R")).astype(np.float32)
        flat = _on_columns(first, flat)
        for i, rotation in enumerate(further, 1):
            halves = np.arange(columns).reshape(-1, 2 << i, size // 2)  # of blocks, in the groups of this stage
            order = np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)
            flat = _on_columns(rotation, flat[:, np.argsort(order)])[:, order]
        return np.asarray(flat * factors)

    return _towards(make)


def _glora(t: Tensors, shape: Shape) -> Transform:
    """W + s (W A1 A2 + B1 B2), s = alpha / rank; its first files hold all four transposed and in another order."""
    a1, a2, b1, b2 = (t.shape(role) for role in ("a1", "a2", "b1", "b2"))
    t.expect(min(map(len, (a1, a2, b1, b2))) >= 2, "a1", "a2", "b1", "b2")
    inner = shape[1] if len(shape) > 1 else 1
    columns = math.prod(shape[1:])
    if a1[:2] == (inner, a2[0]) and a2[1] == inner and b1[0] == shape[0]:
        first, second, down, up = "a1", "a2", "b2", "b1"
    else:
        first, second, down, up = "a2", "a1", "b1", "b2"
        fits = a2[:2] == (inner, a1[0]) and a1[1] == inner and b2[0] == shape[0]
        t.expect_fit(fits, "a1", shape)
    low_rank = lora(t.under(down=down, up=up, **({"mid": "bm"} if "bm" in t else {})))
    t.expect_fit(math.prod(low_rank.shape) == shape[0] * columns, up, shape)
    rank = t.shape(first)[1]
    t.expect_fit(rank > 0, first, shape)
    scale = np.float32(t.alpha(float(rank)) / rank)

    def apply(weight: Float, strength: float) -> Float:
        left, right = t.read(first).reshape(inner, rank), t.read(second).reshape(rank, inner)
        channels_last = np.moveaxis(weight.reshape(shape[0], inner, -1), 1, 2)
        through = np.moveaxis(channels_last @ left @ right, 2, 1).reshape(weight.shape)
        added = low_rank.open()(0, shape[0]).reshape(weight.shape)
        return np.asarray(weight + np.float32(strength) * scale * (through + added))

    return apply


def _factors(t: Tensors, module: str, shape: Shape, settings: Settings) -> Float:
    """(IA)3: a factor for every output or every input, in a shape that multiplies the weight."""
    ones = (1,) * (len(shape) - 2)
    by_output, by_input = (shape[0], 1, *ones), (1, shape[1] if len(shape) > 1 else 1, *ones)
    role = "ia3_l" if "ia3_l" in t else "ia3_w"
    given, size = t.shape(role), math.prod(t.shape(role))
    t.expect_fit(len(shape) > 1, role, shape)
    if role == "ia3_w":  # LyCORIS': what is added to 1
        values, on_input = 1 + t.read(role), bool(t.read("on_input").reshape(-1)[:1].any())
    else:
        # A matrix' vector is a column or a row; a convolution's, which is always a row, may need PEFT's list.
        values = t.read(role)
        both = by_output[0] == by_input[1] and len(shape) > 2
        on_input = _is_feedforward(t, module, settings) if both else given[:1] == (1,) and size == by_input[1]
    wanted = by_input if on_input else by_output
    t.expect_fit(size == math.prod(wanted), role, shape)
    return values.reshape(wanted)


def _is_feedforward(t: Tensors, module: str, settings: Settings) -> bool:
    """Whether PEFT's configuration counts a module to those whose inputs are scaled."""
    named = settings.said("feedforward_modules")
    if not isinstance(named, list):
        raise ConversionError(
            f"{t.module}: whether inputs or outputs are scaled is said by a list feedforward_modules in PEFT's "
            f"adapter_config.json, and that is {named!r}"
        )
    return any(module.endswith(str(name)) for name in named)
