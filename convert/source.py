"""Where the checkpoint of a folder lies: a path, kept in the folder's store because palettes need its weights again.

glassine.json says what the checkpoint was (name and sha256) and travels with the folder; the path is of this machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from glassine.errors import PackageError
from glassine.manifest import STORE, Manifest

_FILE = "source.json"


def remember_source(folder: Path, source: Path) -> None:
    """Note the path of the checkpoint that a folder was made of."""
    (folder / STORE).mkdir(exist_ok=True)
    text = json.dumps({"path": str(source.absolute())}, indent=2) + "\n"
    (folder / STORE / _FILE).write_text(text, encoding="utf-8")


def find_source(folder: Path, given: Path | None = None) -> Path:
    """Return the checkpoint that a folder was made of: `given`, or where it lay then. Its content is not looked at.

    Raises:
        PackageError: it is not there any more, or the folder does not know where it was.
    """
    if given is not None:
        return given
    unet = Manifest.read(folder).parts["unet"]
    try:
        path = Path(json.loads((folder / STORE / _FILE).read_text(encoding="utf-8"))["path"])
        where = f"is no longer at {path}"
    except (OSError, ValueError, KeyError, TypeError):
        path, where = None, "lies where the folder does not know"
    if path is None or not path.exists():
        raise PackageError(
            f"{folder}: its UNet has palettes ({unet.palette}), so LoRAs are merged into the weights that it was made "
            f"of, and {unet.source} (sha256 {unet.source_sha256[:12]}...) {where}; say --source CHECKPOINT"
        )
    return path
