"""The state of the machine around a benchmark: what else runs, where its power comes from, whether heat slows it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from glassine.runtime.machine import Machine

LIBRARIES = ("numpy", "coremltools", "torch")


@dataclass(frozen=True, slots=True)
class Condition:
    """Load averages over 1, 5 and 15 minutes; on a Mac what `pmset` says of power and heat, None elsewhere."""

    load: list[float]
    power: str | None
    thermal: str | None


def condition() -> Condition:
    """Ask the system now."""
    return Condition(
        list(os.getloadavg()), power_source(_said("pmset", "-g", "batt")), thermal(_said("pmset", "-g", "therm"))
    )


def machine_record(machine: Machine) -> dict[str, Any]:
    """What a report says of the machine, without its conditions."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "chip": machine.chip,
        "system": machine.name,
        "cores": machine.cores,
        "gpu_cores": gpu_cores(_said("system_profiler", "-json", "SPDisplaysDataType")),
        "memory_bytes": machine.memory,
        "python": platform.python_version(),
        "versions": versions,
    }


def doubts(before: Condition, after: Condition, cores: int | None) -> tuple[str, ...]:
    """What in the machine's state makes figures doubtful."""
    said = []
    if before.load and before.load[0] > 0.25 * (cores if cores is not None else 1):
        said.append(f"the machine was busy before it began: load average {before.load[0]:.2f} on {cores} cores")
    if before.power is not None and "battery" in before.power.lower():
        said.append("the machine ran on battery, which can slow it down")
    hot = [state.thermal for state in (before, after) if state.thermal not in (None, "nominal")]
    if hot:
        said.append(f"the chip was slowed down by heat: {hot[-1]}")
    return tuple(said)


def power_source(pmset: str) -> str | None:
    """The source that `pmset -g batt` names in its first line, such as "AC Power"; None is unknown."""
    first = pmset.partition("\n")[0]
    return first.split("'")[1] if first.count("'") >= 2 else None


def thermal(pmset: str) -> str | None:
    """What `pmset -g therm` says: "nominal", or the limits that are in force; None is unknown.

    It prints "No thermal warning level has been recorded" and the like, or lines such as "CPU_Speed_Limit = 80".
    """
    if not pmset:
        return None
    pairs = [line.split("=") for line in pmset.splitlines() if line.count("=") == 1]
    limits = {name.strip(): value.strip() for name, value in pairs}
    limited = {
        name: value
        for name, value in limits.items()
        if (name.endswith("_Limit") and value != "100") or (name.endswith("Level") and value != "0")
    }
    return "; ".join(f"{name} = {value}" for name, value in limited.items()) if limited else "nominal"


def gpu_cores(profile: str) -> int | None:
    """Cores of the GPU in what `system_profiler -json SPDisplaysDataType` prints; None is unknown."""
    try:
        cores = [one["sppci_cores"] for one in json.loads(profile)["SPDisplaysDataType"] if "sppci_cores" in one]
        return int(cores[0]) if cores else None
    except (ValueError, KeyError, TypeError):
        return None


def _said(*command: str) -> str:
    """What a command of macOS prints; empty elsewhere, or if it refuses."""
    if sys.platform != "darwin":
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
