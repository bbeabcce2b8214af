"""`glassine doctor`: what is installed, what will run, what is missing, and what is known not to work here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glassine import __version__
from glassine.runtime.machine import Machine, this_machine

Status = Literal["ok", "note", "missing"]
REQUIRED = (
    "numpy",
    "coremltools",
    "safetensors",
    "pillow",
    "platformdirs",
    "regex",
    "ftfy",
    "click",
    "rich",
    "opencv-python-headless",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` is the command or step that mends it, or empty."""

    name: str
    status: Status
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """A combination that is known not to work: where it applies, who reported it, and what to do."""

    issue: str
    applies: Callable[[Machine, tuple[int, ...], tuple[int, ...]], bool]  # machine, coremltools, numpy
    text: str
    advice: str


KNOWN = (
    Known("coremltools 2632", lambda machine, tools, numpy: tools[:2] == (9, 0) and numpy >= (2, 4),
          "the PyTorch converter of coremltools 9.0 fails with NumPy 2.4 and newer",
          "pip install 'numpy<2.4'; Glassine's own conversion does not use that converter"),
    Known("coremltools 2716", lambda machine, tools, numpy: machine.system == "darwin" and tools[:1] == (9,),
          "4-bit palettes of coremltools 9 have been seen to crash or to come out wrong",
          "convert with --palette 6 or 8, or hold a 4-bit model against its checkpoint with 'glassine verify'"),
    Known("coremltools 2367, 2247, 2758", lambda machine, tools, numpy: machine.system == "darwin" and machine.arm,
          "loading for the Neural Engine can take very long, be refused, or end the process at its first prediction",
          "'glassine cache warm MODEL' finds out in a child process; what fails is passed over"),
    Known("ml-stable-diffusion 251", lambda machine, tools, numpy: machine.chip.startswith("Apple M1"),
          "ControlNets have been seen to fail on the Neural Engine of M1 chips",
          "draw with --control on --units cpu_and_gpu"),
    Known("ml-stable-diffusion 271",
          lambda machine, tools, numpy: machine.system == "darwin" and machine.memory is not None
          and machine.memory <= 8 << 30,
          "SDXL swaps on Macs with 8 GB: 0.02 steps a second were reported",
          "Stable Diffusion 1.5, or convert SDXL with --palette 6"),
)  # fmt: skip


def examine(machine: Machine | None = None) -> list[Finding]:
    """Look at the machine (this one, if none is given); changes nothing and loads no model."""
    machine = this_machine() if machine is None else machine
    return [
        _machine(machine),
        _memory(machine),
        *_disks(),
        _python(),
        *_libraries(),
        *_engines(machine),
        *_cache(),
        *_known(machine),
    ]


def _machine(machine: Machine) -> Finding:
    cores = "" if machine.cores is None else f", {machine.cores} cores"
    text = f"{machine.chip}{cores}, {machine.name}"
    if machine.translated:
        advice = "this Python is for Intel and runs under Rosetta; install one for arm64"
        return Finding("machine", "note", text, advice)
    if machine.system == "darwin" and machine.version < (13,):
        return Finding("machine", "note", text, "converted packages need macOS 13; --engine portable runs them here")
    if machine.system == "darwin" and not machine.arm:
        return Finding("machine", "note", text, "a Mac without a Neural Engine; --units cpu_and_gpu")
    return Finding("machine", "ok", text)


def _memory(machine: Machine) -> Finding:
    if machine.memory is None or machine.available is None:
        return Finding("memory", "note", "the system does not say")
    text = f"{machine.available / 1e9:.1f} of {machine.memory / 1e9:.1f} GB available"
    if machine.available >= 4e9:
        return Finding("memory", "ok", text)
    return Finding(
        "memory", "note", text, "Stable Diffusion 1.5 in float16 has 2.2 GB of weights; close other programs"
    )


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.platform()}, glassine {__version__}"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", text)
    return Finding("python", "note", text, "Glassine is tested with Python 3.10 to 3.13")


def _libraries() -> list[Finding]:
    found = []
    for name in REQUIRED:
        try:
            found.append(Finding(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "missing", "not installed", f"pip install {name}"))
    return found


def _engines(machine: Machine) -> list[Finding]:
    coreml = _core_ml(machine)
    if importlib.util.find_spec("torch") is None:
        missing = Finding("portable engine", "missing", "PyTorch is not installed", "pip install 'glassine[portable]'")
        return [coreml, missing]
    import torch

    devices = ["cpu"]
    devices += [f"cuda ({torch.cuda.get_device_name()})"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    text = f"torch {torch.__version__}, {torch.get_num_threads()} threads; devices: {', '.join(devices)}"
    return [coreml, Finding("portable engine", "ok", text)]


def _core_ml(machine: Machine) -> Finding:
    if machine.system != "darwin":
        return Finding("Core ML engine", "note", "needs macOS; the portable engine runs the same packages here")
    spec = importlib.util.find_spec("coremltools")
    places = [] if spec is None or spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    if not any(list(Path(place).glob("libcoremlpython*")) for place in places):
        text = "coremltools has no bridge to Core ML (libcoremlpython)"
        advice = "pip install --force-reinstall coremltools, with a Python it has a wheel for: 3.10 to 3.13"
        return Finding("Core ML engine", "missing", text, advice)
    return Finding("Core ML engine", "ok", "the default here")


def _disks() -> list[Finding]:
    """Room where models are converted to, and where Core ML's compiled ones go if that is another disk."""
    from glassine.runtime.engine.cache import cache_root

    cache = next(folder for folder in (cache_root().absolute(), *cache_root().absolute().parents) if folder.is_dir())
    found = [_disk("disk", Path.cwd(), "a converted Stable Diffusion 1.5 model takes 2.2 GB")]
    if cache.stat().st_dev != Path.cwd().stat().st_dev:
        found.append(_disk("disk of the cache", cache, "compiled models take as much again as their packages"))
    return found


def _disk(name: str, folder: Path, advice: str) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at {folder}"
    return Finding(name, "ok", text) if free >= 5e9 else Finding(name, "note", text, advice)


def _cache() -> list[Finding]:
    """Core ML's compiled models: how many, which are of no use any more, which units have failed."""
    from glassine.runtime.engine.cache import Cache, cache_root, folder_size

    store = Cache(cache_root())
    there = next(place for place in (store.root, *store.root.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        advice = "models are compiled anew at every run; set GLASSINE_CACHE to a folder of yours"
        return [Finding("cache", "note", f"{store.root}: cannot be written", advice)]
    entries = store.entries()
    text = f"{store.root}: {len(entries)} compiled models, {folder_size(store.root) / 1e9:.2f} GB; safe to delete"
    useless = sum(store.state(entry) != "ready" for entry in entries.values())
    if useless:
        found = [Finding("cache", "note", f"{text}; {useless} of no use any more", "glassine cache clear --stale")]
    else:
        found = [Finding("cache", "ok", text)]
    for entry in entries.values():
        trials = entry.trials.items() if entry is not None and store.state(entry) == "ready" else ()
        failed = ", ".join(f"{units} {trial.ending}" for units, trial in trials if not trial.passed)
        if entry is not None and failed:
            advice = f"glassine cache warm {Path(entry.source).parent} --retry"
            found.append(Finding(f"failed: {entry.source}", "note", failed, advice))
    return found


def _known(machine: Machine) -> list[Finding]:
    tools, numpy = _version("coremltools"), _version("numpy")
    return [
        Finding(known.issue, "note", known.text, known.advice)
        for known in KNOWN
        if known.applies(machine, tools, numpy)
    ]


def _version(name: str) -> tuple[int, ...]:
    """The version of a library as numbers; () if it is not installed."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version(name))[:3])
    except importlib.metadata.PackageNotFoundError:
        return ()
