"""Which file was it? The sha256 of a source, counted in a thread beside the conversion."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from glassine.convert.checkpoint import Checkpoint
from glassine.convert.names import Part
from glassine.errors import CheckpointError

_WINDOW = 32 << 20  # bytes


@contextmanager
def digests(checkpoint: Checkpoint, parts: set[Part], *, skip: bool) -> Iterator[Callable[[], dict[Part, str]]]:
    """Hash the source in a thread beside the conversion; the function given waits for the sha256 of each part.

    The digest is that of the part's file, or of its shards one after the other in the order of their names. Hashing
    begins at once, so that on a cold disk it also reads the file ahead of the copying.
    """
    files = {part: _files(checkpoint, part) for part in parts}
    stop = threading.Event()

    def work() -> dict[tuple[Path, ...], str]:
        return {group: _sha256(group, stop) for group in sorted(set(files.values()))}

    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        hashed = None if skip else pool.submit(work)

        def wait() -> dict[Part, str]:
            if hashed is None:
                return {}
            try:
                digests = hashed.result()
            except (OSError, ValueError) as error:  # ValueError: the file became shorter than its window
                raise CheckpointError(
                    f"{checkpoint.path}: cannot be read to its end ({error}); expected a file that nothing else "
                    "changes while it is converted: try again"
                ) from None
            return {part: digests[group] for part, group in files.items()}

        try:
            yield wait
        finally:
            stop.set()


def _files(checkpoint: Checkpoint, part: Part) -> tuple[Path, ...]:
    if checkpoint.path.is_dir():
        found = {tensor.path for key, tensor in checkpoint.tensors.items() if key.startswith(f"{part}/")}
        return tuple(sorted(found))
    return (checkpoint.path,)


def _sha256(paths: tuple[Path, ...], stop: threading.Event) -> str:
    """Hash the files as one, mapped a window at a time: no copy, and no more memory than a window.

    The window is big because between two of them this thread waits for its turn at the interpreter (5 ms), which the
    thread that writes the graphs holds all the while.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for offset in range(0, size, _WINDOW):
                if stop.is_set():
                    break
                length = min(_WINDOW, size - offset)
                with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=offset) as window:
                    digest.update(window)
    return digest.hexdigest()
