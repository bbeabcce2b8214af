"""Random numbers that other tools also draw: PyTorch's CPU generator and NVIDIA's Philox, without PyTorch.

The same seed gives the same picture as diffusers, and as A1111 on a Mac ("torch") or on an NVIDIA card ("philox"). Both
are written here from their definitions and depend on nothing but the seed: not on NumPy's version, not on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glassine.errors import RequestError

NoiseKind = Literal["torch", "philox"]
Float32 = NDArray[np.float32]

_BLOCK = 16


def check_seed(seed: int) -> int:
    """Return `seed`.

    Raises:
        RequestError: not a whole number in [0, 2^64 - 1].
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise RequestError(f"seed is {seed!r}; expected a whole number from 0 to 18446744073709551615 (2^64 - 1)")
    return int(seed)


def randn(seed: int, shape: tuple[int, ...], kind: NoiseKind = "torch") -> Float32:
    """Return unit normals, float32, C order: `torch.randn(shape, generator=torch.Generator(...).manual_seed(seed))`.

    kind "torch" is the generator of the CPU, "philox" that of an NVIDIA card.
    """
    return _generator(seed, kind).randn(shape)


class StepNoise:
    """The noise that stochastic samplers add: draw number `index` of the stream that the starting noise began.

    diffusers and A1111 take the starting noise from a generator and then one tensor after the other; `step_noise(index,
    shape)` is the (index + skip)-th tensor of that stream, however often and in whatever order it is asked for: a
    function of (seed, index) alone, and a run that starts late sees the same noise as one that starts early.

    Args:
        seeds: one seed a picture of the batch, or a single one for the whole batch (one generator for all of it).
        kind: as for `randn`.
        skip: tensors taken from the stream before the loop; 1 is the starting noise.
    """

    def __init__(self, seeds: int | Sequence[int], kind: NoiseKind = "torch", skip: int = 1) -> None:
        self._seeds = list(seeds) if isinstance(seeds, Sequence) else [seeds]
        self._kind: NoiseKind = kind
        self._skip = skip
        self._streams = [_generator(seed, kind) for seed in self._seeds]
        self._next = 0

    def __call__(self, index: int, shape: tuple[int, ...]) -> Float32:
        """Return unit normals of `shape` (B, C, h, w)."""
        if len(self._seeds) not in (1, shape[0]):
            raise RequestError(f"{len(self._seeds)} seeds for {shape[0]} pictures; expected one each, or one for all")
        if index + self._skip < self._next:
            self._streams = [_generator(seed, self._kind) for seed in self._seeds]
            self._next = 0
        part = shape if len(self._seeds) == 1 else (1, *shape[1:])
        while self._next < index + self._skip:
            self._draw(part)
        return self._draw(part)

    def _draw(self, part: tuple[int, ...]) -> Float32:
        self._next += 1
        return np.concatenate([stream.randn(part) for stream in self._streams])


class TorchGenerator:
    """`torch.Generator(device="cpu")` as far as float32 normals go.

    MT19937 seeded with the low 32 bits; blocks of 16 through Box-Muller; when the count is not a multiple of 16, the
    last 16 are drawn again; fewer than 16 come one by one from 53-bit doubles, each pair's sine kept for the next.
    Every operation is rounded to float32 as in PyTorch's scalar code, which is what runs on a Mac; functions are taken
    in double first, so the bits do not depend on a machine's float32 library. Vectorised x86 code rounds the angle
    twice and differs by up to 2.3e-6.
    """

    def __init__(self, seed: int) -> None:
        # The legacy RandomState is the one NumPy interface that promises these bits for ever (NEP 19).
        self._bits = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)
        self._kept: float | None = None

    def randn(self, shape: tuple[int, ...]) -> Float32:
        """Return the next unit normals."""
        count = math.prod(shape)
        if count < _BLOCK:
            return np.array([self._one() for _ in range(count)], dtype=np.float32).reshape(shape)
        out = np.empty(count, dtype=np.float32)
        uniform = self._uniform(count)
        whole = count - count % _BLOCK
        out[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            out[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return out.reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return np.frombuffer(self._bits.bytes(4 * count), dtype="<u4")

    def _uniform(self, count: int) -> Float32:
        uniform: Float32 = (self._words(count) & 0xFFFFFF).astype(np.float32) / np.float32(1 << 24)
        return uniform

    def _one(self) -> float:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        high1, low1, high2, low2 = (int(word) for word in self._words(4))
        u1 = ((high1 << 32 | low1) & (1 << 53) - 1) / 2.0**53
        u2 = ((high2 << 32 | low2) & (1 << 53) - 1) / 2.0**53
        radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._kept = radius * math.sin(theta)
        return radius * math.cos(theta)


def _box_muller(uniform: Float32) -> Float32:
    """Blocks of 16 uniforms -> 16 normals: 8 radii, 8 angles; cosines first, then sines. Each result in float32."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    log = np.log((np.float32(1) - first).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log)
    theta = (2 * math.pi * second.astype(np.float64)).astype(np.float32).astype(np.float64)
    pair = radius * np.cos(theta).astype(np.float32), radius * np.sin(theta).astype(np.float32)
    return np.stack(pair, axis=1).reshape(-1)


class PhiloxGenerator:
    """`torch.Generator(device="cuda")` as A1111 and ComfyUI use it: Philox4x32-10 and one Box-Muller sine a number.

    Counter (call, 0, index, 0), key = seed (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """

    def __init__(self, seed: int) -> None:
        self._seed = check_seed(seed)
        self._call = 0

    def randn(self, shape: tuple[int, ...]) -> Float32:
        """Return the next unit normals."""
        c0, c1 = _philox(self._seed, self._call, math.prod(shape))
        self._call += 1
        u = c0 * 2.0**-32 + 2.0**-33
        v = c1 * (2.0**-32 * 2 * math.pi) + 2.0**-33 * 2 * math.pi
        normal: Float32 = (np.sqrt(-2.0 * np.log(u)) * np.sin(v)).astype(np.float32)
        return normal.reshape(shape)


def _philox(seed: int, call: int, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Ten rounds over the counters (call, 0, 0..count, 0); returns the first two of the four words."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = np.full(count, call & 0xFFFFFFFF, dtype=np.uint64)
    c1 = np.full(count, 0, dtype=np.uint64)
    c2 = np.arange(count, dtype=np.uint64)
    c3 = np.zeros(count, dtype=np.uint64)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = product1 >> high ^ c1 ^ np.uint64(key0), product0 >> high ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & low, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1


_GENERATORS: dict[str, type[TorchGenerator] | type[PhiloxGenerator]] = {
    "torch": TorchGenerator,
    "philox": PhiloxGenerator,
}


def _generator(seed: int, kind: NoiseKind) -> TorchGenerator | PhiloxGenerator:
    if kind not in _GENERATORS:
        raise RequestError(f'noise "{kind}" is not known; expected one of {", ".join(_GENERATORS)}')
    return _GENERATORS[kind](seed)
