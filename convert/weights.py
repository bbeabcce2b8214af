"""Weights by canonical name: shapes at once, values on request. Views of this kind stack (a LoRA over a file)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor's bytes lie, ready to be copied: little-endian, C order, of NumPy dtype `dtype`."""

    path: Path
    offset: int
    nbytes: int
    dtype: str


class WeightSource(Protocol):
    """What the package writer draws from; every name is canonical."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight there is, and its shape."""
        ...

    def span(self, name: str) -> Span | None:
        """Where the bytes lie, or None when they have to be computed."""
        ...

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop), in the source's precision or a wider one."""
        ...

    def origin(self, name: str) -> str:
        """File and key, for messages."""
        ...


class Arrays:
    """Weights that are in memory."""

    def __init__(self, arrays: Mapping[str, NDArray[np.floating[Any]]], origin: str = "memory") -> None:
        self._arrays = arrays
        self._origin = origin
        self.shapes: Mapping[str, tuple[int, ...]] = {name: array.shape for name, array in arrays.items()}

    def span(self, name: str) -> Span | None:
        """None: there is no file."""
        return None

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop)."""
        return self._arrays[name].reshape(-1)[start:stop]

    def origin(self, name: str) -> str:
        """For messages."""
        return f'{self._origin}: tensor "{name}"'
