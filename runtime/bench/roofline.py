"""How far from the machine's limits a network runs: the roofline model (Williams, Waterman, Patterson 2009).

package -> work: FLOPs, bytes that must move -> time at the peak rates -> share of it that a measured time reaches

A network cannot run faster than its arithmetic at the peak rate, nor faster than its weights, inputs and outputs can
cross the memory once. The larger of the two times is its roof. What lies between, the results of its operations, may
stay in caches or be fused: it is counted too, apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from glassine.runtime.bench.chips import Peak
from glassine.runtime.engine.portable.program import Variable, read_package
from glassine.runtime.engine.portable.summary import summarise

_VIEWS = ("reshape", "expand_dims", "squeeze", "identity")  # results that are the same bytes
_SIDE = 2048  # of the matrices that are multiplied to measure a peak
_COPIED = 1 << 28  # bytes that are copied for it: more than caches hold
_TRIES = 5
_BYTES = {"float16": 2, "float32": 4, "float64": 8, "int32": 4, "int16": 2, "uint16": 2, "int64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call of a network has to do.

    flops: of convolutions, matrix products and attention, a multiply-add counted as two; `unsized` such operations have
    shapes that are known only when running, and are not in it. weight_bytes: as stored. edge_bytes: of inputs and
    outputs. inner_bytes: of all results of operations, written once and read once.
    """

    flops: int
    unsized: int
    weight_bytes: int
    edge_bytes: int
    inner_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A measured time beside the roof: what was reached, which limit is the roof, and the share of it, 0 to 1."""

    tflops: float
    gigabytes: float
    bound: Literal["arithmetic", "memory"] | None
    share: float | None


def work_of(packages: Sequence[Path], function: str | None = None) -> Work:
    """Count the work of a network, which may be several packages.

    Raises:
        PackageError, EngineError: a package is damaged, or has no such function.
    """
    flops = unsized = weights = edges = inner = 0
    for package in packages:
        program = read_package(package)
        entry = program.function(function)
        summary = summarise(program, function)
        flops, unsized = flops + summary.flops, unsized + summary.unsized
        weights += sum(summary.weight_bytes.values())
        results = {variable.name: variable for operation in entry.body.walk() for variable in operation.outputs}
        edges += sum(map(_bytes, entry.body.inputs)) + sum(_bytes(results[name]) for name in entry.body.outputs)
        for operation in entry.body.walk():
            if operation.type not in ("const", *_VIEWS) and not operation.type.startswith("constexpr_"):
                inner += 2 * sum(map(_bytes, operation.outputs))
    return Work(flops=flops, unsized=unsized, weight_bytes=weights, edge_bytes=edges, inner_bytes=inner)


def position(work: Work, seconds: float, peak: Peak | None) -> Position:
    """Where a measured time lies under the roof; without a peak, only what was reached."""
    moved = work.weight_bytes + work.edge_bytes
    tflops, gigabytes = work.flops / seconds / 1e12, moved / seconds / 1e9
    if peak is None or peak.tflops is None or peak.gigabytes is None:
        return Position(tflops=tflops, gigabytes=gigabytes, bound=None, share=None)
    arithmetic, memory = work.flops / (peak.tflops * 1e12), moved / (peak.gigabytes * 1e9)
    bound: Literal["arithmetic", "memory"] = "arithmetic" if arithmetic >= memory else "memory"
    return Position(tflops=tflops, gigabytes=gigabytes, bound=bound, share=max(arithmetic, memory) / seconds)


def measured_peak(device: str | None, clock: Callable[[], float] = time.perf_counter) -> Peak:
    """What this machine reaches now: the best of five products of float32 matrices, and of five copies.

    Args:
        device: of the portable engine, measured with PyTorch; None is the CPU, measured with NumPy.

    Raises:
        EngineError: there is no such device.
    """
    if device is None:
        by, (product, copy) = "NumPy on the CPU", _peak_calls(_SIDE, _COPIED)
    else:
        from glassine.runtime.engine.portable.peak import peak_calls

        by, (product, copy) = f"PyTorch on {device}", peak_calls(device, _SIDE, _COPIED)
    return Peak(
        tflops=2 * _SIDE**3 / _best(product, clock) / 1e12,
        gigabytes=2 * _COPIED / _best(copy, clock) / 1e9,  # read and written
        source=f"measured in this run, {by}: float32 product of {_SIDE}x{_SIDE} matrices, copy of {_COPIED >> 20} MiB",
    )


def _peak_calls(side: int, size: int) -> tuple[Callable[[], object], Callable[[], object]]:
    matrix = np.random.default_rng(0).random((side, side), np.float32)
    source, target = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)
    return lambda: matrix @ matrix, lambda: np.copyto(target, source)


def _best(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """The seconds of the fastest of five calls, behind one that is not counted."""
    seconds = []
    for _ in range(_TRIES + 1):
        started = clock()
        call()
        seconds.append(clock() - started)
    return min(seconds[1:])


def _bytes(variable: Variable) -> int:
    return math.prod(dim for dim in variable.type.shape if dim is not None) * _BYTES.get(variable.type.dtype, 1)
