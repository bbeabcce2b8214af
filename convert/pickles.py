"""A PyTorch pickle -> names, shapes and tensors, on request only: through torch's weights-only loader, and no other.

A pickle is a program. torch's loader runs it with nothing but tensors and plain containers in reach; what it refuses
stays refused. Before it is asked, the zip around the pickle is held to what torch writes: entries stored as they are,
no larger together than the file, a small program. So neither packed nothings nor lies about lengths cost memory.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Checkpoint, Tensor
from glassine.errors import CheckpointError, MissingDependency

if TYPE_CHECKING:
    import torch

_MOST_ENTRIES = 100_000
_MOST_PROGRAM = 32 << 20  # bytes; a whole Stable Diffusion checkpoint's is 0.2 MB
_DEEPEST = 4  # dictionaries in dictionaries: {"state_dict": {...}}, {"string_to_param": {"*": ...}}
_DTYPES = {
    **{"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


@dataclass(frozen=True, slots=True)
class PickledTensor(Tensor):
    """A tensor that torch holds, mapped from the file where it can be; `offset` says nothing."""

    values: Any = None

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.floating[Any]]:
        """As `Tensor.read`: the flat elements [start, stop)."""
        if self.dtype not in {"F16", "BF16", "F32", "F64"}:
            raise CheckpointError(f'{self.path}: tensor "{self.key}" has dtype {self.dtype}, expected floats')
        stop = math.prod(self.shape) if stop is None else stop
        flat: torch.Tensor = self.values.reshape(-1)[start:stop]
        array: NDArray[np.floating[Any]] = (flat.float() if self.dtype == "BF16" else flat).numpy()
        return array


def open_pickle(path: Path) -> Checkpoint:
    """Read a .ckpt, .pt, .pth or .bin that torch.save wrote.

    Raises:
        CheckpointError: the file is damaged, of the format before PyTorch 1.6, or holds more than tensors.
        MissingDependency: torch is not installed.
    """
    _check_zip(path)
    try:
        import torch
    except ImportError:
        raise MissingDependency(
            f"{path}: reading a pickle needs torch: pip install 'glassine[portable]', or take a .safetensors file"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged program fails in any of the ways a program can
        reason = str(error).split("\n", maxsplit=1)[0][:200]
        raise CheckpointError(
            f"{path}: torch's weights-only loader refuses this file ({type(error).__name__}: {reason}); it is damaged "
            "or holds more than tensors, and is not opened in any other way: look for a .safetensors version"
        ) from None
    limit = path.stat().st_size
    tensors = {key: _tensor(path, key, values, limit) for key, values in _named(content)}
    if not tensors:
        raise CheckpointError(f"{path}: there are no named tensors in this pickle")
    return Checkpoint(path=path, tensors=tensors)


def _check_zip(path: Path) -> None:
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: expected what torch.save writes since PyTorch 1.6, a zip; this is none ({error}); older pickles "
            "are not read: open and save it with a newer PyTorch, or look for a .safetensors version"
        ) from None
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    program = max((entry.file_size for entry in entries if entry.filename.endswith(".pkl")), default=0)
    total = sum(entry.file_size for entry in entries)
    if packed or total > size or len(entries) > _MOST_ENTRIES or program > _MOST_PROGRAM:
        what = (
            f"{packed[0]} is compressed"
            if packed
            else f"{len(entries)} entries of {total} bytes, {program} of them code"
        )
        raise CheckpointError(f"{path}: not as torch.save writes it: {what}, in a file of {size} bytes")


def _named(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries; the names of those that only wrap others are left out."""
    import torch

    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif key in {"state_dict", "string_to_param"}:
            yield from _named(value, "", depth + 1)
        elif isinstance(value, Mapping) and key not in {"optimizer_states", "callbacks", "loops", "hparams"}:
            yield from _named(value, f"{prefix}{key}.", depth + 1)


def _tensor(path: Path, key: str, values: torch.Tensor, limit: int) -> PickledTensor:
    dtype = _DTYPES.get(str(values.dtype).removeprefix("torch."), "U8")
    nbytes = values.numel() * values.element_size()
    if nbytes > limit or values.is_sparse or values.is_quantized or str(values.layout) != "torch.strided":
        raise CheckpointError(
            f'{path}: tensor "{key}" {tuple(values.shape)} claims {nbytes} bytes in a file of {limit}; '
            "it is no plain tensor"
        )
    return PickledTensor(path, key, dtype, tuple(values.shape), -1, nbytes, values.detach())
