"""Import coremltools without the frameworks that it looks for and conversion does not use."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_FRAMEWORKS = (
    *("torch", "torchvision", "torchaudio", "torchao", "executorch", "transformers"),
    *("tensorflow", "sklearn", "scipy", "xgboost", "libsvm"),
)


def import_coremltools_quietly_later() -> None:
    """Let whoever imports coremltools first, if anybody does, import it without its frameworks.

    On import coremltools tries PyTorch, scikit-learn, SciPy, TensorFlow and their kind for its converters, which takes
    seconds and hundreds of megabytes where they are installed, and offers no setting against it. Only this one import
    is affected: the frameworks themselves stay importable. But coremltools then believes for the life of the process
    that they are missing (`ct.convert(torch_model)` refuses), so this is for programs of our own: the command line
    calls it, the library never does. Nothing happens when coremltools is loaded already.
    """
    if "coremltools" not in sys.modules:
        sys.meta_path.insert(0, _Later())


class _Later(MetaPathFinder, Loader):
    """Finds coremltools once, and loads it as the loader that it found would have done, but quietly."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find coremltools by the finders behind this one; know nothing of other modules."""
        if name != "coremltools":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the loader make the module."""
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Let the loader run the module, which is its own from then on."""
        assert self._loader is not None
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        with _quiet():
            self._loader.exec_module(module)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the frameworks, and what coremltools says of their versions and, off macOS, of Core ML's absence."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _hidden(_FRAMEWORKS):
            yield
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
