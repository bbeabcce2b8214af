"""Which file was it? The sha256 of the sources, counted in a thread beside the conversion."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from glassine.errors import CheckpointError

Files = tuple[Path, ...]
_WINDOW = 32 << 20  # bytes


@contextmanager
def digests(groups: Iterable[Files], *, skip: bool = False) -> Iterator[Callable[[], Mapping[Files, str]]]:
    """Hash files in a thread beside the conversion; the function given waits for the sha256 of each group.

    The digest of a group is that of its files one after the other, in their order (a file, or the shards of a part).
    Hashing begins at once, so that on a cold disk it also reads the files ahead of the copying.
    """
    wanted = sorted({group for group in groups if group})
    stop = threading.Event()

    def work() -> dict[Files, str]:
        return {group: _sha256(group, stop) for group in wanted}

    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        hashed = None if skip else pool.submit(work)

        def wait() -> Mapping[Files, str]:
            if hashed is None:
                return {}
            try:
                return hashed.result()
            except (OSError, ValueError) as error:  # ValueError: the file became shorter than its window
                files = ", ".join(dict.fromkeys(str(path) for group in wanted for path in group))
                raise CheckpointError(
                    f"{files}: cannot be read to the end ({error}); expected files that nothing else "
                    "changes while they are converted: try again"
                ) from None

        try:
            yield wait
        finally:
            stop.set()


def _sha256(paths: Files, stop: threading.Event) -> str:
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
