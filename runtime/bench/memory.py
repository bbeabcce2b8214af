"""The most memory this process has held since it began, as its system counts it.

Linux: VmHWM, the peak resident set of this program alone (ru_maxrss starts with that of the process that forked it).
macOS: the peak of the physical footprint, what Activity Monitor calls memory: it counts what a process has dirtied,
with compressed pages and buffers of the GPU; neither clean mapped files nor what the Neural Engine's daemon holds.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path
from typing import Literal

Meaning = Literal["resident set", "physical footprint"]
_RUSAGE_INFO_V4 = 4
_WORDS = 64  # of 8 bytes: more than the structure has
_LIFETIME_PEAK = 2 + 28  # behind a UUID of 16 bytes, ri_lifetime_max_phys_footprint is the 29th number (sys/resource.h)


def peak_memory() -> tuple[int, Meaning]:
    """Return bytes, and what they count."""
    if sys.platform == "darwin":
        numbers = (ctypes.c_uint64 * _WORDS)()
        system = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
        if system.proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(numbers)) == 0:
            return int(numbers[_LIFETIME_PEAK]), "physical footprint"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "resident set"
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    if found is not None:
        return int(found[1]) * 1024, "resident set"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident set"
