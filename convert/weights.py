"""Weights by canonical name: shapes at once, values on request. They stack: `Patched(file, [lora])` is one too."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Checkpoint, Tensor
from glassine.convert.names import Source

_SPAN_DTYPES = {"F16": "float16", "F32": "float32"}


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

    def key(self, name: str) -> str:
        """The key in the source."""
        ...

    def origin(self, name: str) -> str:
        """File and key, for messages."""
        ...


class Patch(Protocol):
    """Changes over some of a source's weights: a LoRA, a LayerDiffuse diff, an embedding."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The weights it changes or adds, with the shape they have afterwards."""
        ...

    def apply(self, name: str, weight: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return the whole weight, changed; `weight` is what lies below, in its own shape, or None."""
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

    def key(self, name: str) -> str:
        """Its name."""
        return name

    def origin(self, name: str) -> str:
        """For messages."""
        return f'{self._origin}: tensor "{name}"'


class Patched:
    """A source with patches over it, the first one at the bottom; computed in float32, a whole tensor at a time."""

    def __init__(self, base: WeightSource, patches: Sequence[Patch]) -> None:
        self._base = base
        self._patches = patches
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **base.shapes,
            **{name: shape for patch in patches for name, shape in patch.shapes.items()},
        }
        self._over = {name: [p for p in patches if name in p.shapes] for p in patches for name in p.shapes}
        self._last = threading.local()  # a tensor is read piece by piece, by one of several threads

    def span(self, name: str) -> Span | None:
        """Where the bytes lie, if no patch touches them."""
        return None if name in self._over else self._base.span(name)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop)."""
        if name not in self._over:
            return self._base.read(name, start, stop)
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.values = name, self._computed(name)
        values: NDArray[np.float32] = self._last.values[start:stop]
        if stop == self._last.values.size:
            self._last.name = self._last.values = None
        return values

    def _computed(self, name: str) -> NDArray[np.float32]:
        weight: NDArray[np.float32] | None = None
        if name in self._base.shapes:
            shape = self._base.shapes[name]
            weight = self._base.read(name, 0, math.prod(shape)).astype(np.float32).reshape(shape)
        for patch in self._over[name]:
            weight = patch.apply(name, weight)
            if weight.shape != patch.shapes[name]:
                raise AssertionError(f"{patch.origin(name)} made {weight.shape}, said {patch.shapes[name]}")
        assert weight is not None
        return weight.reshape(-1)

    def key(self, name: str) -> str:
        """The key in the source, or in the patch that adds the weight."""
        return self._base.key(name) if name in self._base.shapes else name

    def origin(self, name: str) -> str:
        """File and key of the source and of every patch over it."""
        files = [self._base.origin(name)] if name in self._base.shapes else []
        return " with ".join([*files, *(patch.origin(name) for patch in self._over.get(name, ()))])


class FileWeights:
    """One part of a checkpoint under its canonical names: the bottom of a stack."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, Source]) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self.shapes: Mapping[str, tuple[int, ...]] = {name: self._shape(source) for name, source in names.items()}

    def _tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensors[self._names[name].key]

    def _shape(self, source: Source) -> tuple[int, ...]:
        shape = self._checkpoint.tensors[source.key].shape
        if source.third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if source.transposed else shape

    def _start(self, name: str) -> int:
        """The first element of `name` in its tensor; not 0 for the lower thirds of a stacked matrix."""
        third = self._names[name].third
        return 0 if third is None else third * math.prod(self.shapes[name])

    def span(self, name: str) -> Span | None:
        """Where the bytes lie; None when they are not float16 or float32 in the right order, or in a pickle."""
        tensor = self._tensor(name)
        if tensor.dtype not in _SPAN_DTYPES or tensor.offset < 0 or self._names[name].transposed:
            return None
        dtype = _SPAN_DTYPES[tensor.dtype]
        size = np.dtype(dtype).itemsize
        nbytes = math.prod(self.shapes[name]) * size
        return Span(tensor.path, tensor.offset + self._start(name) * size, nbytes, dtype)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop), decoded exactly."""
        tensor = self._tensor(name)
        if self._names[name].transposed:
            matrix = tensor.read().reshape(tensor.shape)
            return np.ascontiguousarray(matrix.T).reshape(-1)[start:stop]
        first = self._start(name)
        return tensor.read(first + start, first + stop)

    def key(self, name: str) -> str:
        """The key in the source."""
        return self._names[name].key

    def origin(self, name: str) -> str:
        """File and key, for messages."""
        tensor = self._tensor(name)
        return f'{tensor.path}: tensor "{tensor.key}"'
