"""An .mlpackage as plain data: functions, operations, types, and constants that read themselves when asked.

Torch-free and coremltools-free, so that inspecting a package is instant. Everything is validated on the way in:
names must be bound before use, constants must lie inside the weight file, paths inside the package.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, PackageError
from glassine.runtime.engine.portable import proto
from glassine.runtime.engine.portable.weights import WeightFile, unpack_bits

Kind = Literal["tensor", "list", "tuple", "dictionary", "state"]

# MIL's DataType enum -> our names, which are NumPy's where NumPy has the type.
_DTYPES = {
    1: "bool", 2: "string", 10: "float16", 11: "float32", 12: "float64", 13: "bfloat16",
    21: "int8", 22: "int16", 23: "int32", 24: "int64", 25: "int4",
    31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6",
    39: "uint3", 40: "float8_e4m3fn", 41: "float8_e5m2",
}  # fmt: skip
_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
# ArrayFeatureType.ArrayDataType: two's complement of 0x10000 | bits for signed, plain for floats.
_FEATURE_DTYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8"}
_WEIGHT_PATH = re.compile(r"@model_path/weights/([\w.\-]+)")


@dataclass(frozen=True, slots=True)
class ValueType:
    """The type of a value; a dimension of None is known only when running. Lists give the type of their elements."""

    kind: Kind
    dtype: str = ""
    shape: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Variable:
    """A name that one operation, or the caller, binds."""

    name: str
    type: ValueType


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal (`value`), or a record of a weight file (`file`, `offset`). Strings come as NumPy `str_` arrays."""

    name: str
    type: ValueType
    value: NDArray[Any] | None = None
    file: WeightFile | None = None
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; a constant's dimensions are always known."""
        return tuple(dim for dim in self.type.shape if dim is not None)

    @property
    def stored_bytes(self) -> int:
        """Bytes it takes in the package."""
        return -(-math.prod(self.shape) * bits(self.type.dtype) // 8)

    def array(self) -> NDArray[Any]:
        """Return its values: a view of the mapped file where that is possible.

        Raises:
            PackageError: the weight file does not hold it.
        """
        if self.file is not None:
            return self.file.read(self.offset, self.type.dtype, self.shape, name=self.name)
        assert self.value is not None
        return self.value


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. `inputs` holds a tuple per parameter (variadic parameters have several entries): names of
    variables, or constants given in place. `attributes` are the constants of `const` and older `constexpr_*` ops.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[Variable, ...]
    attributes: Mapping[str, Constant] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """Operations in order; `outputs` names what the block returns."""

    inputs: tuple[Variable, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def walk(self) -> Iterator[Operation]:
        """Every operation, those of nested blocks after the one that holds them."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True, slots=True)
class Feature:
    """What the package declares about one input or output: `kind` is "array", "image", "state" or another of Core ML's.

    shape is the default one where `flexible`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    flexible: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Function:
    """One entry point: declared features, then the block that computes them."""

    name: str
    opset: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]
    body: Block


@dataclass(frozen=True, slots=True)
class Program:
    """One .mlpackage, read."""

    package: Path
    specification_version: int
    default_function: str
    functions: Mapping[str, Function]
    weights: Mapping[str, WeightFile]
    metadata: Mapping[str, str]

    def function(self, name: str | None = None) -> Function:
        """Return the named function, or the default one.

        Raises:
            EngineError: there is no such function.
        """
        key = self.default_function if name is None else name
        if key not in self.functions:
            raise EngineError(f"{self.package}: no function {key!r}; it has {sorted(self.functions)}")
        return self.functions[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a package says of itself: its features, and the version its maker gave it (Apple's converter: the model)."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    version: str


def bits(dtype: str) -> int:
    """Return the size of one element in bits (0 for strings)."""
    if dtype in _BITS:
        return _BITS[dtype]
    if dtype == "bool":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 0


def read_package(package: Path | str) -> Program:
    """Read the program of an .mlpackage; weights are mapped, not read.

    Raises:
        PackageError: no package here, or it is damaged, or reaches outside its folder.
        EngineError: the model is not an ML Program (a neural network, a pipeline).
    """
    package = Path(package)
    model_path = _model_path(package)
    return _Reader(package, model_path.parent).program(_message(package, model_path))


def read_declaration(package: Path | str, function: str | None = None) -> Declaration:
    """Read what an .mlpackage declares, without its operations: as quick for the largest network as for the smallest.

    Raises:
        PackageError, EngineError: as `read_package`, or there is no such function.
    """
    package = Path(package)
    description = _message(package, _model_path(package)).description
    described = {entry.name: entry for entry in description.functions}
    name = description.defaultFunctionName if function is None else function
    if described and name not in described:
        raise EngineError(f"{package}: no function {name!r}; it has {sorted(described)}")
    entry = described.get(name, description)
    return Declaration(
        inputs=tuple(_feature(feature) for feature in entry.input),
        outputs=tuple(_feature(feature) for feature in entry.output),
        version=description.metadata.versionString,
    )


def _message(package: Path, model_path: Path) -> Any:
    model = proto.load().Model()
    try:
        model.ParseFromString(model_path.read_bytes())
    except Exception as error:  # protobuf raises its own DecodeError, a plain Exception
        raise PackageError(f"{model_path}: not a Core ML model ({error}); convert the model again") from None
    if model.WhichOneof("Type") != "mlProgram":
        raise EngineError(
            f"{package}: expected an ML Program, got {model.WhichOneof('Type')}; convert the model to an mlprogram"
        )
    return model


def _model_path(package: Path) -> Path:
    if package.is_file():
        raise EngineError(f"{package}: expected an ML Program in an .mlpackage folder, got a single file")
    manifest = package / "Manifest.json"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        root = entries["itemInfoEntries"][entries["rootModelIdentifier"]]["path"]
        path = package / "Data" / root
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(
            f"{package}: not a model package ({type(error).__name__}: {error}); expected a folder with Manifest.json "
            "made by 'glassine convert'"
        ) from None
    return _inside(package, path)


def _inside(package: Path, path: Path) -> Path:
    if not path.resolve().is_relative_to(package.resolve()):
        raise PackageError(f"{package}: refers to {path}, outside the package; do not use this package")
    if not path.is_file():
        raise PackageError(f"{package}: {path.relative_to(package)} is missing; convert the model again")
    return path


class _Reader:
    """Turns one Model message into a Program; holds what the messages refer to."""

    def __init__(self, package: Path, folder: Path) -> None:
        self.package = package
        self.folder = folder
        self.weights: dict[str, WeightFile] = {}

    def program(self, model: Any) -> Program:
        description = model.description
        described = {function.name: function for function in description.functions}
        default = description.defaultFunctionName if described else "main"
        functions = {}
        for name, function in model.mlProgram.functions.items():
            functions[name] = self._function(name, function, described.get(name, description))
        return Program(
            package=self.package,
            specification_version=model.specificationVersion,
            default_function=default,
            functions=functions,
            weights=self.weights,
            metadata=dict(description.metadata.userDefined),
        )

    def _function(self, name: str, function: Any, description: Any) -> Function:
        if function.opset not in function.block_specializations:
            raise PackageError(f"{self.package}: function {name!r} has no block for its opset {function.opset!r}")
        inputs = tuple(Variable(value.name, self._type(value.type)) for value in function.inputs)
        block = self._block(function.block_specializations[function.opset], {v.name for v in inputs})
        return Function(
            name=name,
            opset=function.opset,
            inputs=tuple(_feature(feature) for feature in description.input),
            outputs=tuple(_feature(feature) for feature in description.output),
            states=tuple(_feature(feature) for feature in description.state),
            body=Block(inputs, block.operations, block.outputs),
        )

    def _block(self, block: Any, outer: set[str]) -> Block:
        inputs = tuple(Variable(value.name, self._type(value.type)) for value in block.inputs)
        known = outer | {variable.name for variable in inputs}
        operations = []
        for message in block.operations:
            operation = self._operation(message, known)
            known |= {variable.name for variable in operation.outputs}
            operations.append(operation)
        unbound = sorted(set(block.outputs) - known)
        if unbound:
            raise PackageError(f"{self.package}: nothing computes the outputs {unbound}; convert the model again")
        return Block(inputs, tuple(operations), tuple(block.outputs))

    def _operation(self, message: Any, known: set[str]) -> Operation:
        outputs = tuple(Variable(value.name, self._type(value.type)) for value in message.outputs)
        attributes = {key: self._constant(key, value) for key, value in message.attributes.items()}
        label = attributes.pop("name", None)
        name = str(label.array()) if label is not None else (outputs[0].name if outputs else message.type)
        inputs: dict[str, tuple[str | Constant, ...]] = {}
        for parameter, argument in message.inputs.items():
            bound: list[str | Constant] = []
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "value":
                    bound.append(self._constant(f"{name}.{parameter}", binding.value))
                elif binding.name in known:
                    bound.append(binding.name)
                else:
                    raise PackageError(
                        f"{self.package}: operation {name!r} ({message.type}) reads {binding.name!r} as {parameter!r}, "
                        "which nothing before it computes; convert the model again"
                    )
            inputs[parameter] = tuple(bound)
        if message.type == "const":
            # Named by its output, so that errors about a weight name the weight.
            attributes = {"val": self._constant(name, message.attributes["val"])}
        blocks = tuple(self._block(block, known) for block in message.blocks)
        return Operation(message.type, name, inputs, outputs, attributes, blocks)

    def _type(self, message: Any) -> ValueType:
        kind = message.WhichOneof("type")
        if kind == "tensorType":
            tensor = message.tensorType
            shape = tuple(
                dim.constant.size if dim.WhichOneof("dimension") == "constant" else None for dim in tensor.dimensions
            )
            if tensor.dataType not in _DTYPES:
                raise PackageError(f"{self.package}: unknown tensor type {tensor.dataType}; convert the model again")
            return ValueType("tensor", _DTYPES[tensor.dataType], shape)
        if kind == "listType":
            element = self._type(message.listType.type)
            return ValueType("list", element.dtype, element.shape)
        if kind == "stateType":
            wrapped = self._type(message.stateType.wrappedType)
            return ValueType("state", wrapped.dtype, wrapped.shape)
        if kind in ("tupleType", "dictionaryType"):
            return ValueType("tuple" if kind == "tupleType" else "dictionary")
        raise PackageError(f"{self.package}: a value without a type; convert the model again")

    def _constant(self, name: str, value: Any) -> Constant:
        type_ = self._type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            if type_.kind != "tensor" or None in type_.shape:
                raise PackageError(f"{self.package}: the constant {name!r} in the weight file is no static tensor")
            return Constant(
                name, type_, file=self._file(value.blobFileValue.fileName), offset=value.blobFileValue.offset
            )
        immediate = value.immediateValue
        try:
            if type_.kind == "tensor":
                return Constant(name, type_, _literal(immediate.tensor, type_))
            if type_.kind == "list":
                rows = [_literal(item.immediateValue.tensor, self._type(item.type)) for item in immediate.list.values]
                return Constant(name, ValueType("list", type_.dtype, (len(rows), *type_.shape)), np.array(rows))
        except ValueError as error:
            raise PackageError(f"{self.package}: the constant {name!r} is damaged ({error})") from None
        raise PackageError(f"{self.package}: the constant {name!r} is a {type_.kind}, expected a tensor or a list")

    def _file(self, reference: str) -> WeightFile:
        match = _WEIGHT_PATH.fullmatch(reference)
        if match is None:
            raise PackageError(
                f"{self.package}: refers to weights {reference!r}, expected '@model_path/weights/weight.bin'; "
                "do not use this package"
            )
        name = match.group(1)
        if name not in self.weights:
            self.weights[name] = WeightFile(_inside(self.package, self.folder / "weights" / name))
        return self.weights[name]


def _literal(tensor: Any, type_: ValueType) -> NDArray[Any]:
    kind = tensor.WhichOneof("value")
    shape = tuple(dim for dim in type_.shape if dim is not None)
    if kind == "strings":
        return np.array(list(tensor.strings.values), dtype=np.str_).reshape(shape)
    if kind == "bytes":
        raw = np.frombuffer(bytearray(tensor.bytes.values), np.uint8)  # writable, as torch wants it
        if type_.dtype in _BITS:
            count = math.prod(shape)
            signed = type_.dtype.startswith("int")
            return unpack_bits(raw, _BITS[type_.dtype], count, signed=signed).reshape(shape)
        return np.asarray(raw.view(np.dtype(type_.dtype).newbyteorder("<")).reshape(shape))
    values = getattr(tensor, kind).values if kind else ()
    return np.array(values, dtype=np.dtype(type_.dtype)).reshape(shape)


def _feature(message: Any) -> Feature:
    kind = message.type.WhichOneof("Type")
    optional = bool(message.type.isOptional)
    if kind in ("multiArrayType", "stateType"):
        array = message.type.multiArrayType if kind == "multiArrayType" else message.type.stateType.arrayType
        return Feature(
            name=message.name,
            kind="array" if kind == "multiArrayType" else "state",
            shape=tuple(array.shape),
            dtype=_FEATURE_DTYPES.get(array.dataType, ""),
            flexible=array.WhichOneof("ShapeFlexibility") is not None,
            optional=optional,
        )
    if kind == "imageType":
        image = message.type.imageType
        return Feature(message.name, "image", (image.height, image.width), "", optional=optional)
    return Feature(message.name, str(kind), (), "", optional=optional)
