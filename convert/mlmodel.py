"""A program as the bytes of model.mlmodel: Core ML's protobuf messages, written by hand.

The messages are those of Model.proto and MIL.proto (coremltools, mlmodel/format), with their fields in ascending order
and their maps in the order of their keys, as protobuf's own deterministic serialisation has them: equal programs are
equal bytes. protobuf would need an object for each of a program's hundreds of thousands of small messages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from glassine.models.mil import IOS16, IOS18, Operation, Program, Var

# MIL.proto, DataType
_DATA_TYPES = {
    "bool": 1, "string": 2, "float16": 10, "float32": 11, "int8": 21, "int32": 23, "uint8": 31, "uint32": 33,
    "uint4": 35, "uint6": 38,
}  # fmt: skip
_ARRAYS = {"float16": 65552, "float32": 65568, "int32": 131104}  # FeatureTypes.proto, ArrayDataType
_OPSETS = {IOS16: "CoreML6", IOS18: "CoreML8"}
_BLOB = "@model_path/weights/weight.bin"
_FLOATS, _INTS, _BOOLS, _STRINGS, _BYTES = 1, 2, 3, 4, 7  # fields of TensorValue
_ML_PROGRAM = 502  # field of Model
DESCRIPTION, METADATA, USER_DEFINED = 2, 100, 100  # fields of Model, ModelDescription and Metadata


_SHORT = [bytes([number]) for number in range(128)]
_HEADS = [[bytes([number << 3 | 2, length]) for length in range(128)] for number in range(16)]


def field(number: int, content: bytes) -> bytes:
    """A field of a message that has a length: bytes, text, a message, packed numbers."""
    length = len(content)
    if number < 16 and length < 128:  # nearly all
        return _HEADS[number][length] + content
    return varint(number << 3 | 2) + varint(length) + content


def number_field(number: int, value: int) -> bytes:
    """A field of a message that is a number."""
    return varint(number << 3) + varint(value)


def varint(number: int) -> bytes:
    """A number below 2**64, seven bits a byte."""
    if number < 128:
        return _SHORT[number]
    groups = [number >> shift & 127 for shift in range(0, number.bit_length(), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a position, and the position behind it."""
    number = shift = 0
    while True:
        byte = data[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at


def model_bytes(program: Program, meanings: Mapping[str, str], constant: Callable[[Operation], bytes]) -> bytes:
    """Write a model around a program.

    Args:
        meanings: what inputs and outputs mean, in words.
        constant: writes an operation "const".
    """
    opset = _OPSETS[program.version]
    operations = [constant(op) if op.op_type == "const" else _operation(op) for op in program.operations]
    block = b"".join([*(field(2, var.name.encode()) for var in program.outputs), *(field(3, op) for op in operations)])
    function = b"".join(field(1, named(var)) for var in program.inputs.values())
    function += field(2, opset.encode()) + _entry(3, opset, block)
    description = b"".join(field(1, _feature(var, meanings)) for var in program.inputs.values())
    description += b"".join(field(10, _feature(var, meanings)) for var in program.outputs)
    return b"".join(
        [
            number_field(1, program.version),
            field(DESCRIPTION, description),
            field(_ML_PROGRAM, number_field(1, 1) + _entry(2, "main", function)),
        ]
    )


def _entry(number: int, key: str, value: bytes) -> bytes:
    """An entry of a map."""
    return field(number, field(1, key.encode()) + field(2, value))


def _map(number: int, entries: Mapping[str, bytes]) -> list[bytes]:
    """A map in protobuf's order: by key, and what begins with another key in front of that one ("pad_type", "pad")."""
    return [_entry(number, key, entries[key]) for key in sorted(entries, key=lambda key: key + "\x7f")]


def _feature(var: Var, meanings: Mapping[str, str]) -> bytes:
    """What an app sees of an input or output."""
    shape = b"".join(varint(size) for size in var.shape)
    array = field(1, shape) + number_field(2, _ARRAYS[var.dtype])
    said = meanings.get(var.name, "")
    words = field(2, said.encode()) if said else b""
    return field(1, var.name.encode()) + words + field(3, field(5, array))


def named(var: Var) -> bytes:
    """NamedValueType: a variable's name and type."""
    return field(1, var.name.encode()) + field(2, value_type(var.dtype, var.shape))


@functools.lru_cache(maxsize=4096)
def value_type(dtype: str, shape: tuple[int, ...]) -> bytes:
    """ValueType: that of a tensor; scalars have no dimensions."""
    rank = number_field(2, len(shape)) if shape else b""
    dimensions = b"".join(field(3, field(1, number_field(1, size))) for size in shape)
    return field(1, number_field(1, _DATA_TYPES[dtype]) + rank + dimensions)


def _operation(op: Operation) -> bytes:
    """Operation, of one that computes; written once, however many programs it is in."""
    if op.message is None:
        inputs = {}
        for key, value in op.inputs.items():
            variables = value if isinstance(value, list) else (value,)
            inputs[key] = b"".join([field(1, field(1, var.name.encode())) for var in variables])
        op.message = operation(op.op_type, op.name, op.outputs, inputs, {})
    return op.message


def operation(
    op_type: str, name: str, outputs: Sequence[Var], inputs: Mapping[str, bytes], attributes: Mapping[str, bytes]
) -> bytes:
    """Operation: `inputs` are messages Argument, `attributes` messages Value."""
    return b"".join(
        [
            field(1, op_type.encode()),
            *_map(2, inputs),
            *(field(3, named(var)) for var in outputs),
            *_map(5, {**attributes, "name": value(name)}),
        ]
    )


def argument(value: bytes) -> bytes:
    """Argument: one message Value."""
    return field(1, field(2, value))


def value(content: Any) -> bytes:
    """Value: an array, a number or text, in the program itself."""
    if isinstance(content, str):
        dtype, shape, kept = "string", (), field(_STRINGS, field(1, content.encode()))
    else:
        array = np.asarray(content)
        dtype, shape = array.dtype.name, array.shape
        if dtype == "float32":
            kept = field(_FLOATS, field(1, array.astype("<f4").tobytes()))
        elif dtype == "int32":
            numbers = (number & (1 << 64) - 1 for number in array.reshape(-1).tolist())
            kept = field(_INTS, field(1, b"".join(map(varint, numbers))))
        elif dtype == "bool":
            kept = field(_BOOLS, field(1, array.tobytes()))
        else:
            kept = field(_BYTES, field(1, array.tobytes()))
    return field(2, value_type(dtype, shape)) + field(3, field(1, kept))


def stored(dtype: str, shape: tuple[int, ...], offset: int) -> bytes:
    """Value: an array in weight.bin, whose record is at `offset`."""
    place = field(1, _BLOB.encode()) + number_field(2, offset)
    return field(2, value_type(dtype, shape)) + field(5, place)
