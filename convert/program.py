"""Network -> ML Program and weight plan: the graph is written with stand-ins, so no weight is in memory here.

A network asks `Requests` for its weights and receives stand-ins (arrays without memory that know their name). `lower`
turns the program into the bytes of model.mlmodel and a `Plan`: which record of weight.bin holds which weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from glassine.convert.checkpoint import shorten
from glassine.convert.constexpr import compressed
from glassine.convert.mlmodel import (
    DESCRIPTION,
    METADATA,
    USER_DEFINED,
    model_bytes,
    operation,
    read_varint,
    stored,
    value,
)
from glassine.convert.mlmodel import field as field_of
from glassine.convert.palettize import MAIN_ITEMS, Form, Item, Loss, Palette
from glassine.errors import ConversionError
from glassine.models.mil import IOS16, IOS18, Operation, Program

# Core ML's blob file, MILBlob/Blob/StorageFormat.hpp: a 64-byte header, then per record 64 bytes of metadata and the
# data, every record at a multiple of 64. A program's offset points at the metadata.
ALIGNMENT = 64
BLOB_DTYPES = {
    "float16": 1, "float32": 2, "uint8": 3, "int8": 4, "int16": 6, "uint16": 7, "uint4": 11, "uint6": 13, "int32": 14,
    "uint32": 15,
}  # fmt: skip
# What goes to weight.bin rather than into the program, if it has ten elements or more: as coremltools decides it.
_IN_FILE = {
    IOS16: ("float16", "float32", "uint8", "int8"),
    IOS18: ("float16", "float32", "uint8", "int8", "uint16", "int16", "int32", "uint32"),
}
_IDENTIFIER = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = {
    *("any", "bool", "dict", "false", "func", "list", "program", "state", "string", "tensor", "true", "tuple"),
    *("bf16", "fp16", "fp32", "fp64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
}


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


@dataclass(frozen=True, slots=True)
class Source:
    """What was written: a program, what its inputs and outputs mean, which of its weights are in fewer bits."""

    program: Program
    meanings: Mapping[str, str]
    palette: Palette | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """A program ready to be written: the bytes of model.mlmodel, the plan of weight.bin, inputs and outputs.

    inputs, outputs: name -> (shape, "float16" | "float32" | "int32"). parameters: elements of this program's weights;
    a plan that several programs share counts those of all. source: what it was made of, until it has been cut.
    """

    model: bytes
    plan: Plan
    inputs: Tensors
    outputs: Tensors
    parameters: int
    source: Source | None = field(default=None, repr=False, compare=False)


def lower(
    program: Program, description: Description | None = None, plan: Plan | None = None, palette: Palette | None = None
) -> Lowered:
    """Turn `program` into a model and a weight plan; no weight is read.

    plan: of other programs, which this one is to share a weight.bin with: what they have too is not stored twice, what
    is new goes behind it. palette: which weights are stored in fewer bits; None: all as they are.

    Raises:
        ConversionError: a weight was folded into a constant or lost on its way through the graph.
    """
    _settle_names(program)
    _check_provenance(program)
    plan = Plan() if plan is None else plan
    description = Description() if description is None else description
    constant = partial(write_constant, version=program.version, place=plan.place, palette=palette)
    written = model_bytes(program, description.features, constant)
    return Lowered(
        model=described(written, description),
        plan=plan,
        inputs={name: (var.shape, var.dtype) for name, var in program.inputs.items()},
        outputs={var.name: (var.shape, var.dtype) for var in program.outputs},
        parameters=_parameters(program),
        source=Source(program, description.features, palette),
    )


def described(model: bytes, description: Description) -> bytes:
    """Return a model that has no words yet with those of `description`; what its inputs mean aside.

    The words are the last field of a message that is the second of another.
    """
    words = (description.summary, description.version, description.author, description.licence)
    metadata = b"".join(field_of(i, word.encode()) for i, word in enumerate(words, start=1) if word)
    for key, text in sorted(description.user_defined.items()):
        metadata += field_of(USER_DEFINED, field_of(1, key.encode()) + field_of(2, text.encode()))
    if not metadata:
        return model
    start, at = 0, 0
    while True:  # the first fields are the version and the description
        start = at
        tag, at = read_varint(model, at)
        length, at = read_varint(model, at)
        if tag == DESCRIPTION << 3 | 2:
            said = model[at : at + length] + field_of(METADATA, metadata)
            return model[:start] + field_of(DESCRIPTION, said) + model[at + length :]


def _parameters(program: Program) -> int:
    """Count the elements of the weights, each weight once."""
    values = (op.outputs[0].val for op in program.operations if op.op_type == "const")
    sizes = {(val.weight.name, val.weight.scale): val.size for val in values if isinstance(val, StandIn) and val.weight}
    return sum(sizes.values())


def _settle_names(program: Program) -> None:
    """Give what bears the name of something before it a number behind it; inputs and outputs keep theirs.

    Values and operations have names of their own kind: an operation may be called as another one's result.

    Raises:
        ConversionError: a name that Core ML does not take.
    """
    values, operations = {*program.inputs, *(var.name for var in program.outputs)}, set[str]()
    for op in program.operations:
        op.name = _own_name(op.name, operations)
        for var in op.outputs:
            if var not in program.outputs:
                var.name = _own_name(var.name, values)
    wrong = sorted(name for name in values | operations if name in _RESERVED or not _IDENTIFIER.fullmatch(name))
    if wrong:
        raise ConversionError(f"names of the graph that Core ML does not take: {shorten(wrong)}")


def _own_name(name: str, taken: set[str]) -> str:
    """Return `name`, or the first one with a number behind it that is not taken, and take it."""
    own, number = name, 0
    while own in taken:
        number += 1
        own = f"{name}_{number}"
    taken.add(own)
    return own


def _check_provenance(program: Program) -> None:
    """Refuse operations that would compute with a weight alone, whose values are not there, and weights without use."""
    weights = {op.outputs[0]: op.outputs[0].val for op in program.operations if op.op_type == "const"}
    weights = {var: val for var, val in weights.items() if isinstance(val, StandIn)}
    used = set()
    for op in program.operations:
        read = [var for var in op.reads if var in weights]
        used.update(read)
        if read and all(var.op is not None and var.op.op_type == "const" for var in op.reads):
            raise ConversionError(f"{op.op_type} {op.name}: this operation would fold a weight")
    for var, val in weights.items():
        if val.weight is None:
            raise ConversionError(f"constant {var.name}: a weight was changed before it reached the graph")
        if var not in used:
            raise ConversionError(f"{val.weight.name}: the network asked for this weight and does not use it")


def write_constant(
    op: Operation, version: int, place: Callable[[Content, tuple[int, ...], str], int], palette: Palette | None
) -> bytes:
    """Write a constant: in the program, or in weight.bin where `place` gives the offsets of what it is stored as."""
    (out,) = op.outputs
    val = out.val
    if isinstance(val, StandIn):
        # Small weights go to the file too (coremltools keeps them in the program): the plan is complete.
        assert val.weight is not None
        weight = val.weight
        form = None if palette is None or weight.dtype != "float16" else palette.form_of(weight.name, val.shape)
        if form is not None:

            def place_item(item: Item | bytes, shape: tuple[int, ...], dtype: str) -> int:
                return place(item if isinstance(item, bytes) else Encoded(weight, val.shape, form, item), shape, dtype)

            return compressed(op, form, version, place_item)
        held = stored(out.dtype, out.shape, place(weight, out.shape, out.dtype))
    elif out.dtype in _IN_FILE[version] and val.size >= 10:
        held = stored(out.dtype, out.shape, place(np.ascontiguousarray(val).tobytes(), out.shape, out.dtype))
    else:
        held = value(val)
    return operation("const", op.name, [out], {}, {"val": held})
