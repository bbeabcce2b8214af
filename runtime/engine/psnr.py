"""How close results come to a reference: PSNR, of networks' outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def psnr(results: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return how close results come to a reference of their shape, in dB.

    The reference's largest value over the root mean square of the difference. inf: they are equal; -inf: the reference
    is zero, and they are not.
    """
    expected = reference.astype(np.float64)
    error = float(np.sqrt(np.mean((results.astype(np.float64) - expected) ** 2)))
    if error == 0:
        return math.inf
    top = float(np.abs(expected).max())
    return 20 * math.log10(top / error) if top > 0 else -math.inf
