"""A weight in fewer bits, as an operation: what takes the place of its `const` in the program.

Core ML decompresses `constexpr_*` operations itself, when it loads a model or when it runs it. iOS 16 has attributes
and packed bytes, iOS 18 inputs and types of 4 and 6 bits; the bytes in weight.bin are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from glassine.convert.palettize import Form, Item
from glassine.errors import ConversionError

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Operation

IOS18 = 9  # specification versions
_FILE = "@model_path/weights/weight.bin"
# (item or literal zeros, shape, dtype) -> offset in weight.bin
Place = Callable[[Item | bytes, tuple[int, ...], str], int]


def compressed(operation: Operation, form: Form, version: int, place: Place) -> Any:
    """Return the MIL operation that gives the value of the constant `operation` from what `form` stores.

    Raises:
        ConversionError: a table for each group of channels needs iOS 18.
    """
    from coremltools.converters.mil.backend.mil.helper import create_scalar_value, create_valuetype_tensor
    from coremltools.proto import MIL_pb2

    (out,) = operation.outputs
    shape = tuple(int(size) for size in out.shape)
    if form.group and version < IOS18:
        raise ConversionError(f"palette {form}: a table a group of channels needs the operations of macOS 15")
    type_, values = (_ios18 if version >= IOS18 else _ios16)(form, shape, place)
    made = MIL_pb2.Operation(type=type_, attributes={"name": create_scalar_value(operation.name)})
    for name, value in values.items():
        if version >= IOS18:
            made.inputs[name].arguments.add().value.CopyFrom(value)
        else:
            made.attributes[name].CopyFrom(value)
    half = create_valuetype_tensor(shape, MIL_pb2.FLOAT16)
    made.outputs.add(name=out.name).type.CopyFrom(half)
    return made


def _ios18(form: Form, shape: tuple[int, ...], place: Place) -> tuple[str, dict[str, Any]]:
    stored = {item: _stored(place, item, *rest) for item, rest in form.items(shape).items()}
    if form.kind == "int8":
        return "constexpr_blockwise_shift_scale", {"data": stored["values"], "scale": stored["scales"]}
    return "constexpr_lut_to_dense", {"indices": stored["indices"], "lut": stored["table"]}


def _ios16(form: Form, shape: tuple[int, ...], place: Place) -> tuple[str, dict[str, Any]]:
    from coremltools.converters.mil.backend.mil.helper import create_scalar_value, create_tensor_value

    if form.kind == "int8":
        channels = shape[:1]
        return "constexpr_affine_dequantize", {
            "quantized_data": _stored(place, "values", shape, "int8"),
            "zero_point": _stored(place, bytes(channels[0]), channels, "int8"),
            "scale": _stored(place, "scales", channels, "float16"),
            "axis": create_scalar_value(np.int32(0)),
        }
    packed = (-(-math.prod(shape) * form.bits // 8),)
    return "constexpr_lut_to_dense", {
        "indices": _stored(place, "indices", packed, "uint8"),
        "lut": _stored(place, "table", (1 << form.bits,), "float16"),
        "shape": create_tensor_value(np.array(shape, np.uint32)),
    }


def _stored(place: Place, item: Item | bytes, shape: tuple[int, ...], dtype: str) -> Any:
    """The value that a record of weight.bin holds."""
    from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor
    from coremltools.proto import MIL_pb2

    return create_file_value_tensor(_FILE, place(item, shape, dtype), shape, MIL_pb2.DataType.Value(dtype.upper()))
