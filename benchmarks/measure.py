"""What every benchmark shares: samples with their spread, the machine, peak memory of a child, result files; and for
those that measure a command beside `cp`: its options, files of random weights, rounds into an empty place."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

RESULTS = Path(__file__).parent / "results"
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
Run = Callable[[], tuple[float, float]]  # wall seconds, peak MB
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


def parser(doc: str | None, children: int) -> argparse.ArgumentParser:
    """The options of a benchmark that measures `glassine` itself; `children`: words after its own hidden --child."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--warmup", type=int, default=1)
    made.add_argument("--python", default=sys.executable, help="the interpreter whose glassine is measured")
    made.add_argument("--folder", type=Path, help="where the files go while this runs")
    made.add_argument("--child", nargs=children, help=argparse.SUPPRESS)
    return made


def rounds(
    contenders: Mapping[str, Run], out: Path, *, warmup: int, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Run the contenders in turn, each into an empty folder `out` and with no writes pending."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_ in range(warmup + repeats):
        for name, run in contenders.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()
            wall, peak = run()
            print(f"  {name:10} {wall:7.2f} s {peak:7.0f} MB", flush=True)
            if round_ >= warmup:
                results[name].append((wall, peak))
    return results


def beside_cp(results: Mapping[str, Sequence[tuple[float, float]]], share: float = 1.0) -> dict[str, Sample]:
    """Seconds and peak memory of every contender; of those that ran as often as cp the seconds beyond `share` x cp."""
    walls = {name: [wall for wall, _ in runs] for name, runs in results.items()}
    found = {}
    for name, runs in results.items():
        found[f"{name}_seconds"] = Sample.of(walls[name], "s")
        if name == "cp":
            continue
        found[f"{name}_peak_megabytes"] = Sample.of([peak for _, peak in runs], "MB")
        if len(runs) == len(results["cp"]):
            beyond = [ours - share * theirs for ours, theirs in zip(walls[name], walls["cp"], strict=True)]
            found[f"{name}_ratio_to_cp"] = ratio(walls[name], walls["cp"])
            found[f"{name}_seconds_beyond{'' if share == 1.0 else f'_{share:g}x'}_cp"] = Sample.of(beyond, "s")
    return found


def without_torch(python: str) -> bool:
    """Whether an interpreter has no PyTorch."""
    code = "import importlib.util as u; print(u.find_spec('torch') is None)"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "True"


def support(name: str) -> ModuleType:
    """Import tests/support/<name>.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    return importlib.import_module(f"support.{name}")


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", seed: int = 0) -> None:
    """Write a file of weights: every tensor different, every value finite and exact in fp16, |w| < 2."""
    import numpy as np

    size = {"F16": 2, "F32": 4}[dtype]
    header, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + size * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, 1 << 24):
            count = min(1 << 24, offset - start) // size
            halves = (np.frombuffer(rng.bytes(2 * count), "<u2") & 0xBFFF).view(
                "<f2"
            )  # without the highest exponent bit
            file.write((halves if dtype == "F16" else halves.astype("<f4")).tobytes())


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
