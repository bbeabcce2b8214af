"""Import coremltools without the frameworks that it looks for and conversion does not use."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_FRAMEWORKS = (
    *("torch", "torchvision", "torchaudio", "torchao", "executorch", "transformers"),
    *("tensorflow", "sklearn", "scipy", "xgboost", "libsvm"),
)


def import_coremltools() -> None:
    """Import coremltools, hiding PyTorch, scikit-learn, SciPy, TensorFlow and their kind from it while it loads.

    On import coremltools tries each of them for its converters, which takes seconds and hundreds of megabytes where
    they are installed, and offers no setting against it. Only this one import is affected: the frameworks themselves
    stay importable. But coremltools then believes for the life of the process that they are missing
    (`ct.convert(torch_model)` refuses), so this is for programs of our own: the command line calls it, the library
    never does. Nothing happens when coremltools is loaded already.
    """
    if "coremltools" in sys.modules:
        return
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every framework's version and, off macOS, of Core ML's absence
    try:
        with _hidden(_FRAMEWORKS):
            importlib.import_module("coremltools")
    finally:
        logger.setLevel(level)


class _Hidden(MetaPathFinder):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Say that a hidden module does not exist; know nothing of the others."""
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    finder = _Hidden([name for name in names if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
