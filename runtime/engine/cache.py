"""The compile cache: package -> its .mlmodelc at a fixed path, tried on a compute unit before anything relies on it.

ROOT/KEY/NAME.mlmodelc   compiled once; Core ML keeps what it makes for the Neural Engine by this path
ROOT/KEY/entry.json      where it came from, and how every compute unit that was tried did
ROOT/locks/KEY           held while one process compiles; the others wait
ROOT/known/              digests of big files, by what the file system says of them

KEY is the sha256 of the package's content and the build of macOS: a changed weight, or an update of macOS, is another
model. An entry is written by renaming, so that a process killed at any moment leaves a whole one or none.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import platform
import plistlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import platformdirs

from glassine.errors import EngineError
from glassine.runtime.engine.contract import COMPILED, ComputeUnits, TensorSpec
from glassine.runtime.engine.trial import UNITS, Job, Trial, attempt

PLANS: dict[ComputeUnits, tuple[ComputeUnits, ...]] = {  # what is asked for -> what is tried, in this order
    "all": ("all", "cpu_and_gpu", "cpu_only"),
    "cpu_and_ne": ("cpu_and_ne", "cpu_and_gpu", "cpu_only"),
    "cpu_and_gpu": ("cpu_and_gpu", "cpu_only"),
    "cpu_only": ("cpu_only",),
}
State = Literal["ready", "damaged", "of another system", "of a package that is gone"]
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOLCK, errno.ENOTSUP)
_GLANCE = 0.1  # seconds between looks at a lock that another process holds
_SMALL = 1 << 20  # bytes below which a file is hashed every time


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A package, or a .mlmodelc, and how it is to run.

    inputs: what the function reads. timeout: seconds that one unit may take to compile, load and predict once. tell:
    is given what happens, in words. retry: try units again that failed before. given_up: whether nobody waits for it.
    """

    package: Path
    units: ComputeUnits
    inputs: tuple[TensorSpec, ...]
    function: str | None = None
    timeout: float = 900.0
    tell: Callable[[str], None] = lambda words: None
    retry: bool = False
    given_up: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A compiled model, the units that run it, and what to tell the user where they are not those asked for."""

    model: Path
    units: ComputeUnits
    notices: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Entry:
    """One compiled model of the cache, as its entry.json says.

    source: the package it was made of. build: of macOS. size: bytes when it was made. trials: "cpu_and_ne", or
    "cpu_and_ne FUNCTION", or "compile" -> how it went.
    """

    source: str
    build: str
    model: str
    size: int
    trials: dict[str, Trial] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write entry.json, whole or not at all."""
        _write(folder / "entry.json", json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Entry | None:
        """Return the entry, or None: there is none, it is of another version, or its model is damaged."""
        try:
            raw = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
            trials = {unit: Trial(**trial) for unit, trial in raw.pop("trials").items()}
            entry = cls(**raw, trials=trials)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        # Core ML may add files of its own; what was there once has to be there still.
        return entry if folder_size(folder / entry.model) >= entry.size else None


def cache_root() -> Path:
    """The folder of the cache: GLASSINE_CACHE, or where the system keeps caches."""
    given = os.environ.get("GLASSINE_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("glassine")) / "coreml"


def os_build() -> str:
    """The build of macOS, such as 24F74; elsewhere the kernel's release."""
    if sys.platform != "darwin":
        return platform.release()
    with Path("/System/Library/CoreServices/SystemVersion.plist").open("rb") as file:
        return str(plistlib.load(file)["ProductBuildVersion"])


def prepare(wanted: Wanted, scratch: Path) -> Ready:
    """Return the compiled model, from the cache where it can be, and the first units of the plan that run it.

    Args:
        scratch: an empty folder of the caller's, for a model compiled for this run alone where the cache is read-only.

    Raises:
        EngineError: it cannot be compiled, or none of the units runs it; the message holds every reason.
    """
    root = cache_root()
    try:
        return Cache(root).ready(wanted)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        ready = Cache(scratch).ready(wanted)
        notice = f"the compile cache {root} cannot be written ({error.strerror}); compiled for this run only"
        return dataclasses.replace(ready, notices=(notice, *ready.notices))


class Cache:
    """Compiled models under one folder, shared by all processes."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def ready(self, wanted: Wanted) -> Ready:
        """Return the compiled model and the first units of the plan that run it.

        A model that is known costs no lock and writes nothing, so a read-only cache serves what it holds.

        Raises:
            EngineError: as `prepare`. OSError: the cache cannot be written.
        """
        key = f"{self._content(wanted.package)[:32]}-{os_build()}"
        folder = self.root / key
        entry = Entry.read(folder)
        ready = None if entry is None or wanted.retry else _known(folder, entry, wanted)
        if ready is None:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked(key, wanted):
                folder.mkdir(exist_ok=True)  # `clear` may have been quicker
                ready = self._tried(folder, wanted)
        with suppress(OSError):
            os.utime(folder / "entry.json")
        return ready

    @staticmethod
    def state(entry: Entry | None) -> State:
        """What an entry is still good for: "ready", or why it will not be used any more."""
        if entry is None:
            return "damaged"
        if entry.build != os_build():
            return "of another system"
        return "ready" if Path(entry.source).exists() else "of a package that is gone"

    def entries(self) -> dict[str, Entry | None]:
        """Return key -> entry of all that is there, the one used last first; None is unfinished or damaged."""
        folders = [path for path in self.root.glob("*-*") if path.is_dir()]
        used = {path: _modified(path / "entry.json") for path in folders}
        return {path.name: Entry.read(path) for path in sorted(folders, key=lambda path: -used[path])}

    def used(self, key: str) -> float:
        """When an entry was used last, in seconds since 1970; 0 is unknown."""
        return _modified(self.root / key / "entry.json")

    def remove(self, key: str) -> int | None:
        """Remove one entry and return the bytes freed; None: a process is compiling it, so it stays.

        Raises:
            OSError: the cache cannot be written.
        """
        try:
            with self._locked(key):
                size = folder_size(self.root / key)
                shutil.rmtree(self.root / key)
                return size
        except BlockingIOError:
            return None
        except FileNotFoundError:
            return 0

    def forget_digests(self) -> None:
        """Remove what is remembered of big files."""
        shutil.rmtree(self.root / "known", ignore_errors=True)

    def _tried(self, folder: Path, wanted: Wanted) -> Ready:
        """Try the units that are not known yet, in the plan's order; the lock is held."""
        for left in folder.glob("workshop-*"):  # a process was killed
            shutil.rmtree(left, ignore_errors=True)
        model = wanted.package.absolute() if wanted.package.suffix == COMPILED else _model(folder, wanted)
        entry = Entry.read(folder)
        if entry is None:
            entry = Entry(source=str(wanted.package.absolute()), build=os_build(), model=str(model), size=0)
            if model.parent == folder:
                entry.model = model.name
                self._make_room(folder, model, wanted)
        if wanted.retry:
            entry.trials = {name: trial for name, trial in entry.trials.items() if trial.passed}
        while (ready := _known(folder, entry, wanted)) is None:
            untried = next(units for units in PLANS[wanted.units] if _name(units, wanted) not in entry.trials)
            trial = self._attempt(folder, model, untried, wanted)
            if model.is_dir() and model.parent == folder:
                entry.size = folder_size(model)
            if trial.stage in ("start", "compile") or trial.ending == "full":
                if trial.ending in ("crashed", "hung") and trial.stage == "compile":
                    entry.trials["compile"] = trial
                    entry.write(folder)
                raise _uncompiled(wanted, trial, self.root)
            entry.trials[_name(untried, wanted)] = trial
            entry.write(folder)
        return ready

    def _attempt(self, folder: Path, model: Path, units: ComputeUnits, wanted: Wanted) -> Trial:
        workshop = Path(tempfile.mkdtemp(prefix="workshop-", dir=folder))
        try:
            job = Job(
                package=wanted.package.absolute(),
                workshop=workshop,
                model=model,
                units=UNITS[units],
                function=wanted.function,
                inputs=wanted.inputs,
                timeout=wanted.timeout,
            )
            return attempt(job, wanted.tell, wanted.given_up)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)

    def _make_room(self, folder: Path, model: Path, wanted: Wanted) -> None:
        """Remove what this compilation replaces, and make sure that the disk has room for it.

        Replaced are a damaged model, and what an earlier state of the same package, or another build of macOS, made;
        where that is not enough, all that is of no use any more goes too.
        """
        if model.is_dir() and not (folder / "entry.json").is_file():
            return  # the process that compiled it was killed before it could say so
        shutil.rmtree(model, ignore_errors=True)
        for key, entry in self.entries().items():
            if entry is not None and entry.source == str(wanted.package.absolute()) and key != folder.name:
                self.remove(key)
        need = folder_size(wanted.package)
        if shutil.disk_usage(folder).free < need:
            for key, entry in self.entries().items():
                if key != folder.name and self.state(entry) != "ready":
                    self.remove(key)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise EngineError(
                f"{wanted.package}: compiling needs {need / 1e9:.2f} GB in {self.root}, {free / 1e9:.2f} GB are free; "
                "free some, run 'glassine cache clear', or set GLASSINE_CACHE to a folder on another disk"
            )

    @contextmanager
    def _locked(self, key: str, wanted: Wanted | None = None) -> Iterator[None]:
        """Hold the lock of one entry; where another process holds it, wait, or raise BlockingIOError: nothing wanted.

        Raises:
            EngineError: waiting was given up.
        """
        import fcntl  # Unix only, as Core ML is; listing an empty cache works anywhere

        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = os.open(locks / key, os.O_CREAT | os.O_RDWR, 0o644)  # not inherited: a child does not hold it
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if wanted is None:
                    raise
                wanted.tell(f"{wanted.package.name}: waiting for another process")
                _wait(lock, wanted)
            yield
        finally:
            os.close(lock)

    def _content(self, package: Path) -> str:
        """The sha256 of everything in a package: names and bytes."""
        inside = package if package.suffix == COMPILED else package / "Data"
        digest = hashlib.sha256(package.suffix.encode())
        for path in sorted(path for path in inside.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(inside).as_posix()}\0{self._sha256(path)}\0".encode())
        return digest.hexdigest()

    def _sha256(self, path: Path) -> str:
        """The sha256 of a file, remembered for as long as the file system says that it is the same."""
        seen = path.stat()
        identity = f"{seen.st_dev} {seen.st_ino} {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns}"
        known = self.root / "known" / hashlib.sha256(identity.encode()).hexdigest()[:32]
        if seen.st_size >= _SMALL:
            with suppress(OSError):
                text = known.read_text(encoding="ascii")
                if len(text) == 64:
                    return text
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        if seen.st_size >= _SMALL:
            with suppress(OSError):
                known.parent.mkdir(parents=True, exist_ok=True)
                _write(known, digest.hexdigest())
        return digest.hexdigest()


def _wait(lock: int, wanted: Wanted) -> None:
    import fcntl

    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wanted.given_up():
                raise EngineError(f"{wanted.package}: given up while another process compiled it") from None
            time.sleep(_GLANCE)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 if there is none."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process removes it
            size += path.stat().st_size if path.is_file() else 0
    return size


def _model(folder: Path, wanted: Wanted) -> Path:
    """The compiled model of an entry: under the name it got first, whatever a copy of the package is called."""
    there = sorted(folder.glob(f"*{COMPILED}"))
    return there[0] if there else folder / f"{wanted.package.stem}{COMPILED}"


def _known(folder: Path, entry: Entry, wanted: Wanted) -> Ready | None:
    """What the trials say already: the units that run it; None where one has to be tried first.

    Raises:
        EngineError: every unit of the plan failed, or its compilation did.
    """
    if "compile" in entry.trials:
        raise _uncompiled(wanted, entry.trials["compile"], folder.parent)
    failed: list[str] = []
    for units in PLANS[wanted.units]:
        trial = entry.trials.get(_name(units, wanted))
        if trial is None:
            return None
        if trial.passed:
            return Ready(model=folder / entry.model, units=units, notices=_notices(wanted, units, failed))
        failed.append(f"{units} {_failure(trial)}")
    raise EngineError(
        f"{wanted.package}: no compute unit runs it: {'; '.join(failed)}. 'glassine cache warm FOLDER --retry' tries "
        "again; --engine portable runs it with PyTorch"
    )


def _notices(wanted: Wanted, units: ComputeUnits, failed: list[str]) -> tuple[str, ...]:
    if not failed:
        return ()
    return (
        f"{wanted.package.name} runs on {units}: {'; '.join(failed)}. This is remembered; "
        "'glassine cache warm FOLDER --retry' tries again",
    )


def _failure(trial: Trial) -> str:
    where = {"load": "when loading", "predict": "at the first prediction"}.get(trial.stage, f"at {trial.stage}")
    return f"{trial.ending} {where} ({trial.reason})"


def _uncompiled(wanted: Wanted, trial: Trial, root: Path) -> EngineError:
    if trial.ending == "full":
        return EngineError(
            f"{wanted.package}: the disk is full, so {root} cannot take the compiled model ({trial.reason}); free "
            "some, run 'glassine cache clear', or set GLASSINE_CACHE to a folder on another disk"
        )
    doing = "compiling it" if trial.stage == "compile" else "the child process that compiles it"
    return EngineError(
        f"{wanted.package}: {doing} {trial.ending} ({trial.reason}); 'glassine cache warm FOLDER --retry' tries again, "
        "--engine portable runs it with PyTorch"
    )


def _name(units: ComputeUnits, wanted: Wanted) -> str:
    return units if wanted.function is None else f"{units} {wanted.function}"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _write(path: Path, text: str) -> None:
    """Write a file so that others see all of it or the one before."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
