"""What the children that are timed have in common: a clock that is moved on, and what goes wrong as planned."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from glassine.runtime.bench import worker

_WOBBLE = (0.0, 0.01, -0.01, 0.02, -0.02)  # of the time of a call, by its number


class Clock:
    """Nothing waits for it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_call(self, seconds: float, number: int) -> None:
        """Let the time of the call of this number pass."""
        self.now += seconds * (1 + _WOBBLE[number % len(_WOBBLE)])


def suffer(planned: object) -> None:
    """Do what is planned, if it is the end."""
    if planned == "killed":
        print("Core ML's last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if planned == "hangs":
        time.sleep(3600)
    if planned == "refused":
        raise RuntimeError("ANECCompile() FAILED (11)")


def serve(engine: Callable, clock: Clock) -> None:
    """Be the child, with no engine but this one, and nothing to compile."""
    worker._import = lambda core_ml: None
    worker._compile = lambda task, options: None
    worker.serve(sys.argv[2], open_=engine, clock=clock)
