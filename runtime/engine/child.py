"""A child process that is watched: what may crash, hang or take all memory happens to it, not to who asks.

parent  one JSON object a line -> the child's stdin        held open: a child ends when it closes
        answers                <- one JSON object a line   on what was the child's stdout; what else is printed there
                                                           goes to stderr, whose end explains a crash
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

Words = dict[str, Any]
_TAIL = 600  # characters of what a child that ended said on stderr


class Child:
    """A running child, as its parent sees it; made by `child`."""

    def __init__(self, process: subprocess.Popen[str], said: Path) -> None:
        self._process, self._said = process, said
        self._lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    def ask(self, words: Words) -> None:
        """Send one line. A child that is gone says so when it is listened to."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()

    def answer(self, timeout: float) -> Words | None:
        """Return the next line, or None: the child has ended.

        Raises:
            TimeoutError: it said nothing for `timeout` seconds.
        """
        try:
            line = self._lines.get(timeout=max(0.0, timeout))
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def ending(self) -> str:
        """Say how a child ended that has, and its last words."""
        text = self._said.read_text(encoding="utf-8", errors="replace").strip()
        return f"{self._ended()}; it said: {text[-_TAIL:]}" if text else self._ended()

    def close(self) -> None:
        """End it, if it still lives."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process inside a driver may not die at once
            process.wait(10)
            self._reader.join(10)
            process.stdout.close()
        with suppress(BrokenPipeError):  # what it had not read yet
            process.stdin.close()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)

    def _ended(self) -> str:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "it closed its output and did not end"
        if code >= 0:
            return f"it ended with exit code {code}"
        known = -code in {s.value for s in signal.Signals}
        return f"it was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"


@contextmanager
def child(command: Sequence[str], workshop: Path, environment: Mapping[str, str] | None = None) -> Iterator[Child]:
    """Start a child that works in `workshop`, a folder of its own; it is gone at the end.

    Args:
        environment: what the child finds in its environment besides this process's own.
    """
    with (workshop / "stderr.txt").open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=workshop,
            # What a killed compiler leaves is swept with the folder.
            env={**os.environ, "TMPDIR": str(workshop), **(environment if environment is not None else {})},
            start_new_session=True,  # Ctrl-C is the parent's to handle
            text=True,
        )
    watched = Child(process, workshop / "stderr.txt")
    try:
        yield watched
    finally:
        watched.close()


def answering() -> tuple[Callable[..., None], queue.Queue[Words]]:
    """Be a child: return what says one line to the parent, say(key=value ...), and the lines that it sends.

    When the parent is gone, this process ends.
    """
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # Core ML prints
    asked: queue.Queue[Words] = queue.Queue()

    def listen() -> None:
        with os.fdopen(os.dup(0), encoding="utf-8") as stream:
            for line in stream:
                asked.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return lambda **words: print(json.dumps(words), file=channel, flush=True), asked


def leave_out_frameworks() -> None:
    """Keep coremltools, not imported yet, from all it can convert from: seconds, and hundreds of megabytes."""
    for framework in ("torch", "tensorflow", "sklearn", "xgboost"):
        sys.modules[framework] = None  # type: ignore[assignment]  # it is not there
