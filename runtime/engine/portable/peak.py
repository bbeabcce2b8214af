"""What a device of the portable engine can do at most: the two calls that are timed for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from glassine.runtime.engine.portable.numerics import open_device


def peak_calls(device: str, side: int, size: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a product of float32 matrices, `side` x `side`, and a copy of `size` bytes; each ends when it is done.

    Raises:
        EngineError: there is no such device.
    """
    place = open_device(device)
    matrix = torch.rand((side, side), device=place)
    source = torch.ones(size // 4, device=place)
    target = torch.zeros_like(source)
    return lambda: float((matrix @ matrix)[0, 0]), lambda: float(target.copy_(source)[0])
