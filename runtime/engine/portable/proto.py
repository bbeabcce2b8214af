"""Core ML's protobuf classes without the rest of coremltools.

`import coremltools` takes seconds (it imports torch and scikit-learn where they are installed); its generated message
modules need only protobuf. They import each other relatively, so they are loaded here as a package of another name.
The message classes live in protobuf's own descriptor pool: these and `coremltools.proto`'s are the same classes.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from glassine.errors import MissingDependency

_ALIAS = "_glassine_coreml_proto"


@cache
def load() -> ModuleType:
    """Return the generated module of Core ML's `Model.proto` (0.1 s).

    Raises:
        MissingDependency: coremltools is not installed.
    """
    if "coremltools" in sys.modules:
        return importlib.import_module("coremltools.proto.Model_pb2")
    spec = importlib.util.find_spec("coremltools")
    if spec is None or spec.origin is None:
        raise MissingDependency("reading model packages needs coremltools; install it with 'pip install coremltools'")
    folder = Path(spec.origin).parent / "proto"
    package = importlib.util.spec_from_file_location(
        _ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert package is not None and package.loader is not None  # noqa: PT018 - both follow from the path
    module = importlib.util.module_from_spec(package)
    sys.modules[_ALIAS] = module
    package.loader.exec_module(module)
    return importlib.import_module(f"{_ALIAS}.Model_pb2")
