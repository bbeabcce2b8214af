"""What machine is this: chip, system, memory, as the system itself says; no library and no model is loaded.

On a Mac each answer is a short process (`sysctl`, `vm_stat`), so that what a start needs is asked by itself: `chip`,
once, and `available_memory`. What is not answered is unknown, never an error.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SYSCTL = "/usr/sbin/sysctl"  # whatever PATH says: launchd and cron have none with it
_PATIENCE = 2.0  # seconds; they take some milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine.

    system: "darwin", "linux" ... version: of macOS, as numbers; () elsewhere. chip: such as "Apple M2 Pro". arm:
    whether the processor is an ARM. translated: this Python was made for Intel and runs under Rosetta. memory,
    available: bytes; None is unknown.
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
    """Ask the system everything."""
    mac = sys.platform == "darwin"
    translated = mac and _is_translated()
    return Machine(
        system=sys.platform,
        version=_version() if mac else (),
        name=f"macOS {_release()} ({_build()})" if mac else platform.platform(),
        chip=chip(),
        cores=os.cpu_count(),
        arm=translated or platform.machine() in ("arm64", "aarch64"),
        translated=translated,
        memory=_whole(_sysctl("hw.memsize")) if mac else _meminfo("MemTotal"),
        available=available_memory(),
    )


@cache
def chip() -> str:
    """The processor's name, such as "Apple M2 Pro"; its architecture where the system has no name for it."""
    if sys.platform == "darwin":
        name = _sysctl("machdep.cpu.brand_string")
        if name.startswith("VirtualApple"):  # what Rosetta tells programs for Intel
            name = _output("/usr/bin/arch", "-arm64", _SYSCTL, "-n", "machdep.cpu.brand_string")
    else:
        name = _table(Path("/proc/cpuinfo"), r"^(model name)\s*: (.+)$").get("model name", platform.processor())
    return name if name else platform.machine()


def available_memory() -> int | None:
    """Bytes that a program can have without swapping, now; None is unknown."""
    return reclaimable(_output("/usr/bin/vm_stat")) if sys.platform == "darwin" else _meminfo("MemAvailable")


def _is_translated() -> bool:
    return _sysctl("sysctl.proc_translated") == "1"  # Intel Macs do not know the name


@cache
def _release() -> str:
    """The version of macOS: Python's own answer is 10.16 where it was built for an old system."""
    said = _sysctl("kern.osproductversion")
    return said if said else platform.mac_ver()[0]


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", _release()))


def _build() -> str:
    from glassine.runtime.engine.cache import os_build

    return os_build()


def reclaimable(vm_stat: str) -> int | None:
    """Bytes that macOS can give to a program without swapping, from what `vm_stat` prints; None is unknown."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = dict(re.findall(r"^Pages ([\w ]+?):\s+(\d+)\.$", vm_stat, re.M))
    if page is None or "free" not in pages:
        return None
    return int(page[1]) * sum(int(pages.get(kind, 0)) for kind in ("free", "inactive", "speculative", "purgeable"))


def _sysctl(name: str) -> str:
    return _output(_SYSCTL, "-n", name)


def _output(*command: str) -> str:
    """What a command of the system prints; empty if it is not there, refuses or hangs."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()


def _whole(said: str) -> int | None:
    return int(said) if said.isdecimal() else None


def _meminfo(name: str) -> int | None:
    found = _table(Path("/proc/meminfo"), r"^(\w+):\s+(\d+) kB$")
    return int(found[name]) * 1024 if name in found else None


def _table(path: Path, line: str) -> dict[str, str]:
    try:
        return dict(re.findall(line, path.read_text(encoding="utf-8", errors="replace"), re.M))
    except OSError:
        return {}
