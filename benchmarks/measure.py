"""What every benchmark shares: samples with their spread, the machine, peak memory of a child, result files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "coremltools", "torch", "diffusers", "transformers", "safetensors", "pillow")


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing: median, quartiles and how many; `unit` is "s", "ms", "MB" or "ratio"."""

    median: float
    low: float
    high: float
    count: int
    unit: str

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> Sample:
        """Summarise `values`; with fewer than four the quartiles are the extremes."""
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values), len(values), unit)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values), unit)

    def __str__(self) -> str:
        return f"{self.median:.3g} {self.unit} ({self.low:.3g} to {self.high:.3g}, n={self.count})"


def alternate(contenders: dict[str, Callable[[], object]], *, warmup: int, repeats: int) -> dict[str, list[float]]:
    """Time the contenders in turn, so that a busy moment of the machine hits all of them; seconds per call."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Sample:
    """The ratio ours / theirs, round by round."""
    return Sample.of([a / b for a, b in zip(ours, theirs, strict=True)], "ratio")


def child(command: Sequence[str], **popen: Any) -> tuple[float, float]:
    """Run a command; wall seconds and its peak resident set in MB.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, **popen)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, _megabytes(usage)


def _megabytes(usage: resource.struct_rusage) -> float:
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def machine() -> dict[str, Any]:
    """Processor, cores, memory load and library versions."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def record(question: str, result: dict[str, Any]) -> Path:
    """Write results/<question>.json with the machine beside the figures, and print where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}.json"
    plain = {key: asdict(value) if isinstance(value, Sample) else value for key, value in result.items()}
    path.write_text(json.dumps({"machine": machine(), **plain}, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path
