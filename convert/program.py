"""Network -> ML Program and weight plan: the graph is written with stand-ins, so no weight is in memory here.

A network asks `Requests` for its weights and receives stand-ins (arrays without memory that know their name). `lower`
turns the program into the bytes of model.mlmodel and a `Plan`: which record of weight.bin holds which weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from glassine.convert.checkpoint import shorten
from glassine.convert.constexpr import compressed
from glassine.convert.palettize import MAIN_ITEMS, Form, Item, Loss, Palette
from glassine.errors import ConversionError

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Program

# Core ML's blob file, MILBlob/Blob/StorageFormat.hpp: a 64-byte header, then per record 64 bytes of metadata and the
# data, every record at a multiple of 64. A program's offset points at the metadata.
ALIGNMENT = 64
BLOB_DTYPES = {
    "float16": 1, "float32": 2, "uint8": 3, "int8": 4, "int16": 6, "uint16": 7, "uint4": 11, "uint6": 13, "int32": 14,
    "uint32": 15,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """What a network asked for: canonical name, shape, a factor applied in float32, and the dtype to store."""

    name: str
    shape: tuple[int, ...]
    scale: float
    dtype: Literal["float16", "float32"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One item of what a weight is stored as in fewer bits; `shape` is the weight's in the program."""

    weight: Weight
    shape: tuple[int, ...]
    form: Form
    item: Item


Content = Weight | Encoded | bytes


class StandIn(np.ndarray[Any, np.dtype[Any]]):
    """A zero-stride array in the place of a weight: its shape and dtype are right, its values do not exist.

    Only a reshape keeps the `weight`; whatever else NumPy makes of a stand-in has none and is refused by `lower`.
    """

    weight: Weight | None

    @classmethod
    def of(cls, weight: Weight) -> StandIn:
        """Make the stand-in of `weight`."""
        fill = np.zeros((), dtype=weight.dtype)
        array = np.broadcast_to(fill, weight.shape).view(cls)
        array.weight = weight
        return array

    def __array_finalize__(self, obj: object) -> None:
        self.weight = None

    def reshape(self, *shape: Any, **kwargs: Any) -> StandIn:
        """Reshape; the elements keep their order, so the result stands for the same weight."""
        result: StandIn = super().reshape(*shape, **kwargs)
        result.weight = self.weight
        return result


class Requests:
    """The `weights` argument of a network: hands out one stand-in per canonical name.

    What does not fit is collected, so that `check` can name all of it at once.

    shapes: the canonical weights there are; None accepts every name (for programs without a checkpoint). renamed:
    canonical name -> the name that the plan knows the weight by, where several networks share one plan.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]] | None = None, renamed: Mapping[str, str] | None = None
    ) -> None:
        self._shapes = shapes
        self.renamed: Mapping[str, str] = {} if renamed is None else renamed
        self._missing: list[str] = []
        self._misshapen: list[str] = []
        self.asked: dict[str, tuple[int, ...]] = {}

    def __call__(
        self, name: str, shape: Collection[int], *, scale: float = 1.0, dtype: DTypeLike = np.float16
    ) -> StandIn:
        """Return the stand-in for the weight `name` in the `shape` the network wants.

        The elements are the source's, in its order; 1-sized dimensions may differ (a 1x1 convolution is a matrix).

        Raises:
            ConversionError: asked for twice.
        """
        shape = tuple(int(size) for size in shape)
        if name in self.asked:
            raise ConversionError(f"{name}: the network asks for this weight twice; it has to reuse the first answer")
        self.asked[name] = shape
        if self._shapes is not None:
            stored = self._shapes.get(name)
            if stored is None:
                self._missing.append(f"{name} {shape}")
            elif [size for size in stored if size != 1] != [size for size in shape if size != 1]:
                self._misshapen.append(f"{name} is {stored}, expected {shape}")
        stored_as: Literal["float16", "float32"] = "float32" if np.dtype(dtype) == np.float32 else "float16"
        return StandIn.of(Weight(self.renamed.get(name, name), shape, float(scale), stored_as))

    def check(self, source: str) -> None:
        """Raise for everything the network asked for and `source` could not give.

        Raises:
            ConversionError: weights are missing or have another shape.
        """
        if self._missing:
            raise ConversionError(
                f"{source}: {len(self._missing)} weights are missing: {shorten(self._missing)}; "
                "the file is incomplete or of another kind of model"
            )
        if self._misshapen:
            raise ConversionError(
                f"{source}: {len(self._misshapen)} weights have another shape: {shorten(self._misshapen)}"
            )


@dataclass(frozen=True, slots=True)
class Record:
    """One record of weight.bin: at `offset`, a weight of the source, a part of one, or a literal of the graph."""

    offset: int
    shape: tuple[int, ...]
    dtype: str
    content: Content

    @property
    def bits(self) -> int:
        """Size of the data, in bits; the last byte may be filled up."""
        return int(np.prod(self.shape, dtype=np.int64)) * bits_of(self.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the data, in bytes."""
        return -(-self.bits // 8)

    @property
    def data_offset(self) -> int:
        """Where the data begins: behind the metadata."""
        return self.offset + ALIGNMENT


def bits_of(dtype: str) -> int:
    """Return the size of one element, in bits."""
    return int(dtype[4:]) if dtype in ("uint4", "uint6") else 8 * np.dtype(dtype).itemsize


def _identity(content: Content, dtype: str) -> tuple[object, ...]:
    """What makes two records one."""
    if isinstance(content, Encoded):
        return (content.weight.name, content.weight.scale, content.shape, content.form, content.item, dtype)
    return (content.name, content.scale, dtype) if isinstance(content, Weight) else (content, dtype)


@dataclass(slots=True)
class Plan:
    """What weight.bin will hold, record by record, in ascending order.

    onto: an existing weight.bin that this one continues; `begin` is its size, and `records` are only those behind it.
    losses: by name, of the weights that were stored in fewer bits; known once they have been written.
    """

    records: list[Record] = field(default_factory=list)
    onto: Path | None = None
    begin: int = ALIGNMENT
    losses: dict[str, Loss] = field(default_factory=dict, repr=False, compare=False)
    _offsets: dict[tuple[object, ...], int] = field(default_factory=dict, repr=False, compare=False)

    def know(self, content: Content, dtype: str, offset: int) -> None:
        """Note that this is in the existing file, in the record at `offset`, and need not be stored again."""
        self._offsets.setdefault(_identity(content, dtype), offset)

    @property
    def state(self) -> tuple[object, ...]:
        """What decides the offsets that it gives."""
        return self.end, tuple(self._offsets.items())

    def place(self, content: Content, shape: tuple[int, ...], dtype: str) -> int:
        """Return the offset of this content, giving it the next free one if it is new.

        One weight in two shapes is one record: the elements are the same.
        """
        key = _identity(content, dtype)
        if key not in self._offsets:
            record = Record(self.end, shape, dtype, content)
            self.records.append(record)
            self._offsets[key] = record.offset
        return self._offsets[key]

    @property
    def end(self) -> int:
        """The next free offset, a multiple of 64."""
        return -(-self.file_size // ALIGNMENT) * ALIGNMENT

    @property
    def file_size(self) -> int:
        """Size of weight.bin: the last record is not padded."""
        return self.records[-1].data_offset + self.records[-1].nbytes if self.records else self.begin

    def weights(self) -> Iterator[tuple[Record, Weight]]:
        """The records that are weights of the source as they are."""
        for record in self.records:
            if isinstance(record.content, Weight):
                yield record, record.content

    @property
    def parameters(self) -> int:
        """Number of elements that come from the source."""
        plain = sum(int(np.prod(record.shape, dtype=np.int64)) for record, _ in self.weights())
        shapes = (c.shape for c in (r.content for r in self.records) if isinstance(c, Encoded) and c.item in MAIN_ITEMS)
        return plain + sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The words in a package: who made the model, what it is, what its inputs and outputs mean."""

    author: str = ""
    licence: str = ""
    version: str = ""
    summary: str = ""
    features: Mapping[str, str] = field(default_factory=dict)
    user_defined: Mapping[str, str] = field(default_factory=dict)


Tensors = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """A program ready to be written: the bytes of model.mlmodel, the plan of weight.bin, inputs and outputs.

    inputs, outputs: name -> (shape, "float16" | "float32" | "int32"). parameters: elements of this program's weights;
    a plan that several programs share counts those of all.
    """

    model: bytes
    plan: Plan
    inputs: Tensors
    outputs: Tensors
    parameters: int


def lower(
    program: Program, description: Description | None = None, plan: Plan | None = None, palette: Palette | None = None
) -> Lowered:
    """Turn `program` into a model and a weight plan; no weight is read.

    plan: of other programs, which this one is to share a weight.bin with: what they have too is not stored twice, what
    is new goes behind it. palette: which weights are stored in fewer bits; None: all as they are.

    Raises:
        ConversionError: a weight was folded into a constant or lost on its way through the graph.
    """
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    for name in ("common::dedup_op_and_var_names", "mil_backend::sanitize_name_strings"):
        PASS_REGISTRY[name](program)
    _check_provenance(program)
    plan = Plan() if plan is None else plan
    version = int(program.functions["main"].opset_version)
    description = Description() if description is None else description
    model = _model(program, version, description.features)
    model.mlProgram.CopyFrom(_export(program, version, plan, palette))
    return Lowered(
        # Maps inside the message (functions, attributes) are unordered unless asked for: equal input, equal bytes.
        model=described(model.SerializeToString(deterministic=True), description),
        plan=plan,
        inputs=_tensors(model.description.input),
        outputs=_tensors(model.description.output),
        parameters=_parameters(program),
    )


_DESCRIPTION, _METADATA, _USER_DEFINED = 2, 100, 100  # fields of Model, ModelDescription and Metadata


def described(model: bytes, description: Description) -> bytes:
    """Return a model that has no words yet with those of `description`; what its inputs mean aside.

    The words are the last field of a message that is the second of another: written here by hand, they need no
    coremltools where a program is known already.
    """
    words = (description.summary, description.version, description.author, description.licence)
    metadata = b"".join(_field(i, word.encode()) for i, word in enumerate(words, start=1) if word)
    for key, text in sorted(description.user_defined.items()):
        metadata += _field(_USER_DEFINED, _field(1, key.encode()) + _field(2, text.encode()))
    if not metadata:
        return model
    start, at = 0, 0
    while True:  # the first fields are the version and the description
        start = at
        tag, at = _read_varint(model, at)
        length, at = _read_varint(model, at)
        if tag == _DESCRIPTION << 3 | 2:
            said = model[at : at + length] + _field(_METADATA, metadata)
            return model[:start] + _field(_DESCRIPTION, said) + model[at + length :]


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message that has a length."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a position, and the position behind it."""
    number = shift = 0
    while True:
        byte = data[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at


def _parameters(program: Program) -> int:
    """Count the elements of the weights, each weight once."""
    values = (op.outputs[0].val for op in program.functions["main"].operations if op.op_type == "const")
    sizes = {(val.weight.name, val.weight.scale): val.size for val in values if isinstance(val, StandIn) and val.weight}
    return sum(sizes.values())


def _check_provenance(program: Program) -> None:
    """Refuse operations that computed with the values of a stand-in: there are none."""
    for operation in program.functions["main"].operations:
        if operation.op_type == "const":
            val = operation.outputs[0].val
            if isinstance(val, StandIn):
                if val.weight is None:
                    raise ConversionError(
                        f"constant {operation.name}: a weight was changed before it reached the graph"
                    )
                if not operation.outputs[0].child_ops:
                    raise ConversionError(f"{val.weight.name}: the network asked for this weight and does not use it")
            continue
        for out in operation.outputs:
            if out.val is not None and any(isinstance(var.val, StandIn) for var in operation.get_flattened_inputs()):
                raise ConversionError(f"{operation.op_type} {operation.name}: this operation would fold a weight")


def _export(program: Program, version: int, plan: Plan, palette: Palette | None) -> Any:
    """Export `program` to a MIL protobuf, placing big constants and every weight in `plan`."""
    # The exporter is coremltools' own, private but stable since 7.2; only where constants go is changed here.
    from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor, types_to_proto_primitive
    from coremltools.converters.mil.backend.mil.load import (
        MILProtoExporter,
        create_immediate_value,
        should_use_weight_file,
    )
    from coremltools.converters.mil.mil import Operation, Var

    class Exporter(MILProtoExporter):  # type: ignore[misc]
        def translate_const(self, op: Operation) -> Any:
            value = op.outputs[0].val
            weight = value.weight if isinstance(value, StandIn) else None
            if palette is None or weight is None or weight.dtype != "float16":
                return super().translate_const(op)
            form = palette.form_of(weight.name, value.shape)
            if form is None:
                return super().translate_const(op)

            def place(item: Item | bytes, shape: tuple[int, ...], dtype: str) -> int:
                content = item if isinstance(item, bytes) else Encoded(weight, value.shape, form, item)
                return plan.place(content, shape, dtype)

            return compressed(op, form, version, place)

        def get_milproto_value(self, var: Var) -> Any:
            value = var.val
            if isinstance(value, StandIn):
                # Small weights go to the file too (coremltools keeps them in the program): the plan is complete.
                assert value.weight is not None
                offset = plan.place(value.weight, value.shape, value.dtype.name)
            elif isinstance(value, np.ndarray) and should_use_weight_file(value, version):
                offset = plan.place(np.ascontiguousarray(value).tobytes(), value.shape, value.dtype.name)
            else:
                return create_immediate_value(var)
            primitive = types_to_proto_primitive(var.sym_type.get_primitive())
            return create_file_value_tensor("@model_path/weights/weight.bin", offset, value.shape, primitive)

    return Exporter(program, "", version).export()


def _model(program: Program, version: int, meanings: Mapping[str, str]) -> Any:
    """The model around the program: what an app sees of it."""
    from coremltools.converters.mil.backend.mil.helper import cast_to_framework_io_dtype
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model(specificationVersion=version)
    function = program.functions["main"]
    for features, variables in (
        (model.description.input, function.inputs.values()),
        (model.description.output, function.outputs),
    ):
        for var in variables:
            feature = features.add(name=var.name, shortDescription=meanings.get(var.name, ""))
            feature.type.multiArrayType.shape.extend(var.shape)
            feature.type.multiArrayType.dataType = cast_to_framework_io_dtype(var, is_output=False)
    return model


def _tensors(features: Any) -> Tensors:
    from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType

    names = {
        ArrayFeatureType.FLOAT16: "float16",
        ArrayFeatureType.FLOAT32: "float32",
        ArrayFeatureType.INT32: "int32",
    }
    return {
        feature.name: (tuple(feature.type.multiArrayType.shape), names[feature.type.multiArrayType.dataType])
        for feature in features
    }
