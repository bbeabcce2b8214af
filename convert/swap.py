"""Model folder + LoRAs -> the same folder with them in its weights, or a variant of it beside: no source, no graph.

    FOLDER/Unet.weights.json              where each weight lies in Unet.mlpackage's weight.bin
    FOLDER/.glassine/base/                weight.bin as converted, of every package that LoRAs have changed
    FOLDER/.glassine/swap/                a change that is complete and only has to be renamed into place
    FOLDER/.glassine/variants/            models with the LoRAs of prompts, the latest few

Every change starts from the weights as converted, which stay in the folder while a LoRA is in: the checkpoint may be
deleted, and taking all LoRAs out gives the old bytes back. A new weight.bin is a clone of that base (free on APFS,
Btrfs and XFS, a copy elsewhere) in which the changed records alone are written anew.

A change is staged, committed by one rename, and finished by renaming file after file. Killed before the commit it has
not happened; killed after it, whoever reads the folder next finishes it (`glassine.manifest.finish_swap`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from glassine.convert.clone import clone_or_copy, link_or_copy
from glassine.convert.extras import file_sha256
from glassine.convert.index import Index, by_frame, part_of, read_indices
from glassine.convert.lora import Lora, LoraFile, lora_patches, refuse_twins
from glassine.convert.package import check_space
from glassine.convert.rewrite import write_changed
from glassine.convert.weights import WeightSource
from glassine.errors import CheckpointError, PackageError
from glassine.manifest import FILE_NAME, STORE, WEIGHT_FILE, Manifest, MergedLora, finish_swap

# How many numbers will get palettes anew -> the UNet's weights as they were before they were stored in fewer bits.
Exact = Callable[[int], WeightSource]

LORAS = "loras"  # of a model folder: its own copies of LoRA files
_KEPT = 2  # variants


@dataclass(frozen=True, slots=True)
class _Home:
    """One weight.bin, the packages that share it, and the file with its weights as converted: itself, or one `kept`."""

    packages: tuple[str, ...]
    index: Index
    base: Path
    kept: bool


class _Shapes:
    """What `lora_patches` has to know of a part: the shapes of its weights, over all of its packages."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}


def change_loras(folder: Path, loras: Sequence[LoraFile], exact: WeightSource | None = None) -> Manifest:
    """Make `loras` the removable LoRAs of a model folder, in place of those it has.

    Args:
        folder: made by `glassine convert`.
        loras: in the order they are merged; empty restores the weights as converted, byte for byte.
        exact: where the UNet is stored in fewer bits, its weights as they were before that.

    Returns:
        The folder's new manifest.

    Raises:
        PackageError: the folder cannot be changed, or is being changed, or needs the `exact` weights.
        CheckpointError, ConversionError: a LoRA is none, or not for this model; nothing is changed.
    """
    with locked(folder) as store:
        manifest = _settled(folder, store)
        homes = _homes(folder)
        patches = _patches(homes, loras)
        fixed = tuple(lora for lora in manifest.loras if not lora.removable)
        changed = replace(manifest, loras=(*fixed, *described(loras, removable=True)))
        parts = {home.index.part for home in homes if _is_changed(home, patches) or home.kept}
        touched = [home for home in homes if home.index.part in parts]
        _check_exact(folder, homes, patches, exact)
        check_space(store, sum(home.index.size for home in touched if _is_changed(home, patches)))
        _refuse_compiled(folder, touched)
        with explained(folder):
            staged = store / "swap.partial"
            staged.mkdir()
            for home in touched:
                _stage(home, patches, staged, exact)
                _keep_base(home, store)
            changed.write(staged)
            staged.rename(store / "swap")  # from here on the change has happened
            finish_swap(folder)
            if not loras:
                shutil.rmtree(store / "base", ignore_errors=True)
    return changed


def add_loras(folder: Path, files: Sequence[LoraFile], exact: WeightSource | None = None) -> Manifest:
    """Add LoRAs to those in a model folder, or give those that are in it another strength; the folder keeps the files.

    Raises:
        As `change_loras`.
    """
    refuse_twins(files)
    _patches(_homes(folder), files)  # what is not for this model is refused under the name it came with
    kept = folder / LORAS
    fresh = [kept / file.path.name for file in files if not (kept / file.path.name).exists()]
    try:
        added = [replace(file, path=keep_file(folder, file.path)) for file in files]
        return change_loras(folder, [*applied(folder, but={file.path.stem for file in files}), *added], exact)
    except BaseException:  # Ctrl-C too, which may come after the change has been decided
        inside = {lora.name for lora in Manifest.read(folder).loras}
        for path in fresh:
            if path.stem not in inside:
                path.unlink(missing_ok=True)
        if kept.is_dir() and not any(kept.iterdir()):
            kept.rmdir()
        raise


def remove_loras(folder: Path, names: Collection[str], exact: WeightSource | None = None) -> Manifest:
    """Take the LoRAs of these names out of a model folder; their files stay in its `loras`.

    Raises:
        As `change_loras`.
    """
    return change_loras(folder, applied(folder, but=names), exact)


def variant(
    folder: Path,
    loras: Sequence[LoraFile],
    exact: Exact | None = None,
    written: Callable[[int, int], None] | None = None,
) -> Path:
    """Return a model folder with `loras` over what `folder` has, made now or before; `folder` itself stays as it is.

    Args:
        exact: asked for the UNet's weights where it is stored in fewer bits and there is no such variant yet.
        written: called with how many pieces of a weight file are written, and of how many.

    Raises:
        As `change_loras`.
    """
    with locked(folder) as store:
        manifest = _settled(folder, store)
        homes = _homes(folder)
        wanted = [*applied(folder), *loras]
        place = store / "variants" / _key(homes, manifest, loras)
        if not place.is_dir():
            patches = _patches(homes, wanted)
            changed = [home for home in homes if _is_changed(home, patches)]
            weights = exact(count) if exact is not None and (count := _repacked(homes, patches)) else None
            _check_exact(folder, homes, patches, weights)
            check_space(store, sum(home.index.size for home in changed))
            with explained(folder):
                partial = place.with_name(f"{place.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                _link_tree(folder, partial, [name for home in changed for name in home.packages])
                for home in changed:
                    targets = [partial / name / WEIGHT_FILE for name in home.packages]
                    _write_home(home, patches, targets, weights, written)
                replace(manifest, loras=(*manifest.loras, *described(loras, removable=False))).write(partial)
                partial.rename(place)
        os.utime(place)
        _forget_old(store / "variants")
    return place


def keep_file(folder: Path, file: Path) -> Path:
    """Copy a LoRA file into the folder's `loras`, from where later changes read it; return the copy.

    Raises:
        PackageError: another file of this name lies there.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected a LoRA")
    kept = folder / LORAS / file.name
    if kept.exists():
        if not kept.samefile(file) and file_sha256(kept) != file_sha256(file):
            raise PackageError(f"{kept}: another LoRA of this name is there; rename {file}, or remove the other first")
        return kept
    with explained(folder):
        kept.parent.mkdir(exist_ok=True)
        partial = kept.with_name(f".{kept.name}.partial")
        partial.unlink(missing_ok=True)
        clone_or_copy(file, partial)
        partial.rename(kept)
    return kept


def applied(folder: Path, but: Collection[str] = ()) -> list[LoraFile]:
    """The removable LoRAs in a folder, as the files they were merged from; without those whose names are in `but`.

    Raises:
        PackageError: a file is no longer in the folder's `loras`, or is another one now.
    """
    loras = [lora for lora in Manifest.read(folder).loras if lora.removable and lora.name not in but]
    return [LoraFile(_stored(folder, lora), lora.unet, lora.text) for lora in loras]


def described(loras: Sequence[LoraFile], *, removable: bool) -> tuple[MergedLora, ...]:
    """Describe LoRAs for glassine.json."""
    return tuple(
        MergedLora(
            name=file.path.stem, sha256=file_sha256(file.path), unet=file.unet, text=file.text, removable=removable
        )
        for file in loras
    )


def _stored(folder: Path, lora: MergedLora) -> Path:
    for path in sorted((folder / LORAS).glob("*")):
        if path.stem == lora.name and path.is_file() and file_sha256(path) == lora.sha256:
            return path
    raise PackageError(
        f"{folder / LORAS}: the file of the LoRA {lora.name!r} (sha256 {lora.sha256[:12]}...) is not there any more; "
        f"put it back, or take it out with 'glassine lora {folder} remove {lora.name}'"
    )


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Make the folder's store, hold its lock, and remove the store if it is empty at the end."""
    store = folder / STORE
    Manifest.read(folder)  # or this is no model folder, and nothing is made in it
    with explained(folder):
        store.mkdir(exist_ok=True)
        lock = os.open(store, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackageError(f"{folder}: another command is changing it; wait for it") from None
        (store / "variants").mkdir(exist_ok=True)
        yield store
    finally:
        for place in (store / "variants", store):
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        os.close(lock)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say of which folder an error of the disk is (PackageError)."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename is not None else ""
        raise PackageError(f"{folder}: cannot be changed: {error.strerror}{where}") from error


def _settled(folder: Path, store: Path) -> Manifest:
    """Read the manifest, and clear away what an interrupted change left behind before it was decided."""
    manifest = Manifest.read(folder)
    shutil.rmtree(store / "swap.partial", ignore_errors=True)
    if any(lora.removable for lora in manifest.loras):
        if not (store / "base").is_dir():
            raise PackageError(
                f"{folder}: has LoRAs in its weights, and the weights as converted are gone ({store / 'base'}); "
                "convert it again"
            )
    else:
        shutil.rmtree(store / "base", ignore_errors=True)
    return manifest


def _homes(folder: Path) -> list[_Home]:
    """The weight files of a folder; packages share one where it is one file, hard-linked."""
    indices = read_indices(folder)
    parts = Manifest.read(folder).parts.values()
    files = {file for part in parts if part_of(part.role) for file in part.about.get("chunks", [part.file])}
    if not indices or not files <= {index.package for index in indices}:
        raise PackageError(
            f"{folder}: says nothing of where its weights lie (no *.weights.json), so no LoRA can be merged into it; "
            "convert the checkpoint again, or with --lora"
        )
    by_file: dict[tuple[int, int], list[Index]] = {}
    for index in indices:
        blob = folder / index.package / WEIGHT_FILE
        try:
            status = blob.stat()
        except OSError as error:
            raise PackageError(f"{blob}: cannot be read ({error.strerror}); convert the model again") from None
        if status.st_size != index.size:
            raise PackageError(f"{blob}: {status.st_size} bytes, expected {index.size}; convert the model again")
        by_file.setdefault((status.st_dev, status.st_ino), []).append(index)
    homes = [_home(folder, group) for group in by_file.values()]
    kept = {home.index.part for home in homes if home.kept}
    late = [package for home in homes if home.index.part in kept and not home.kept for package in home.packages]
    if late:
        raise PackageError(
            f"{folder}: {', '.join(late)} came into the folder while LoRAs were in its weights; convert the model again"
        )
    return homes


def _home(folder: Path, group: list[Index]) -> _Home:
    packages = tuple(index.package for index in group)
    # A network that came later may have added its own.
    index = max(group, key=lambda index: len(index.places) + len(index.packed))
    index = replace(index, places=tuple(by_frame(index.places)))
    kept = folder / STORE / "base" / f"{packages[0]}.bin"
    if kept.is_file():
        return _Home(packages, index, kept, True)
    return _Home(packages, index, folder / packages[0] / WEIGHT_FILE, False)


def _patches(homes: Sequence[_Home], loras: Sequence[LoraFile]) -> dict[str, list[Lora]]:
    """The LoRAs as patches, by part."""
    parts: dict[str, _Shapes] = {}
    for home in homes:
        shapes = parts.setdefault(home.index.part, _Shapes()).shapes
        shapes.update(home.index.shapes)
    patches: dict[str, list[Lora]] = {part: [] for part in parts}
    for file in loras:
        for part, patch in lora_patches(file, parts).items():
            patches[part].append(patch)
    return patches


def _is_changed(home: _Home, patches: Mapping[str, Sequence[Lora]]) -> bool:
    names = home.index.shapes.keys()
    return any(not names.isdisjoint(patch.shapes) for patch in patches[home.index.part])


def _repacked(homes: Sequence[_Home], patches: Mapping[str, Sequence[Lora]]) -> int:
    """How many numbers get palettes anew."""
    changed = {part: {name for patch in above for name in patch.shapes} for part, above in patches.items()}
    packed = ((weight, changed[home.index.part]) for home in homes for weight in home.index.packed)
    return sum(math.prod(weight.shape) for weight, names in packed if weight.name in names)


def _check_exact(
    folder: Path, homes: Sequence[_Home], patches: Mapping[str, Sequence[Lora]], exact: WeightSource | None
) -> None:
    """Refuse to merge into weights that were stored in fewer bits, but for those whose exact ones are given.

    A LoRA moves a weight by less than the distance to the next number of its table, and would be rounded away: of one
    as large as 1 % of the weights, 6 bits keep 0.3 %.
    """
    for home in homes:
        names = {name for patch in patches[home.index.part] for name in patch.shapes}
        packed = [weight for weight in home.index.packed if weight.name in names]
        if any(weight.owner for weight in packed):
            raise PackageError(
                f"{folder}: has UNets with patches of their own in few bits ({packed[0].owner}); "
                "convert the checkpoint again with --lora and the palette"
            )
        if packed and exact is None:
            raise PackageError(
                f"{folder}: its UNet is stored in {packed[0].form} bits, and their steps are larger than what a LoRA "
                "changes, so merging needs the weights of the checkpoint that it was made of: "
                f"glassine lora {folder} add FILE --source CHECKPOINT"
            )
        wrong = [w.name for w in packed if exact is not None and exact.shapes.get(w.name) != w.shape]
        if wrong:
            raise PackageError(f"{folder}: {wrong[0]} has another shape in the source; give the one it was made of")


def _stage(home: _Home, patches: Mapping[str, Sequence[Lora]], staged: Path, exact: WeightSource | None) -> None:
    """Put the home's next weight.bin under the name of each of its packages."""
    targets = [staged / f"{package}.bin" for package in home.packages]
    if _is_changed(home, patches):
        _write_home(home, patches, targets, exact)
    else:
        for target in targets:
            link_or_copy(home.base, target)


def _write_home(
    home: _Home,
    patches: Mapping[str, Sequence[Lora]],
    targets: Sequence[Path],
    exact: WeightSource | None,
    written: Callable[[int, int], None] | None = None,
) -> None:
    write_changed(home.base, targets[0], home.index, patches[home.index.part], exact, written)
    for target in targets[1:]:
        link_or_copy(targets[0], target)


def _keep_base(home: _Home, store: Path) -> None:
    """Keep the weights as converted under the name of each package: links may be lost when a folder is copied."""
    (store / "base").mkdir(exist_ok=True)
    for package in home.packages:
        kept = store / "base" / f"{package}.bin"
        if not kept.exists():
            link_or_copy(home.base, kept)


def _refuse_compiled(folder: Path, homes: Sequence[_Home]) -> None:
    for home in homes:
        for package in home.packages:
            compiled = folder / f"{Path(package).stem}.mlmodelc"
            if compiled.exists():
                raise PackageError(f"{compiled}: was compiled from the weights as they are now; delete it first")


def _key(homes: Sequence[_Home], manifest: Manifest, loras: Sequence[LoraFile]) -> str:
    """A name for base weights, LoRAs and strengths, in this order."""
    states = [(home.packages, home.index.size, home.base.stat().st_mtime_ns) for home in homes]
    merged = [(lora.sha256, lora.unet, lora.text) for lora in (*manifest.loras, *described(loras, removable=False))]
    return hashlib.sha256(json.dumps([states, merged]).encode()).hexdigest()[:16]


def _link_tree(folder: Path, copy: Path, changed: Sequence[str]) -> None:
    """Link every file of the model into `copy`, but for the weights of the `changed` packages and the manifest."""
    compiled = {f"{Path(package).stem}.mlmodelc" for package in changed}
    for source in sorted(folder.rglob("*")):
        inside = source.relative_to(folder)
        if inside.parts[0] in {STORE, LORAS, FILE_NAME, *compiled}:
            continue
        if source.is_dir():
            (copy / inside).mkdir(parents=True)
        elif inside.parts[0] not in changed or inside.relative_to(inside.parts[0]) != Path(WEIGHT_FILE):
            link_or_copy(source, copy / inside)


def _forget_old(variants: Path) -> None:
    """Keep the variants that were used last; what a killed command left half-made goes too."""
    made = [path for path in variants.iterdir() if path.suffix != ".partial"]
    kept = sorted(made, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:_KEPT]
    for path in set(variants.iterdir()) - set(kept):
        shutil.rmtree(path, ignore_errors=True)
