"""A weight in fewer bits, as an operation: what takes the place of its `const` in the program.

Core ML decompresses `constexpr_*` operations itself, when it loads a model or when it runs it. iOS 16 has attributes
and packed bytes, iOS 18 inputs and types of 4 and 6 bits; the bytes in weight.bin are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from glassine.convert.mlmodel import argument, operation, stored, value
from glassine.convert.palettize import Form, Item
from glassine.errors import ConversionError
from glassine.models.mil import IOS18, Operation

# (item or literal zeros, shape, dtype) -> offset in weight.bin
Place = Callable[[Item | bytes, tuple[int, ...], str], int]


def compressed(constant: Operation, form: Form, version: int, place: Place) -> bytes:
    """Return the MIL operation that gives the value of `constant` from what `form` stores.

    Raises:
        ConversionError: a table for each group of channels needs iOS 18.
    """
    (out,) = constant.outputs
    if form.group and version < IOS18:
        raise ConversionError(f"palette {form}: a table a group of channels needs the operations of macOS 15")
    if version >= IOS18:
        op_type, values = _ios18(form, out.shape, place)
        inputs = {name: argument(content) for name, content in values.items()}
        return operation(op_type, constant.name, [out], inputs, {})
    op_type, values = _ios16(form, out.shape, place)
    return operation(op_type, constant.name, [out], {}, values)


def _ios18(form: Form, shape: tuple[int, ...], place: Place) -> tuple[str, dict[str, bytes]]:
    held = {item: _stored(place, item, *rest) for item, rest in form.items(shape).items()}
    if form.kind == "int8":
        return "constexpr_blockwise_shift_scale", {"data": held["values"], "scale": held["scales"]}
    return "constexpr_lut_to_dense", {"indices": held["indices"], "lut": held["table"]}


def _ios16(form: Form, shape: tuple[int, ...], place: Place) -> tuple[str, dict[str, bytes]]:
    if form.kind == "int8":
        channels = shape[:1]
        return "constexpr_affine_dequantize", {
            "quantized_data": _stored(place, "values", shape, "int8"),
            "zero_point": _stored(place, bytes(channels[0]), channels, "int8"),
            "scale": _stored(place, "scales", channels, "float16"),
            "axis": value(np.int32(0)),
        }
    packed = (-(-math.prod(shape) * form.bits // 8),)
    return "constexpr_lut_to_dense", {
        "indices": _stored(place, "indices", packed, "uint8"),
        "lut": _stored(place, "table", (1 << form.bits,), "float16"),
        "shape": value(np.array(shape, np.uint32)),
    }


def _stored(place: Place, item: Item | bytes, shape: tuple[int, ...], dtype: str) -> bytes:
    """The value that a record of weight.bin holds."""
    return stored(dtype, shape, place(item, shape, dtype))
