"""Bytes from file to file: shared where the disk can, else inside the kernel where that can."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}
_PIECE = 1 << 22  # bytes
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


def copy_range(source: int, out: int, start: int, stop: int) -> None:
    """Copy the bytes [start, stop) of an open file to the same place of another.

    Raises:
        OSError: the disk, or the file has become shorter.
    """
    in_kernel = getattr(os, "copy_file_range", None)  # Linux
    while start < stop:
        count = 0
        if in_kernel is not None:
            try:
                count = in_kernel(source, out, stop - start, start, start)
            except OSError:  # it cannot between these disks; any other reason comes up again below
                in_kernel = None
        if not count:
            piece = os.pread(source, min(stop - start, _PIECE), start)
            if not piece:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            write_all(out, piece, start)
            count = len(piece)
        start += count


def write_all(out: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(out, view, offset)
        view, offset = view[written:], offset + written
