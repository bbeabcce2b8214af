"""What a compiled model (.mlmodelc) says of itself, read without Core ML: its metadata.json (coremlcompiler's)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassine.errors import PackageError
from glassine.runtime.engine.contract import COMPILED, TensorSpec
from glassine.runtime.engine.portable.program import read_package

_DTYPES = {"Float16": "float16", "Float32": "float32", "Double": "float64", "Int32": "int32"}


@dataclass(frozen=True, slots=True)
class Interface:
    """Inputs and outputs of a model with their default shapes, and what its maker wrote about it."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    about: Mapping[str, str]


def read_interface(model: Path, function: str | None = None) -> Interface:
    """Read what a .mlpackage or .mlmodelc declares; of a compiled one without Core ML.

    Raises:
        PackageError: it is damaged, or a compiled model without metadata.json.
        EngineError: a package that is no ML Program, or lacks the function.
    """
    if model.suffix == COMPILED and not (model / "Manifest.json").is_file():
        return _compiled(model)
    program = read_package(model)
    entry = program.function(function)
    return Interface(
        {f.name: TensorSpec(f.name, f.shape, f.dtype) for f in entry.inputs},
        {f.name: TensorSpec(f.name, f.shape, f.dtype) for f in entry.outputs},
        program.metadata,
    )


def _compiled(model: Path) -> Interface:
    path = model / "metadata.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))[0]
        about = {str(key): str(value) for key, value in said.get("userDefinedMetadata", {}).items()}
        about |= {key: str(said[key]) for key in ("version", "shortDescription") if key in said}
        return Interface(_features(said["inputSchema"]), _features(said["outputSchema"]), about)
    except FileNotFoundError:
        raise PackageError(
            f"{model}: has no metadata.json, so its inputs cannot be known; compile it again with "
            "'xcrun coremlcompiler compile', or take the .mlpackage"
        ) from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(
            f"{path}: not what coremlcompiler writes ({error!r}); compile the model again, or take the .mlpackage"
        ) from None


def _features(schema: list[dict[str, Any]]) -> dict[str, TensorSpec]:
    features = {}
    for feature in schema:
        shape = tuple(int(side) for side in json.loads(feature.get("shape", "[]")))
        features[str(feature["name"])] = TensorSpec(
            feature["name"], shape, _DTYPES.get(feature.get("dataType", ""), "")
        )
    return features
