"""What machine is this: chip, system, memory, as the system itself says; no library and no model is loaded."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine.

    system: "darwin", "linux" ... version: of macOS, as numbers; () elsewhere. arm: whether the processor is an ARM.
    translated: this Python was made for Intel and runs under Rosetta. memory, available: bytes; None is unknown.
    """

    system: str
    version: tuple[int, ...]
    name: str
    chip: str
    cores: int | None
    arm: bool
    translated: bool
    memory: int | None
    available: int | None


def this_machine() -> Machine:
    """Ask the system."""
    return _mac() if sys.platform == "darwin" else _other()


def _mac() -> Machine:
    from glassine.runtime.engine.cache import os_build

    release = platform.mac_ver()[0]
    translated = _sysctl("sysctl.proc_translated") == "1"
    memory = _sysctl("hw.memsize")
    return Machine(
        system="darwin",
        version=tuple(int(number) for number in re.findall(r"\d+", release)),
        name=f"macOS {release} ({os_build()})",
        chip=_sysctl("machdep.cpu.brand_string"),
        cores=os.cpu_count(),
        arm=translated or platform.machine() == "arm64",
        translated=translated,
        memory=int(memory) if memory.isdecimal() else None,
        available=reclaimable(_output("vm_stat")),
    )


def _other() -> Machine:
    memory = _table(Path("/proc/meminfo"), r"^(\w+):\s+(\d+) kB$")
    chip = _table(Path("/proc/cpuinfo"), r"^(model name)\s*: (.+)$").get("model name", platform.processor())
    return Machine(
        system=sys.platform,
        version=(),
        name=platform.platform(),
        chip=chip,
        cores=os.cpu_count(),
        arm=platform.machine() in ("arm64", "aarch64"),
        translated=False,
        memory=int(memory["MemTotal"]) * 1024 if "MemTotal" in memory else None,
        available=int(memory["MemAvailable"]) * 1024 if "MemAvailable" in memory else None,
    )


def reclaimable(vm_stat: str) -> int | None:
    """Bytes that macOS can give to a program without swapping, from what `vm_stat` prints; None is unknown."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = dict(re.findall(r"^Pages ([\w ]+?):\s+(\d+)\.$", vm_stat, re.M))
    if page is None or "free" not in pages:
        return None
    return int(page[1]) * sum(int(pages.get(kind, 0)) for kind in ("free", "inactive", "speculative", "purgeable"))


def _sysctl(name: str) -> str:
    return _output("sysctl", "-n", name)


def _output(*command: str) -> str:
    """What a command of the system prints; empty if it is not there or refuses."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _table(path: Path, line: str) -> dict[str, str]:
    try:
        return dict(re.findall(line, path.read_text(encoding="utf-8"), re.M))
    except OSError:
        return {}
