"""What `glassine tune` has found: a model at one size, on this machine -> which package plays a part, and where.

CONFIG/tuned/KEY.json   the choices by role; KEY is the digest of the model's UNet, the size, the chip, the build of the
                        system and the engine, so that a copy or another name of the folder is the same model

What the user says (`--units`, `--device`) wins, for all parts; then what was found here; then the model's own packages
on all compute units. A choice whose packages are not there, or compute something else by now, is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import platformdirs

from glassine.errors import PackageError
from glassine.manifest import Manifest, Part
from glassine.runtime.engine.cache import os_build
from glassine.runtime.engine.contract import COMPILED, ComputeUnits, EngineOptions, engine_name
from glassine.runtime.machine import chip

FORMAT_VERSION = 1
Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How one part is run here.

    role: of the part in glassine.json that plays it: its own, or "tuned_" and its own for another form of the network.
    units: for Core ML. device: for the portable engine. programs: sha256 of what its packages compute, weights apart.
    why: in words.
    """

    role: str
    units: ComputeUnits | None
    device: str | None
    programs: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What was found for a model at one size on one machine; choices by role. date: ISO 8601."""

    model: str
    size: Size
    machine: str
    date: str
    choices: Mapping[str, Choice]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The part that plays a role, and how to run it; `tuned`: because of what was found here."""

    part: Part
    options: EngineOptions
    tuned: Choice | None = None


class Choices:
    """Which package plays a part of a model, and on what.

    Attributes:
        tuning: what was found for the model here; None where nothing was, or the user says how to run it.
        notices: choices that are not used, and why.
    """

    def __init__(self, folder: Path, manifest: Manifest, size: Size, options: EngineOptions) -> None:
        self._options = options
        self._chosen: dict[str, Chosen] = {}
        self.tuning: Tuning | None = None
        self.notices: tuple[str, ...] = ()
        if options.compute_units is None and options.device is None and options.precision == "fp32":
            place = place_of(folder, manifest, size, engine_name(options))
            if place is not None and place.is_file():
                self._take(place, folder, manifest, size)

    def of(self, role: str, part: Part) -> Chosen:
        """Return what plays `role` at the size of these choices; `part` is the model's own."""
        return self._chosen.get(role, Chosen(part, self._options))

    def _take(self, place: Path, folder: Path, manifest: Manifest, size: Size) -> None:
        """Read what was found, and keep what still fits the folder."""
        try:
            self.tuning = read(place)
        except PackageError as error:
            self.notices = (str(error),)
            return
        for role, choice in self.tuning.choices.items():
            part = manifest.part(choice.role, size)
            if part is not None and programs_of(folder, part) == choice.programs:
                options = replace(self._options, compute_units=choice.units, device=choice.device)
                self._chosen[role] = Chosen(part, options, choice)
                continue
            gone = "is not in this folder" if part is None else "is not what was measured"
            said = f"{role}: what 'glassine tune' chose ({choice.role}) {gone}; it is not used: tune the model again"
            self.notices = (*self.notices, said)


def config_root() -> Path:
    """The folder of the user's settings: GLASSINE_CONFIG, or where the system keeps them."""
    given = os.environ.get("GLASSINE_CONFIG")
    return Path(given).expanduser() if given else Path(platformdirs.user_config_dir("glassine"))


def place_of(folder: Path, manifest: Manifest, size: Size, engine: str) -> Path | None:
    """Return where the choices for a model lie, or would lie; None: it has no UNet of this size."""
    unet = manifest.part("unet", size)
    if unet is None:
        return None
    content = unet.source_sha256 if unet.source_sha256 else programs_of(folder, unet)
    form = [unet.attention, unet.layout, unet.palette, unet.inputs]
    facts = [content, form, size, chip(), os_build(), engine]
    return config_root() / "tuned" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"


def files_of(folder: Path, part: Part) -> tuple[Path, ...]:
    """The packages of a part: one, or the chunks it is cut into.

    Raises:
        PackageError: the manifest, which is untrusted, names what lies elsewhere.
    """
    files = part.about.get("chunks", (part.file,))
    if any(Path(file).name != file for file in files):
        raise PackageError(f"{folder}: {files!r} are not plain file names; convert the model again")
    return tuple(folder / file for file in files)


def programs_of(folder: Path, part: Part) -> str:
    """The sha256 of what the packages of a part compute, without their weights; "" if one of them is not there.

    A LoRA changes the weights alone, and what was found to be fast stays so.
    """
    digest = hashlib.sha256()
    for path in files_of(folder, part):
        program = path / ("model.mil" if path.suffix == COMPILED else "Data/com.apple.CoreML/model.mlmodel")
        if not program.is_file():
            return ""
        digest.update(hashlib.sha256(program.read_bytes()).digest())
    return digest.hexdigest()


def read(place: Path) -> Tuning:
    """Read what was found for a model.

    Raises:
        PackageError: it cannot be read.
    """
    try:
        raw = json.loads(place.read_text(encoding="utf-8"))
        if raw.pop("format_version") != FORMAT_VERSION:
            raise ValueError("written by another version of Glassine")
        choices = {role: Choice(**choice) for role, choice in raw.pop("choices").items()}
        unknown = {choice.units for choice in choices.values()} - {None, *get_args(ComputeUnits)}
        if unknown:
            raise ValueError(f"compute units {sorted(map(str, unknown))}")
        width, height = raw.pop("size")
        return Tuning(size=(width, height), choices=choices, **raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{place}: cannot be read ({error}); 'glassine tune' the model again") from None


def write(place: Path, tuning: Tuning) -> None:
    """Write what was found, whole or not at all.

    Raises:
        PackageError: the folder cannot be written.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(tuning)}, indent=1) + "\n"
    beside = place.with_name(f".{place.name}-{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, place)
    except OSError as error:
        raise PackageError(
            f"{place}: cannot be written ({error.strerror}); set GLASSINE_CONFIG to a folder of yours"
        ) from None
