"""Other forms of a folder's UNets, for `glassine tune`: the same weights, another attention or another number of rows.

forms -> packages in a place of their own, to be timed | the one that won -> a part of the folder, "tuned_unet"

All of them live in the UNet's own weight.bin, hard-linked; what really differs (`sdpa` scales by itself, so that its
queries are stored unscaled) has records of its own behind it, which go with the form. As a part of the folder, with an
index like all UNets, the form gets every LoRA that the UNet gets, and loses it with it.

Every UNet has forms: those that take control, collages or both, and those that LayerDiffuse has patched.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from glassine.convert.addition import add_networks
from glassine.convert.clone import clone_or_copy, link_or_copy, write_all
from glassine.convert.control import steered_unet
from glassine.convert.index import SUFFIX, read_indices, save_index
from glassine.convert.network import Base, Form, Network, Size
from glassine.convert.package import check_space, read_records
from glassine.convert.packages import Report
from glassine.convert.swap import explained, locked
from glassine.convert.transparency import write_unet
from glassine.errors import PackageError
from glassine.manifest import TUNED, WEIGHT_FILE, Manifest, Part, finish_swap
from glassine.models.config import UNetConfig, restored

_PROGRAM = "Data/com.apple.CoreML/model.mlmodel"
_STORED = re.compile(rb"@model_path/weights/weight\.bin\x10([\x80-\xff]*[\x00-\x7f])")  # a BlobFileValue and its offset


def rows_of(part: Part) -> int:
    """How many branches of guidance a UNet's call takes; frames that are drawn together are one."""
    return part.inputs["sample"][0][0] // max(1, int(part.config.get("frames", 0)))


def form_of(part: Part, tokens: int) -> Form:
    """The form that a UNet of a folder is written in."""
    assert part.attention is not None
    assert part.layout is not None
    return Form(rows=rows_of(part), tokens=tokens, attention=part.attention, layout=part.layout)  # type: ignore[arg-type]


def is_patched(manifest: Manifest, role: str) -> bool:
    """Whether a UNet has weights of its own: LayerDiffuse's, or those with inputs for control."""
    return "frames" in manifest.parts[_patched(role)].about


def _patched(role: str) -> str:
    return role.removeprefix("controlled_")


def name_of(form: Form) -> str:
    """The form in words."""
    return f"{form.attention}, batch {form.rows}"


def write_forms(
    folder: Path, size: Size, role: str, forms: Sequence[Form], place: Path, report: Report
) -> dict[Form, Part]:
    """Write a UNet of a folder in other forms into `place`, on the same disk; the folder stays as it is.

    Args:
        role: of the UNet. place: a folder without such packages.

    Raises:
        PackageError, ConversionError: the folder is of others, has LoRAs in its weights, or cannot be read back.
    """
    manifest = Manifest.read(folder)
    keys = {form: f"{TUNED}{role}:{form.attention}_{form.rows}" for form in forms}

    def listed(base: Base) -> list[Network]:
        return [
            _network(manifest, base, role, form, size, key, f"{_stem(role)}_{form.attention}_{form.rows}")
            for form, key in keys.items()
        ]

    written = add_networks(folder, [listed], report, place=place)
    return {form: written.parts[key + _suffix(written, size)] for form, key in keys.items()}


def keep_form(folder: Path, size: Size, role: str, form: Form, report: Report) -> Part:
    """Make a UNet in this form a part of the folder, in the place of another form of it.

    Raises:
        As `write_forms`.
    """
    drop_forms(folder, size, (role,))
    manifest = Manifest.read(folder)

    def listed(base: Base) -> list[Network]:
        return [_network(manifest, base, role, form, size, TUNED + role, f"Tuned{_stem(role)}")]

    changed = add_networks(folder, [listed], report)
    return changed.parts[TUNED + role + _suffix(changed, size)]


def drop_forms(folder: Path, size: Size, roles: Collection[str] | None = None) -> None:
    """Remove the forms of UNets that were kept in a folder: its files are, byte for byte, what they were before.

    What lies behind the weights stays while LoRAs are in them, or another network's records lie behind it.

    Args:
        roles: of the UNets; None: of all.

    Raises:
        PackageError: the folder cannot be changed.
    """
    manifest = Manifest.read(folder)
    suffix = _suffix(manifest, size)
    keys = [key for key, part in manifest.parts.items()
            if part.role.startswith(TUNED) and key == part.role + suffix
            and (roles is None or part.role.removeprefix(TUNED) in roles)]  # fmt: skip
    if not keys:
        return
    with locked(folder) as store, explained(folder):
        manifest = Manifest.read(folder)
        gone = {file for key in keys for file in manifest.parts[key].about.get("chunks", [manifest.parts[key].file])}
        staged = store / "swap.partial"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            for file in sorted(gone):
                (staged / f"{file}.gone").touch()
                (staged / f"{Path(file).stem}{SUFFIX}.gone").touch()
            if not (store / "base").is_dir():
                _cut_back(folder, gone, staged)
            replace(manifest, parts={key: part for key, part in manifest.parts.items() if key not in keys}).write(
                staged
            )
        except BaseException:  # Ctrl-C too
            shutil.rmtree(staged, ignore_errors=True)
            raise
        staged.rename(store / "swap")
        finish_swap(folder)


def _cut_back(folder: Path, gone: Collection[str], staged: Path) -> None:
    """Stage the weight files that packages share with those that are going, without what these alone have read."""
    indices = {index.package: index for index in read_indices(folder)}
    left = sorted(path for path in folder.glob("*.mlpackage") if path.name not in gone)
    for file in sorted(gone):
        blob = folder / file / WEIGHT_FILE
        sharing = [path.name for path in left if (path / WEIGHT_FILE).exists() and blob.samefile(path / WEIGHT_FILE)]
        if not sharing or (staged / f"{sharing[0]}.bin").exists():
            continue
        last = max(offset for name in sharing for offset in _offsets(folder / name))
        records = [record for record in read_records(blob) if record.offset <= last]
        size = records[-1].data_offset + records[-1].nbytes
        if size == blob.stat().st_size:
            continue
        check_space(staged, size)
        first = staged / f"{sharing[0]}.bin"
        clone_or_copy(blob, first)
        with first.open("r+b", buffering=0) as out:
            os.ftruncate(out.fileno(), size)
            write_all(out.fileno(), struct.pack("<I", len(records)), 0)
        for name in sharing[1:]:
            link_or_copy(first, staged / f"{name}.bin")
        for index in (indices[name] for name in sharing if name in indices):
            places = tuple(place for place in index.places if place.offset < size)
            packed = tuple(weight for weight in index.packed if min(weight.spans) < size)
            save_index(staged, replace(index, size=size, places=places, packed=packed))


def _offsets(package: Path) -> Iterator[int]:
    """Where the records begin that a package's program reads: protobuf's varints behind the name of the file."""
    for found in _STORED.finditer((package / _PROGRAM).read_bytes()):
        yield sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(found[1]))


def _network(manifest: Manifest, base: Base, role: str, form: Form, size: Size, key: str, package: str) -> Network:
    """A UNet of the folder in another form, on the weights of the one that it lives beside."""
    part = manifest.parts[role]
    if "chunks" in part.about and form.attention != part.attention:
        raise PackageError(
            f"{part.file}: the chunks of this {role} hold their weights in the order in which its {part.attention} "
            f"attention reads them; for {form.attention}, convert the checkpoint with --attention {form.attention}"
        )
    config = restored(UNetConfig, part.config)
    network = steered_unet(base, key, package)
    return replace(
        network,
        role=TUNED + role,
        write=partial(write_unet, config, form),
        config=config,
        summary=f"Stable Diffusion's UNet, {name_of(form)}.",
        beside=_patched(role) if is_patched(manifest, role) else "unet",
        sizes=(size,),
        attention=form.attention,
        layout=form.layout,
    )


def _stem(role: str) -> str:
    return "".join(word.capitalize() for word in role.split("_"))


def _suffix(manifest: Manifest, size: Size) -> str:
    return "" if size == (manifest.width, manifest.height) else f"_{size[0]}x{size[1]}"
