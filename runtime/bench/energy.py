"""Power of the CPU, the GPU and the Neural Engine while something runs, as macOS's `powermetrics` estimates it.

powermetrics -f plist -> property lists, a NUL between them -> intervals: seconds, joules of each unit
intervals that lie within the runs of a contender -> its mean power

It needs root. Apple calls the figures estimates, good for comparing on one machine and not between machines; memory,
the display and the power supply's losses are not in them.
"""

from __future__ import annotations

import math
import os
import plistlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any
from xml.parsers.expat import ExpatError

from glassine.errors import EngineError

UNITS = ("cpu", "gpu", "ane")
COMMAND = ("powermetrics", "--samplers", "cpu_power,gpu_power,ane_power", "-i", "200", "-b", "0", "-f", "plist")
HOW = (
    "energy is measured by macOS's powermetrics, which needs root: run 'sudo -v' in this terminal, then the same "
    "command within five minutes"
)


@dataclass(frozen=True, slots=True)
class Interval:
    """One sample: when it ended (the meter's clock), the seconds it lasted, and joules by unit."""

    ended: float
    seconds: float
    joules: dict[str, float]


class Meter:
    """Reads powermetrics from when it is started; use it with `with`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._closing = False
        self.intervals: list[Interval] = []

    def __enter__(self) -> Meter:
        """Start it.

        Raises:
            EngineError: there is no powermetrics, or it may not run; the message says what to do.
        """
        self._process = subprocess.Popen(_command(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        # It runs as root and cannot be ended from here: it ends by itself when nobody reads it any more.
        assert self._process.stdout is not None
        self._closing = True
        self._reader.join(5)
        if not self._reader.is_alive():
            self._process.stdout.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)

    def _read(self, stream: IO[bytes]) -> None:
        buffer = b""
        while not self._closing and (read := os.read(stream.fileno(), 1 << 16)):
            buffer += read
            # A list is whole when its end has come; the NUL stands before the next one.
            while (end := buffer.find(b"</plist>")) >= 0:
                text, buffer = buffer[: end + 8], buffer[end + 8 :]
                found = interval(text, self._clock())
                if found is not None:
                    self.intervals.append(found)


def interval(text: bytes, ended: float) -> Interval | None:
    """Read one property list; None if it has no energies, as the first one of some versions.

    Energies are millijoules, under "processor" (cpu_energy, gpu_energy, ane_energy) or at the top; powers, where a
    version has no energies, are milliwatts.
    """
    try:
        said = plistlib.loads(text.strip(b"\0\r\n "))
    except (plistlib.InvalidFileException, ExpatError, ValueError, OverflowError):
        return None
    if not isinstance(said, dict):
        return None
    seconds = _number(said.get("elapsed_ns")) / 1e9
    places = [place for place in (said.get("processor"), said.get("gpu"), said) if isinstance(place, dict)]
    joules = {unit: _joules(places, unit, seconds) for unit in UNITS}
    known = {unit: value for unit, value in joules.items() if value is not None}
    return Interval(ended, seconds, known) if known and seconds > 0 else None


def mean_watts(intervals: Sequence[Interval], windows: Sequence[tuple[float, float]]) -> tuple[dict[str, float], int]:
    """The mean power by unit over the intervals that lie wholly within one of the windows, and how many there are.

    Args:
        windows: (start, end) on the meter's clock.
    """
    inside = [
        one for one in intervals if any(start <= one.ended - one.seconds and one.ended <= end for start, end in windows)
    ]
    seconds = math.fsum(one.seconds for one in inside)
    units = [unit for unit in UNITS if any(unit in one.joules for one in inside)]
    return {unit: math.fsum(one.joules.get(unit, 0.0) for one in inside) / seconds for unit in units}, len(inside)


def _joules(places: Sequence[dict[str, Any]], unit: str, seconds: float) -> float | None:
    for key, factor in ((f"{unit}_energy", 1.0), (f"{unit}_power", seconds)):
        for place in places:
            if isinstance(place.get(key), int | float):
                return _number(place[key]) * factor / 1000
    return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _command() -> list[str]:
    if shutil.which("powermetrics") is None:
        raise EngineError("energy is measured by macOS's powermetrics, and there is none here; leave --energy out")
    if os.geteuid() == 0:
        return list(COMMAND)
    sudo = shutil.which("sudo")
    if sudo is None or subprocess.run([sudo, "-n", "true"], check=False, capture_output=True).returncode != 0:
        raise EngineError(HOW)
    return [sudo, "-n", *COMMAND]
