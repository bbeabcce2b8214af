"""weight.bin: a memory-mapped store of tensors, each found by the offset of its record.

Layout (Core ML's MILBlob storage, version 2, little endian): a 64-byte header (count, version), then records, each
at a multiple of 64 bytes: 64 bytes of metadata (magic, dtype, size in bytes, offset of the data, padding bits) and
the data. A package is untrusted: every number is checked against the file before anything is read.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.errors import PackageError

_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_MAGIC = 0xDEADBEEF
_ALIGNMENT = 64

# dtype -> (code in the file, bits per element, NumPy dtype it is read as)
_DTYPES: dict[str, tuple[int, int, str]] = {
    "float16": (1, 16, "<f2"),
    "float32": (2, 32, "<f4"),
    "uint8": (3, 8, "u1"),
    "int8": (4, 8, "i1"),
    "bfloat16": (5, 16, "<u2"),
    "int16": (6, 16, "<i2"),
    "uint16": (7, 16, "<u2"),
    "int4": (8, 4, "i1"),
    "uint1": (9, 1, "u1"),
    "uint2": (10, 2, "u1"),
    "uint4": (11, 4, "u1"),
    "uint3": (12, 3, "u1"),
    "uint6": (13, 6, "u1"),
    "int32": (14, 32, "<i4"),
    "uint32": (15, 32, "<u4"),
}


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int, *, signed: bool = False) -> NDArray[np.generic]:
    """Return the first `count` elements of `bits` bits each, as (u)int8.

    Elements are packed from the least significant bit upwards and may cross bytes; signed ones are two's complement.

    Raises:
        ValueError: there are fewer bits.
    """
    if packed.size * 8 < count * bits:
        raise ValueError(f"{packed.size} bytes cannot hold {count} elements of {bits} bits")
    if bits == 8:
        elements = packed[:count]
    else:
        span = math.lcm(bits, 8)  # bits after which elements and bytes line up again
        groups = -(-count * bits // span)
        padded = np.zeros(groups * span // 8, np.uint8)
        used = min(packed.size, padded.size)
        padded[:used] = packed[:used]
        columns = padded.reshape(groups, span // 8)
        word = np.zeros(groups, np.uint32)
        for byte in range(span // 8):
            word |= columns[:, byte].astype(np.uint32) << np.uint32(8 * byte)
        per_group = span // bits
        unpacked = np.empty((groups, per_group), np.uint8)
        for index in range(per_group):
            unpacked[:, index] = (word >> np.uint32(index * bits)) & np.uint32((1 << bits) - 1)
        elements = unpacked.reshape(-1)[:count]
    if not signed:
        return elements
    sign = np.uint8(1 << (bits - 1))
    return np.asarray(((elements ^ sign) - sign).view(np.int8))


class WeightFile:
    """One weight.bin, mapped and never read as a whole."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            PackageError: the file is missing, empty or has no valid header.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                # A private writable mapping: NumPy arrays over it count as writable (torch wants that), no byte of
                # the file can change, and pages that are only read are never copied.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise PackageError(f"{path}: the weights cannot be read ({error}); convert the model again") from None
        self.size = len(self._map)
        if self.size < _ALIGNMENT or _HEADER.unpack_from(self._map)[1] != 2:
            raise PackageError(f"{path}: not a Core ML weight file of version 2; convert the model again")

    def read(self, offset: int, dtype: str, shape: tuple[int, ...], *, name: str) -> NDArray[np.generic]:
        """Return the tensor recorded at `offset`: a view of the mapping, or unpacked if its elements are sub-byte.

        Raises:
            PackageError: the record is outside the file, of another dtype, or of another size than `shape` needs.
        """

        def refuse(what: str) -> PackageError:
            return PackageError(f"{self.path}: the record of {name!r} at {offset} {what}; convert the model again")

        if dtype not in _DTYPES:
            raise refuse(f"has dtype {dtype}, which weight files cannot hold")
        if offset % _ALIGNMENT or not _ALIGNMENT <= offset <= self.size - _RECORD.size:
            raise refuse(f"is not inside the file of {self.size} bytes")
        magic, code, size, start, _padding = _RECORD.unpack_from(self._map, offset)
        expected_code, bits, read_as = _DTYPES[dtype]
        if magic != _MAGIC or code != expected_code:
            raise refuse(f"has magic {magic:#x} and dtype code {code}, expected {_MAGIC:#x} and {expected_code}")
        count = math.prod(shape)
        needed = -(-count * bits // 8)
        if size != needed:
            raise refuse(f"holds {size} bytes, expected {needed} for {dtype} {shape}")
        if start > self.size or size > self.size - start:
            raise refuse(f"points to bytes {start} to {start + size} of a file of {self.size}")
        if bits < 8:
            packed = np.frombuffer(self._map, np.uint8, size, start)
            return unpack_bits(packed, bits, count, signed=dtype.startswith("int")).reshape(shape)
        return np.frombuffer(self._map, np.dtype(read_as), count, start).reshape(shape)

    def release(self) -> None:
        """Give the pages read so far back to the system; they are read again from the file when needed."""
        if hasattr(mmap, "MADV_DONTNEED") and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
