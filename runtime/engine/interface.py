"""What a model declares of itself: a package, or one compiled before, read without Core ML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassine.errors import PackageError
from glassine.runtime.engine.contract import COMPILED, TensorSpec
from glassine.runtime.engine.portable.program import read_declaration

_DTYPES = {"Float16": "float16", "Float32": "float32", "Double": "float64", "Int32": "int32"}


@dataclass(frozen=True, slots=True)
class Interface:
    """Inputs and outputs with their default shapes (of an output also (): not declared), and the maker's version."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    version: str


def read_interface(model: Path, function: str | None = None) -> Interface:
    """Read what a .mlpackage or .mlmodelc declares.

    Raises:
        PackageError: it is damaged, or a compiled model without the metadata.json of coremlcompiler.
        EngineError: a package that is no ML Program, or lacks the function.
    """
    if model.suffix == COMPILED and not (model / "Manifest.json").is_file():
        return _compiled(model)
    declared = read_declaration(model, function)
    return Interface(
        {f.name: TensorSpec(f.name, f.shape, f.dtype) for f in declared.inputs},
        {f.name: TensorSpec(f.name, f.shape, f.dtype) for f in declared.outputs},
        declared.version,
    )


def _compiled(model: Path) -> Interface:
    path = model / "metadata.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))[0]
        return Interface(_specs(said["inputSchema"]), _specs(said["outputSchema"]), str(said.get("version", "")))
    except FileNotFoundError:
        raise PackageError(
            f"{model}: has no metadata.json, so its inputs cannot be known; compile it again with "
            "'xcrun coremlcompiler compile', or take the .mlpackage"
        ) from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(
            f"{path}: not what coremlcompiler writes ({error!r}); compile the model again, or take the .mlpackage"
        ) from None


def _specs(schema: list[dict[str, Any]]) -> dict[str, TensorSpec]:
    specs = {}
    for feature in schema:
        shape = tuple(int(side) for side in json.loads(feature.get("shape", "[]")))
        specs[str(feature["name"])] = TensorSpec(feature["name"], shape, _DTYPES.get(feature.get("dataType", ""), ""))
    return specs
