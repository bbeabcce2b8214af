"""The constants of a program: read from the mapped file, decompressed, held once in the dtype of computation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glassine.errors import EngineError, PackageError
from glassine.runtime.engine.portable.numerics import Numerics
from glassine.runtime.engine.portable.ops.constexpr import DECOMPRESS
from glassine.runtime.engine.portable.program import Constant, Operation, Program
from glassine.runtime.engine.portable.registry import from_constant

# Mapped pages are given back after this much has been read, so that reading never doubles the memory.
_RELEASE_EVERY = 64 << 20


class Constants:
    """Names bound by `const` and `constexpr_*`, converted on first use.

    Attributes:
        records: of the weight files, as tensors; float32 whatever the precision, so that executables may share them.
    """

    def __init__(self, program: Program, numerics: Numerics, records: dict[Any, Tensor]) -> None:
        self._program = program
        self._numerics = numerics
        self._bound: dict[str, Constant | NDArray[Any]] = {}
        self._dtypes: dict[str, str] = {}
        self._pending: dict[str, tuple[Operation, int]] = {}
        self._tensors: dict[Any, Tensor] = {}  # decompressed
        self.records = records
        self._read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._dtypes

    def bind(self, operation: Operation) -> None:
        """Take the output(s) of a `const` or `constexpr_*` operation; nothing is read yet."""
        for index, variable in enumerate(operation.outputs):
            self._dtypes[variable.name] = variable.type.dtype
            if operation.type == "const":
                self._bound[variable.name] = operation.attributes["val"]
            else:
                self._pending[variable.name] = (operation, index)

    def value(self, name: str, form: str) -> Any:
        """Return a bound constant in the form a kernel wants; tensors are made once and shared."""
        constant = self._bound.get(name)
        if isinstance(constant, Constant):
            return self.convert(constant, form)
        key = (name, form in ("Tensor", "Value"))
        if key in self._tensors:
            return self._tensors[key]
        array = self._decompress(name)
        if self._numerics.rounds and self._dtypes[name] == "float16":
            array = array.astype(np.float16)
        value = from_constant(form, array, self._dtypes[name], self._numerics)
        if isinstance(value, Tensor):
            self._tensors[key] = value
        return value

    def convert(self, constant: Constant, form: str) -> Any:
        """Return a constant in the form a kernel wants. The same record is the same tensor, whoever reads it."""
        key = (id(constant.file), constant.offset, constant.type) if constant.file is not None else None
        wants_tensor = form in ("Tensor", "Value")
        if key is not None and wants_tensor and key in self.records:
            return self.records[key]
        value = from_constant(form, self._array(constant), constant.type.dtype, self._numerics)
        if key is not None and isinstance(value, Tensor):
            self.records[key] = value
        return value

    def _array(self, constant: Constant) -> NDArray[Any]:
        if constant.file is not None:
            self._read += constant.stored_bytes
            if self._read > _RELEASE_EVERY:
                constant.file.release()
                self._read = 0
        return constant.array()

    def _decompress(self, name: str) -> NDArray[Any]:
        operation, index = self._pending[name]
        arguments: dict[str, Any] = {key: self._array(constant) for key, constant in operation.attributes.items()}
        for parameter, (item, *_) in operation.inputs.items():
            if isinstance(item, Constant):
                arguments[parameter] = self._array(item)
            elif item in self._pending:
                arguments[parameter] = self._decompress(item)
            elif item in self._bound:
                bound = self._bound[item]
                arguments[parameter] = self._array(bound) if isinstance(bound, Constant) else bound
            else:
                raise PackageError(
                    f"{self._program.package}: {operation.name!r} ({operation.type}) reads {item!r}, not a constant"
                )
        if operation.type not in DECOMPRESS:
            raise EngineError(f"{self._program.package}: the portable engine does not have {operation.type!r}")
        try:
            result = DECOMPRESS[operation.type](**arguments)
        except (TypeError, ValueError, IndexError) as error:
            raise PackageError(
                f"{self._program.package}: {operation.name!r} ({operation.type}) cannot be decompressed: {error}"
            ) from error
        return np.asarray(result[index] if isinstance(result, tuple) else result)
