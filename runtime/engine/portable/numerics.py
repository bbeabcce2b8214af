"""How numbers are held and rounded: what a MIL dtype becomes in PyTorch.

fp32  every float of the program is computed and kept in float32; casts between float types change nothing, so the
      result is the program's mathematics, not the hardware's. The default, and the one to compare with a reference.
fp16  what the program declares float16 is rounded to float16 after every operation (computed in float32, as the
      hardware accumulates), what it declares float32 stays float32. The first operation whose result leaves the
      range of float16 is an error that names it.

Integers are exact in both. Types PyTorch cannot compute with are held in the next wider one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassine.errors import EngineError

_FLOATS = ("float16", "float32", "float64", "bfloat16")
_TORCH = {
    "bool": torch.bool,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
}
_PIECE = 1 << 20  # numbers that are rounded at a time: attention has results of gigabytes
# The names the `dtype` parameter of cast and its like takes.
MIL_NAMES = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True, slots=True)
class Numerics:
    """Where and how exactly to compute."""

    device: torch.device
    rounds: bool

    def exact(self) -> AbstractContextManager[None]:
        """Return a context in which float32 is float32: cuDNN convolves in TF32 by default, 10 bits of mantissa."""
        if self.device.type == "cuda":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return nullcontext()

    def dtype(self, name: str) -> torch.dtype:
        """Return the PyTorch dtype that holds a MIL dtype ("float16", or "fp16" as `cast` says it).

        Raises:
            EngineError: a type tensors cannot have.
        """
        name = MIL_NAMES.get(name, name)
        if name in _FLOATS:
            return torch.float32
        if name not in _TORCH:
            raise EngineError(f"the portable engine has no numbers of type {name!r}; expected a float, int or bool")
        return _TORCH[name]

    def tensor(self, array: NDArray[np.generic], dtype: str) -> Tensor:
        """Return `array` as a tensor of the MIL dtype on the device; a float32 array on the CPU is not copied."""
        if dtype == "bfloat16":  # read as bits, NumPy has no such type
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        elif array.dtype in (np.uint16, np.uint32):
            array = array.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype(dtype)).reshape(array.shape)

    def round(self, value: Tensor, *, operation: str) -> Tensor:
        """Round to float16 and back.

        Raises:
            EngineError: a finite value became infinite; the message names `operation` and the value.
        """
        rounded = torch.empty_like(value, memory_format=torch.contiguous_format)
        pieces = (torch.split(flat, _PIECE) for flat in (rounded.view(-1), value.reshape(-1)))
        for flat, exact in zip(*pieces, strict=True):
            flat.copy_(exact.half())
            if bool(torch.isinf(flat).any()):
                overflowed = torch.isinf(flat) & torch.isfinite(exact)
                if bool(overflowed.any()):
                    worst = float(exact[overflowed].abs().max())
                    raise EngineError(
                        f"{operation} overflows float16: it computed {worst:.6g}, the largest float16 is 65504; "
                        "keep this part of the program in float32 or scale its input down"
                    )
        return rounded


def devices() -> list[str]:
    """The devices that PyTorch has on this machine."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, there in present.items() if there]


def open_device(name: str) -> torch.device:
    """Return the PyTorch device of this name.

    Raises:
        EngineError: no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineError(f'device "{name}" is unknown; expected "cpu", "cuda" or "mps"') from None
    if device.type not in devices():
        raise EngineError(
            f'device "{name}" is not available to PyTorch {torch.__version__} on this machine; '
            f"available: {', '.join(devices())}"
        )
    return device
