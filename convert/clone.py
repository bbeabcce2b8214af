"""Files that share their bytes where the disk can."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}
_FICLONE = 0x40049409  # linux/fs.h: share the extents of another file


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the disk has no hard links (exFAT)."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        clone_or_copy(source, target)


def clone_or_copy(source: Path, target: Path) -> None:
    """Make `target` a new file with the bytes of `source`; where the disk can (APFS, Btrfs, XFS) they share them."""
    if not cloned(source, target):
        shutil.copyfile(source, target)


def cloned(source: Path, target: Path) -> bool:
    """Make `target` a new file that shares its bytes with `source`, if the disk can; say whether it is there."""
    if sys.platform == "darwin":
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        return bool(library.clonefile(os.fsencode(source), os.fsencode(target), 0) == 0)
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            shared = False
        else:
            shared = True
    if not shared:
        target.unlink()
    return shared
