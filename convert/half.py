"""float16 <-> float32, bit for bit what NumPy's own casts give.

NumPy casts one element at a time where its build may not assume the processor's instructions (x86-64); whole-array
steps that it does vectorise are several times faster. Blocks stay in the processor's cache between the steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 17  # elements; with fewer, threads wait for one another between the steps
_BIAS = 127 - 15  # float32's exponents less float16's
_SHIFT = 23 - 10  # bits that its significand has more
_EXPONENT = np.int32(0x7F800000)
_SPREAD = np.int32(0x70000000)  # the exponent's bits that float16 has not
_SIGN = np.int16(-0x8000)
_TOO_LARGE = (127 + 16) << 23  # the exponent of 65536, above which are infinity and NaN
_SMALLEST = np.full(_BLOCK, (127 - 14) << 23, np.int32)  # the lowest exponent at which the last place still moves
_MAGIC = np.int32((_SHIFT << 23) + (1 << 22))  # turns 2**e into 1.5 * 2**(e + 13)


def to_float32(halves: NDArray[np.float16], scale: float = 1.0) -> NDArray[np.float32]:
    """Return `halves` times `scale` (0 < scale < 2**14), rounded to float32 once; little-endian, contiguous."""
    values = np.empty(halves.shape, np.float32)
    source, result = halves.reshape(-1), values.reshape(-1)
    factor = np.float32(scale) * np.float32(2.0**_BIAS)
    for start in range(0, source.size, _BLOCK):
        part, out = source[start : start + _BLOCK], result[start : start + _BLOCK]
        if not all_finite(part):
            with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
                np.multiply(part.astype(np.float32), np.float32(scale), out=out)
            continue
        bits = out.view(np.int32)
        np.copyto(bits, part.view(np.int16))
        np.left_shift(bits, _SHIFT, out=bits)
        np.bitwise_and(bits, ~_SPREAD, out=bits)  # the sign has spread there
        np.multiply(out, factor, out=out)  # subnormal numbers become what they are
    return values


def to_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return `values`, contiguous, rounded to nearest, ties to even; infinity beyond float16's range."""
    halves = np.empty(values.shape, np.float16)
    source, result = values.reshape(-1), halves.reshape(-1)
    scratch = np.empty((2, min(_BLOCK, source.size)), np.float32)
    for start in range(0, source.size, _BLOCK):
        part, out = source[start : start + _BLOCK], result[start : start + _BLOCK].view(np.int16)
        magic, rounded = scratch[:, : part.size]
        exponents, bits = magic.view(np.int32), rounded.view(np.int32)
        np.bitwise_and(part.view(np.int32), _EXPONENT, out=exponents)
        if exponents.max() >= _TOO_LARGE:
            with np.errstate(over="ignore"):
                out[:] = part.astype(np.float16).view(np.int16)
            continue
        # A sum with a number 2**13 times as large has its last place where float16 has its own: the addition rounds.
        np.maximum(exponents, _SMALLEST[: part.size], out=exponents)
        np.add(exponents, _MAGIC, out=exponents)
        np.add(part, magic, out=rounded)
        np.subtract(rounded, magic, out=rounded)
        np.multiply(rounded, np.float32(2.0**-_BIAS), out=rounded)
        np.right_shift(bits, _SHIFT, out=bits)
        np.copyto(out, bits, casting="unsafe")
        sign = np.bitwise_and(part.view(np.int16)[1::2], _SIGN, out=exponents.view(np.int16)[: part.size])
        np.bitwise_or(out, sign, out=out)
    return halves


def cast(values: NDArray[np.floating[Any]], dtype: str, scale: float = 1.0) -> NDArray[np.floating[Any]]:
    """Return `values`, contiguous, as `dtype` ("float16" or "float32"); times `scale` in float32 if that is not 1."""
    if values.dtype == np.float16 and (scale != 1.0 or dtype == "float32"):
        values = to_float32(values, scale)
    elif scale != 1.0:
        values = values.astype(np.float32) * np.float32(scale)
    if values.dtype == np.float32 and dtype == "float16":
        return to_float16(values)
    return values.astype(dtype, copy=False)


def all_finite(values: NDArray[np.generic]) -> bool:
    """True when no element is NaN or infinite, read off the exponent bits of float16: several times faster."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    exponent = np.uint16(0x7C00)
    return bool((values.view(np.uint16) & exponent).max(initial=0) < exponent)
