"""What Apple's chips could do at most: arithmetic in float16, and memory; from what is published.

A roof of the Neural Engine is Apple's figure; matrix products reach far less of it (measured by others: 2.7 TFLOP/s of
M1's 11, huggingface.co/datasets/aneforge/ane-rooflines), so a low share is no reason to worry by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_KINDS = ("", " Pro", " Max", " Ultra")

# Cores of the whole GPU, by kind; apple.com's technical specifications.
_CORES = {"M1": (8, 16, 32, 64), "M2": (10, 19, 38, 76), "M3": (10, 18, 40, 80), "M4": (10, 20, 40), "M5": (10, 20, 40)}

# TFLOP/s of one GPU core. float16 runs at the rate of float32 (measured for M1 and M2: philipturner/metal-benchmarks).
# M5's cores have matrix units of which Apple says no more than "over 4x the peak GPU compute for AI compared to M4".
_GPU_CORE = {
    "M1": (2.6 / 8, "Apple"),  # "2.6 teraflops", Apple's announcement of M1, 2020-11-10; M1 Pro 5.2, M1 Max 10.4 alike
    "M2": (3.6 / 10, "Apple"),  # "3.6 teraflops", Apple's announcement of M2, 2022-06-06
    "M3": (4.1 / 10, "not Apple's figure"),  # huggingface.js, hardware.ts: 4.1 TFLOPS in float32
    "M4": (4.6 / 10, "not Apple's figure"),  # huggingface.js, hardware.ts: 4.6 TFLOPS in float32
}

# TFLOP/s of the Neural Engine (16 cores; an Ultra has two) in float16. Apple says trillions of operations a second.
_NEURAL_ENGINE = {
    "M1": (11.0, "Apple, precision not stated"),  # announcement of M1, 2020-11-10
    "M2": (15.8, "Apple, precision not stated"),  # announcement of M2, 2022-06-06
    "M3": (18.0, "Apple, precision not stated"),  # announcement of M3, 2023-10-30
    "M4": (38.0 / 2, "half of Apple's 38 TOPS in INT8"),  # announcement of M4, 2024-05-07; INT8 counts twice float16
}

# GB/s of the memory; Apple's announcements and technical specifications.
_MEMORY = {
    "M1": 68.25, "M1 Pro": 200.0, "M1 Max": 400.0, "M1 Ultra": 800.0,  # 2020-11, 2021-10, 2022-03
    "M2": 100.0, "M2 Pro": 200.0, "M2 Max": 400.0, "M2 Ultra": 800.0,  # 2022-06, 2023-01, 2023-06
    "M3": 100.0, "M3 Pro": 150.0, "M3 Max": 400.0, "M3 Ultra": 819.0,  # 2023-10, 2025-03
    "M4": 120.0, "M4 Pro": 273.0, "M4 Max": 546.0,  # 2024-05, 2024-10
    "M5": 153.0, "M5 Pro": 307.0, "M5 Max": 614.0,  # 2025-10, 2026-03
}  # fmt: skip
_MEMORY_SMALLER = {"M3 Max": 300.0, "M4 Max": 410.0, "M5 Max": 460.0}  # those with fewer GPU cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most a unit could do: TFLOP/s and GB/s; None is not known. source: who says so."""

    tflops: float | None
    gigabytes: float | None
    source: str


def published_peak(chip: str, unit: str, gpu_cores: int | None = None) -> Peak | None:
    """What is published of one compute unit of an Apple chip.

    Args:
        chip: such as "Apple M2 Pro". unit: "cpu_and_ne", "cpu_and_gpu", or "all" (the faster of both: an operation runs
            on one of them). gpu_cores: of this machine; None takes the whole GPU.

    Returns:
        None for another maker's chip, one that is not known yet, and the CPU alone.
    """
    found = re.fullmatch(r"Apple (M\d+)( Pro| Max| Ultra)?", chip.strip())
    if found is None or found[1] not in _CORES or unit not in ("cpu_and_ne", "cpu_and_gpu", "all"):
        return None
    family, kind = found[1], found[2] if found[2] is not None else ""
    name = family + kind
    if name not in _MEMORY:
        return None
    whole = _CORES[family][_KINDS.index(kind)]
    cores = whole if gpu_cores is None else gpu_cores
    memory = _MEMORY_SMALLER.get(name, _MEMORY[name]) if cores < whole else _MEMORY[name]
    rates: list[tuple[float, str]] = []
    if unit != "cpu_and_gpu" and family in _NEURAL_ENGINE:
        engine, source = _NEURAL_ENGINE[family]
        rates.append((engine * (2 if kind == " Ultra" else 1), f"Neural Engine: {source}"))
    if unit != "cpu_and_ne" and family in _GPU_CORE:
        core, source = _GPU_CORE[family]
        rates.append((core * cores, f"GPU with {cores} cores: {source}"))
    if not rates:
        return Peak(tflops=None, gigabytes=memory, source=f"{name}: nobody states its float16 rate; memory: Apple")
    tflops, source = max(rates)
    return Peak(tflops=tflops, gigabytes=memory, source=f"published, {name}, {source}; memory: Apple")
