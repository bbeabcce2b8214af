"""A folder -> what went into its weights besides the checkpoint: LoRAs, embeddings, another VAE, the running average.

glassine.json keeps the name and the sha256 of each. Here their files are found again, so that the folder can be held
against what it was made of, and not against the checkpoint alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.digest import digests
from glassine.convert.embeddings import EmbeddingFile
from glassine.convert.extras import Extras, file_sha256, with_extras
from glassine.convert.folder import files_of
from glassine.convert.index import part_of
from glassine.convert.lora import LoraFile
from glassine.convert.swap import LORAS
from glassine.convert.weights import WeightSource
from glassine.errors import PackageError
from glassine.manifest import Manifest, MergedLora

_TEXT_ROLES = ("text_encoder", "text_encoder_2")
_VAE_ROLES = ("vae_decoder", "vae_encoder")


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What lies over a checkpoint in a folder: laid there at conversion, then by `glassine lora`."""

    converted: Extras
    removable: tuple[LoraFile, ...]

    @property
    def extras(self) -> Extras:
        """All of it, in the order it was merged."""
        return replace(self.converted, loras=(*self.converted.loras, *self.removable))


def ingredients(
    folder: Path,
    manifest: Manifest,
    given: Sequence[Path] = (),
    *,
    parts: Collection[str] = (),
    allow_pickle: bool = False,
) -> Ingredients:
    """Find the files that went into a folder besides its checkpoint.

    Args:
        folder: made by `glassine convert`; LoRAs that `glassine lora` merged lie in it.
        given: the other files, or folders below which LoRAs and embeddings lie under the names they have in the model.
        parts: keys of the manifest; what went into others is not looked for. Empty: all.

    Raises:
        PackageError: a file is not there, or one that was given did not go into this folder.
    """
    roles = {part.role for key, part in manifest.parts.items() if not parts or key in parts}
    merged = any(part_of(role) for role in roles)
    loras = manifest.loras if merged else ()
    words = manifest.embeddings if roles & {*_TEXT_ROLES} else ()
    names = {lora.name.lower() for lora in manifest.loras} | {word.word.lower() for word in manifest.embeddings}
    files = {file_sha256(path): path for path in _files(folder, given, names)}
    vae, missing = _vae(manifest, given, files) if roles & {*_VAE_ROLES} else (None, [])
    wanted = {f"the LoRA {lora.name!r}": lora.sha256 for lora in loras}
    wanted |= {f"the embedding {embedding.word!r}": embedding.sha256 for embedding in words}
    missing += [f"{what} (sha256 {sha256[:12]}...)" for what, sha256 in wanted.items() if sha256 not in files]
    if missing:
        raise PackageError(
            f"{folder}: {', '.join(missing)} went into its weights, so they differ from the checkpoint's on purpose; "
            "give the file with --with FILE"
        )
    _refuse_strangers(folder, manifest, given, files)

    def lora_files(*, removable: bool) -> Iterator[LoraFile]:
        yield from (_lora(files[lora.sha256], lora) for lora in loras if lora.removable is removable)

    converted = Extras(
        loras=tuple(lora_files(removable=False)),
        vae=vae,
        ema=manifest.decided.get("unet weights") == "EMA",
        embeddings=tuple(EmbeddingFile(files[word.sha256], word.word) for word in words),
        allow_pickle=allow_pickle,
    )
    return Ingredients(converted, tuple(lora_files(removable=True)))


def exact_unet(folder: Path, source: Path, given: Sequence[Path] = (), *, allow_pickle: bool = False) -> WeightSource:
    """Return the weights of a folder's UNet as they were before they were stored in fewer bits.

    Args:
        source: the checkpoint that the folder was made of; its sha256 is compared. given: as `ingredients` has it.

    Raises:
        PackageError: it is another checkpoint, or a file that went over it is not at hand.
        CheckpointError, ConversionError: the source cannot be read.
    """
    manifest = Manifest.read(folder)
    checkpoint = open_checkpoint(source, allow_pickle=allow_pickle)
    files = files_of(checkpoint, "unet")
    with digests([files]) as digest:
        detected = detect(checkpoint, family=manifest.family)
        found = ingredients(folder, manifest, given, parts=["unet"], allow_pickle=allow_pickle)
        detected = with_extras(checkpoint, detected, found.converted)
        sha256, made_of = digest()[files], manifest.parts["unet"]
    if sha256 != made_of.source_sha256:
        raise PackageError(
            f"{source}: the sha256 of its UNet is {sha256[:12]}..., {folder} was made of {made_of.source} with "
            f"{made_of.source_sha256[:12]}...; give that one"
        )
    return detected.parts["unet"]


def _lora(path: Path, lora: MergedLora) -> LoraFile:
    return LoraFile(path, lora.unet, lora.text)


def _files(folder: Path, given: Sequence[Path], names: Collection[str]) -> Iterator[Path]:
    """The files that may have gone in: those that were given, and by their names those in the folders."""
    for path in given:
        if not path.exists():
            raise PackageError(f"{path}: no such file")
        if path.is_file():
            yield path
    for place in (folder / LORAS, *(path for path in given if path.is_dir())):
        yield from (path for path in sorted(place.rglob("*")) if path.stem.lower() in names and path.is_file())


def _vae(manifest: Manifest, given: Sequence[Path], files: dict[str, Path]) -> tuple[Path | None, list[str]]:
    """The file or diffusers folder whose VAE took the checkpoint's place, or that it is missing."""
    part = next(part for part in manifest.parts.values() if part.role in _VAE_ROLES)
    if "vae" not in manifest.decided:
        return None, []
    known = [files[part.source_sha256]] if part.source_sha256 in files else []
    known += [path for path in given if path.is_dir() and path.absolute().name == part.source]
    return (known[0], []) if known else (None, [f"the VAE of {part.source}"])


def _refuse_strangers(folder: Path, manifest: Manifest, given: Sequence[Path], files: dict[str, Path]) -> None:
    """Refuse a file that is none of those which glassine.json names."""
    known = {lora.sha256 for lora in manifest.loras} | {embedding.sha256 for embedding in manifest.embeddings}
    known |= {part.source_sha256 for part in manifest.parts.values() if part.role in _VAE_ROLES}
    strangers = [str(path) for sha256, path in files.items() if sha256 not in known and path in given]
    if strangers:
        raise PackageError(f"{folder}: {', '.join(strangers)} did not go into it: no sha256 in glassine.json is theirs")
