"""What a model folder has to time, and which weights it was made of."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from glassine.errors import PackageError
from glassine.manifest import Manifest, Part
from glassine.runtime.foreign import Model

_MODEL = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")


def parts_of(manifest: Manifest, size: tuple[int, int], wanted: tuple[str, ...] = ()) -> dict[str, Part]:
    """Role -> part of everything that a folder has for one size.

    Raises:
        PackageError: a part that is wanted is not there.
    """
    roles = dict.fromkeys(re.sub(r"_\d+x\d+$", "", key) for key in manifest.parts)
    found = {role: part for role in roles if (part := manifest.part(role, size)) is not None}
    unknown = [role for role in wanted if role not in found]
    if unknown:
        raise PackageError(f"the model has no {', '.join(unknown)}, only {', '.join(found)}")
    return {role: part for role, part in found.items() if not wanted or role in wanted}


def packages_of(folder: Path, part: Part) -> tuple[Path, ...]:
    """The package of a part, or those it is cut into.

    Raises:
        PackageError: a file that is not in the folder; a manifest is untrusted.
    """
    files = tuple(part.about.get("chunks", (part.file,)))
    if any(Path(file).name != file for file in files):
        raise PackageError(f"{folder}: {files!r} are not plain file names; convert the model again")
    return tuple(folder / file for file in files)


def model_digest(model: Model) -> str:
    """A sha256 that is equal for equal weights, however they were converted.

    Of what its networks were made of, and of its LoRAs; for folders of others, which do not say that, of the weights.
    """
    made_of = {part.source_sha256 for role in _MODEL if (part := model.manifest.parts.get(role)) is not None}
    if "" in made_of:
        parts = [model.manifest.parts[role] for role in _MODEL if role in model.manifest.parts]
        files = {
            file for part in parts for package in packages_of(model.folder, part) for file in weight_files(package)
        }
        made_of = {_sha256(file) for file in files}
    merged = [f"{lora.sha256} {lora.unet:g} {lora.text:g}" for lora in model.manifest.loras]
    return hashlib.sha256("\n".join([*sorted(made_of), *merged]).encode()).hexdigest()


def weight_files(package: Path) -> list[Path]:
    """The files of a package, or of a compiled model, that hold weights."""
    return sorted(path for path in package.rglob("weight*.bin") if path.is_file())


def weight_bytes(packages: tuple[Path, ...]) -> int:
    """Bytes of the weight files of packages."""
    return sum(path.stat().st_size for package in packages for path in weight_files(package))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
