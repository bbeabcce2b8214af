"""Which engines are loaded at a time: all that have been used and what is needed next, or those of one stage alone.

With memory enough, a thread loads what the picture will need while the parts before it work (`plan.needs`). With
little, the engines of one stage of a picture are closed before those of the next are loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from glassine.runtime.engine import Engine
from glassine.runtime.plan import Stage

Files = dict[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """An engine: what it is called, when it is needed, what it runs, and how to load it.

    load: is given an event; once that is set, nobody waits for the engine any more, and loading may be given up.
    """

    key: str
    stage: Stage
    packages: tuple[Path, ...]
    load: Callable[[threading.Event], Engine]


@dataclass(slots=True)
class _Loaded:
    stage: Stage
    engine: Engine
    files: Files


class Residents:
    """The engines that are loaded, of a model and its refiner. One thread asks for them.

    Attributes:
        one_stage: before an engine is loaded, those of other stages are closed; nothing is loaded ahead.
        peak: bytes of the weights of all that was in use at one time, at most; packages that share a file count once.
        used: the same of all that was used since the start, which is what lies in memory without one_stage.
    """

    def __init__(self, *, one_stage: bool) -> None:
        self.one_stage = one_stage
        self.peak = 0
        self._loaded: dict[str, _Loaded] = {}
        self._coming: dict[str, Future[Engine]] = {}
        self._given_up = threading.Event()
        self._seen: Files = {}

    @property
    def used(self) -> int:
        """Bytes of all weights that were used since the start."""
        return sum(self._seen.values())

    def get(self, wanted: Wanted) -> Engine:
        """Return an engine: loaded before, being loaded (then this waits), or loaded now.

        Raises:
            PackageError, EngineError: it cannot be loaded, or could not be when that was tried ahead.
        """
        if wanted.key not in self._loaded:
            if self.one_stage:
                self._close([key for key, loaded in self._loaded.items() if loaded.stage != wanted.stage])
            coming = self._coming.pop(wanted.key, None)
            # What can be cancelled has not been begun.
            engine = wanted.load(self._given_up) if coming is None or coming.cancel() else coming.result()
            self._loaded[wanted.key] = _Loaded(wanted.stage, engine, weight_files(wanted.packages))
            files = {file: size for loaded in self._loaded.values() for file, size in loaded.files.items()}
            self._seen.update(files)
            self.peak = max(self.peak, sum(files.values()))
        return self._loaded[wanted.key].engine

    def ahead(self, wanted: Sequence[Wanted]) -> None:
        """Load engines in a thread of their own, one after the other; what fails is said where it is needed."""
        new = [one for one in wanted if one.key not in self._loaded and one.key not in self._coming]
        if self.one_stage or not new:
            return
        thread = ThreadPoolExecutor(1, thread_name_prefix="glassine-ahead")
        self._coming.update({one.key: thread.submit(one.load, self._given_up) for one in new})
        thread.shutdown(wait=False)  # it ends with the last of them

    def close(self) -> None:
        """Close every engine; what is being loaded is given up where that is possible, and else waited for."""
        waiting = [future for future in self._coming.values() if not future.cancel()]
        self._coming.clear()
        self._given_up.set()
        try:
            for future in waiting:
                if future.exception() is None:
                    future.result().close()
        finally:
            self._given_up = threading.Event()
            self._close(list(self._loaded))

    def _close(self, keys: list[str]) -> None:
        for key in keys:
            self._loaded.pop(key).engine.close()


def weight_files(packages: Sequence[Path]) -> Files:
    """(device, inode) -> bytes of the weight files of packages."""
    seen = [path.stat() for package in packages for path in package.rglob("weight*.bin") if path.is_file()]
    return {(stat.st_dev, stat.st_ino): stat.st_size for stat in seen}
