"""`glassine doctor`: what is installed, what will run, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from glassine import __version__

Status = Literal["ok", "note", "missing"]
REQUIRED = ("numpy", "coremltools", "safetensors", "pillow", "platformdirs", "regex", "ftfy", "click", "rich")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` is the command or step that mends it, or empty."""

    name: str
    status: Status
    text: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at the machine; changes nothing and loads no model."""
    return [_python(), *_libraries(), *_engines(), _disk(), _cache()]


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


def _engines() -> list[Finding]:
    coreml = (
        Finding("Core ML engine", "ok", f"macOS {platform.mac_ver()[0]} on {platform.machine()}; the default here")
        if sys.platform == "darwin"
        else Finding("Core ML engine", "note", "needs macOS; the portable engine runs the same packages here")
    )
    if importlib.util.find_spec("torch") is None:
        missing = Finding("portable engine", "missing", "PyTorch is not installed", "pip install 'glassine[portable]'")
        return [coreml, missing]
    import torch

    devices = ["cpu"]
    devices += [f"cuda ({torch.cuda.get_device_name()})"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    text = f"torch {torch.__version__}, {torch.get_num_threads()} threads; devices: {', '.join(devices)}"
    return [coreml, Finding("portable engine", "ok", text)]


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free here"
    if free >= 5e9:
        return Finding("disk", "ok", text)
    return Finding("disk", "note", text, "a converted Stable Diffusion 1.5 model takes 2.2 GB")


def _cache() -> Finding:
    folder = Path(platformdirs.user_cache_dir("glassine"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return Finding("cache", "ok", f"{folder} ({size / 1e6:.0f} MB); safe to delete")
