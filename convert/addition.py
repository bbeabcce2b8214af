"""A model folder + further files -> the same folder with their networks in it: no checkpoint is needed.

What the networks have to fit is read back: the descriptions and options from glassine.json, the UNet's weights out of
its own weight.bin, by its index. A network that lives beside the UNet continues that file: the old packages are linked
to the longer one, in which their records are where they were.

All is staged in the folder's store and swapped in at once, the manifest last (`convert/swap.py`).
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Checkpoint
from glassine.convert.clone import link_or_copy
from glassine.convert.collage import steered_collages
from glassine.convert.digest import Files, digests
from glassine.convert.index import SUFFIX, Index, Packed, Place, read_indices, save_index
from glassine.convert.network import Base, ConvertOptions, Further, Network, Size
from glassine.convert.package import check_space, read_records
from glassine.convert.packages import (
    Host,
    Planned,
    Report,
    bytes_needed,
    hashed_files,
    parts,
    plan_packages,
    write_packages,
)
from glassine.convert.palettize import Palette
from glassine.convert.program import ALIGNMENT, Encoded, Plan, Requests, Weight
from glassine.convert.swap import explained, locked
from glassine.convert.transparency import controlled
from glassine.convert.weights import Span
from glassine.errors import ConversionError, PackageError
from glassine.manifest import WEIGHT_FILE, Manifest, Part, finish_swap
from glassine.models.config import SD2_BASE, SD15, SDXL, UNetConfig, restored
from glassine.models.mil import Program

_IMPLIED = ("controlled_unet", "adapted_unet")  # what comes with other networks, and may be there already
_FAMILIES = {family.name: family for family in (SD15, SD2_BASE, SDXL)}


def add_networks(
    folder: Path,
    further: Sequence[Further],
    report: Report,
    *,
    palette: Palette | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    place: Path | None = None,
) -> Manifest:
    """Add networks to a model folder: all of them, or none.

    Args:
        folder: made by `convert_checkpoint`.
        further: each lists networks for the base it is given. One that lives beside another and is in the folder
            already (a UNet that takes what control networks give) is left as it is.
        report: called often, from this thread.
        palette: how control networks store their weights; UNets have the form of the folder's own.
        overwrite: a network that is in the folder already is replaced.
        dry_run: check everything and write nothing.
        place: write their packages there, on the folder's disk; the folder stays as it is.

    Returns:
        The folder's new manifest.

    Raises:
        PackageError: the folder cannot be changed, or has such a network.
        CheckpointError, ConversionError: a file is none of those, is damaged, or does not fit the model.
    """
    with locked(folder) as store:
        manifest = Manifest.read(folder)
        removable = [lora.name for lora in manifest.loras if lora.removable]
        if removable:
            raise PackageError(
                f"{folder}: has LoRAs in its weights ({', '.join(removable)}), which new parts would keep for ever; "
                f"take them out first: glassine lora {folder} remove {removable[0]}"
            )
        base = base_of(folder, manifest)
        networks = _new(folder, manifest, [network for listed in further for network in listed(base)], overwrite)
        steered, patched = _controlled(folder, manifest, networks, base)
        networks += [*steered, *steered_collages(_unets(manifest, networks), base)]
        beside = dict.fromkeys(n.beside for n in networks if n.beside in manifest.parts and n.beside not in patched)
        homes = {"unet": PackagedWeights(folder, manifest, "unet"), **patched}
        homes |= {key: PackagedWeights(folder, manifest, key) for key in beside if key is not None}
        hosts = {key: Host(weights, weights.plan, weights.cuts, weights.newest) for key, weights in homes.items()}
        networks = [_packed_as(network, homes["unet"].palette, palette) for network in networks]
        with digests(hashed_files(networks), skip=dry_run) as digest:
            packages = plan_packages(networks, manifest.sizes, manifest.name, report, hosts)
            for package in packages:
                if package.chunk and package.home in homes and not package.network.changed:
                    homes[package.home].share(package)
            if dry_run:
                return _manifest(manifest, packages, {}, base)
            if place is not None:
                check_space(place, bytes_needed(packages))
                write_packages(place, packages, report)
                return _manifest(manifest, packages, {}, base)
            with explained(folder):
                staged = store / "swap.partial"
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir()
                check_space(staged, bytes_needed(packages))
                try:
                    write_packages(staged, packages, report)
                    _continue_indices(folder, staged, packages)
                    changed = _manifest(manifest, packages, digest(), base)
                    changed.write(staged)
                except BaseException:  # Ctrl-C too
                    shutil.rmtree(staged, ignore_errors=True)
                    raise
                staged.rename(store / "swap")
                finish_swap(folder)
    return changed


def _packed_as(network: Network, unet: Palette | None, asked: Palette | None) -> Network:
    """The network with the form its weights get: in the UNet's file the UNet's, else the one that was asked for."""
    return network.with_palette(asked if network.beside is None else unet)


def base_of(folder: Path, manifest: Manifest) -> Base:
    """What the folder's own UNet is, for others to fit.

    Raises:
        PackageError: it has none, or of a family for which there is nothing more.
    """
    unet = manifest.parts.get("unet")
    if unet is None:
        raise PackageError(f"{folder}: has no UNet, which further networks would have to fit")
    if manifest.family not in _FAMILIES:
        raise PackageError(f"{folder}: is of the family {manifest.family}, for which there are no further networks")
    options = ConvertOptions(
        sizes=manifest.sizes,
        batch=manifest.batch,
        tokens=manifest.tokens,
        attention=unet.attention if unet.attention is not None else "split",  # type: ignore[arg-type]
        layout=unet.layout if unet.layout is not None else "channels_first",  # type: ignore[arg-type]
        chunks=len(unet.about.get("chunks", [unet.file])),
        name=manifest.name,
    )
    return Base(
        family=replace(
            _FAMILIES[manifest.family],
            unet=restored(UNetConfig, unet.config),
            latent_scale=manifest.latent_scale,
            prediction=manifest.prediction_type,
        ),
        unet=PackagedWeights(folder, manifest, "unet"),
        source=Checkpoint(path=folder / unet.file, tensors={}),
        files=(),
        options=options,
    )


class PackagedWeights:
    """A UNet's weights as they lie in a folder's weight.bin, without the factors that were folded into them.

    role: which of the folder's UNets; one that lives beside another has that one's weights but for its own.
    """

    def __init__(self, folder: Path, manifest: Manifest, role: str) -> None:
        self._folder, self._manifest, self._role = folder, manifest, role

    @cached_property
    def _indices(self) -> Mapping[str, Index]:
        return {index.package: index for index in read_indices(self._folder)}

    def files(self, size: Size) -> list[str]:
        """The package of a size, or the chunks it is cut into."""
        part = self._manifest.part(self._role, size)
        assert part is not None  # sizes are those of UNets
        files: list[str] = part.about.get("chunks", [part.file])
        unknown = [file for file in files if file not in self._indices]
        if unknown:
            raise PackageError(
                f"{self._folder / unknown[0]}: where its weights lie is not known (no {Path(unknown[0]).stem}{SUFFIX} "
                "beside it); convert the checkpoint again, with this file"
            )
        return files

    def index(self, file: str) -> Index:
        """The index of a package."""
        return self._indices[file]

    @cached_property
    def _places(self) -> Mapping[str, tuple[Path, Place]]:
        return {
            place.name: (self._folder / file / WEIGHT_FILE, place)
            for owner in ("", self._role)
            for file in self.files(self._manifest.sizes[0])
            for place in self.index(file).places
            if place.owner == owner
        }

    @cached_property
    def _packed(self) -> Mapping[str, Packed]:
        return {
            weight.name: weight
            for owner in ("", self._role)
            for file in self.files(self._manifest.sizes[0])
            for weight in self.index(file).packed
            if weight.owner == owner
        }

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight and its shape."""
        plain = {name: place.shape for name, (_, place) in self._places.items()}
        return plain | {name: weight.shape for name, weight in self._packed.items()}

    @property
    def palette(self) -> Palette | None:
        """How its weights are stored in fewer bits, by their names."""
        return Palette(None, {name: weight.form for name, weight in self._packed.items()}) if self._packed else None

    @cached_property
    def newest(self) -> bool:
        """Whether it is in the opset of macOS 15, as its records of 4 and 6 bits say."""
        files = self.files(self._manifest.sizes[0]) if self._packed else []
        records = (record for file in files for record in read_records(self._folder / file / WEIGHT_FILE))
        return any(record.dtype in ("uint4", "uint6") for record in records)

    def cuts(self, size: Size) -> list[int]:
        """Bytes of weights in front of each cut between the chunks of a size."""
        sizes = [sum(nbytes for _, nbytes in _spans(self.index(file))) for file in self.files(size)]
        return list(itertools.accumulate(sizes))[:-1]

    def plan(self, size: Size) -> Plan:
        """A plan that continues the weight.bin of a size; an empty one where there are several, see `share`."""
        if len(self.files(size)) > 1:
            return Plan()
        (file,) = self.files(size)
        path = self._folder / file / WEIGHT_FILE
        others = (self._folder / name / WEIGHT_FILE for other in self._manifest.sizes for name in self.files(other))
        known = next(other for other in others if other.samefile(path))
        plan = Plan(onto=known, begin=self.index(file).size)
        records = {record.data_offset: record for record in read_records(path)}
        held = dict(_spans(self.index(file)))
        dtypes = {place.offset: place.dtype for place in self.index(file).places}
        if any(at not in records or records[at].nbytes != nbytes for at, nbytes in held.items()) or any(
            records[at].dtype != dtype for at, dtype in dtypes.items()
        ):
            raise PackageError(f"{path}: does not hold what its index says; convert the model again")
        own = {place.name for place in self.index(file).places if place.owner == self._role}
        for place in self.index(file).places:  # a weight may be there with several factors, for several forms
            if place.owner == self._role or (not place.owner and place.name not in own):
                dtype: Literal["float16", "float32"] = "float32" if place.dtype == "float32" else "float16"
                plan.know(Weight(place.name, place.shape, place.scale, dtype), place.dtype, place.offset - ALIGNMENT)
        for name, packed in self._packed.items():
            weight = Weight(name, packed.stored, packed.scale, "float16")
            for item, at in packed.offsets.items():
                content = Encoded(weight, packed.stored, packed.form, item)
                plan.know(content, records[at].dtype, records[at].offset)
        with path.open("rb") as opened:
            for at, record in records.items():
                if at not in held:  # a literal of the graphs
                    opened.seek(at)
                    plan.know(opened.read(record.nbytes), record.dtype, record.offset)
        return plan

    def share(self, package: Planned) -> None:
        """Let a chunk of a network with this one's weights have the file of this one's chunk, which holds the same.

        Raises:
            PackageError: it does not hold the same.
        """
        file = self.files(package.size)[package.chunk - 1]
        path, plan = self._folder / file / WEIGHT_FILE, package.lowered.plan
        index = self.index(file)
        places = {stored.offset: (stored.name, stored.scale) for stored in index.places}
        places |= {at: (weight.name, weight.scale) for weight in index.packed for at in weight.spans}
        asked = [
            (r.data_offset, r.content.weight if isinstance(r.content, Encoded) else r.content) for r in plan.records
        ]
        weights = {at: (content.name, content.scale) for at, content in asked if isinstance(content, Weight)}
        records = [(record.offset, record.nbytes, record.dtype) for record in plan.records]
        if weights != places or records != [(r.offset, r.nbytes, r.dtype) for r in read_records(path)]:
            raise PackageError(
                f"{self._folder / file}: was cut elsewhere than {package.file} would be; convert the checkpoint again, "
                "with this file beside it"
            )
        plan.onto, plan.begin, plan.records = path, index.size, []

    def span(self, name: str) -> Span | None:
        """Where the bytes lie, where nothing was folded into them."""
        if name in self._packed or self._places[name][1].scale != 1.0:
            return None
        path, place = self._places[name]
        return Span(path, place.offset, place.nbytes, place.dtype)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop), as precise as they were stored.

        Raises:
            PackageError: they were stored in fewer bits.
        """
        if name in self._packed:
            raise PackageError(
                f"{self._folder}: {name} is stored in {self._packed[name].form} bits, and what this file adds to it is "
                "smaller than what that has lost; convert the checkpoint again, with this file and the palette"
            )
        path, place = self._places[name]
        size = np.dtype(place.dtype).itemsize
        stored = np.fromfile(path, dtype=place.dtype, count=stop - start, offset=place.offset + start * size)
        if stored.size != stop - start:
            raise ConversionError(f"{path}: ends before the weight {name}; convert the model again")
        return stored if place.scale == 1.0 else stored.astype(np.float32) / np.float32(place.scale)

    def key(self, name: str) -> str:
        """Its name."""
        return name

    def origin(self, name: str) -> str:
        """Package and name, for messages."""
        return f"{self._folder / self._manifest.parts[self._role].file}: weight {name}"


def _spans(index: Index) -> Iterator[tuple[int, int]]:
    """Offset and bytes of every record that is a weight, or an item of one."""
    yield from ((place.offset, place.nbytes) for place in index.places)
    for weight in index.packed:
        yield from weight.spans.items()


def _unets(manifest: Manifest, networks: Sequence[Network]) -> dict[str, UNetConfig]:
    """The UNets that the folder will have, by their keys."""
    old = {k: restored(UNetConfig, part.config) for k, part in manifest.parts.items() if part.role.endswith("unet")}
    return old | {network.key: network.config for network in networks if network.role.endswith("unet")}


def _new(folder: Path, manifest: Manifest, networks: Sequence[Network], overwrite: bool) -> list[Network]:
    """Those that are not in the folder yet; what is there already is refused, replaced, or shared."""
    new = {network.key for network in networks}
    shared = {n.key for n in networks if n.key in _IMPLIED and n.beside not in new}
    there = [network.key for network in networks if _is_there(network, manifest) and network.key not in shared]
    if there and not overwrite:
        raise PackageError(f"{folder}: has a {there[0]} already; pass --overwrite to replace it")
    return [network for network in networks if network.key not in manifest.parts or network.key not in shared]


def _is_there(network: Network, manifest: Manifest) -> bool:
    """Whether the folder has the network, at a size that it is for."""
    return (
        network.key in manifest.parts
        if network.sizes is None
        else any(
            network.key + ("" if size == manifest.sizes[0] else f"_{size[0]}x{size[1]}") in manifest.parts
            for size in network.sizes
        )
    )


def _controlled(
    folder: Path, manifest: Manifest, networks: Sequence[Network], base: Base
) -> tuple[list[Network], dict[str, PackagedWeights]]:
    """The patched UNets, new and old, with inputs for control, if there is control; and the weights of the old ones."""
    if "control" not in {*(part.role for part in manifest.parts.values()), *(n.role for n in networks)}:
        return [], {}
    new = [network for network in networks if "frames" in network.about]
    written = {*(network.key for network in networks), *manifest.parts}
    old = {
        key: PackagedWeights(folder, manifest, key)
        for key, part in manifest.parts.items()
        if key == part.role and "frames" in part.about and not part.config["residuals"]
        if f"controlled_{key}" not in written and key not in {network.key for network in new}
    }
    return [controlled(n, base) for n in (*new, *(_written(manifest.parts[key], old[key], base) for key in old))], old


def _written(part: Part, weights: PackagedWeights, base: Base) -> Network:
    """A UNet of the folder as the network that it was written of."""
    return Network(
        key=part.role,
        role=part.role,
        package=re.sub(r"(Chunk\d+)?\.mlpackage$", "", part.file),
        weights=weights,
        source=base.source,
        files=base.files,
        write=_not_again,
        config=restored(UNetConfig, part.config),
        summary="Stable Diffusion's UNet, patched by LayerDiffuse.",
        about=part.about,
        chunks=base.options.chunks,
        attention=base.options.attention,
        layout=base.options.layout,
    )


def _not_again(weights: Requests, size: Size) -> Program:
    raise AssertionError("this network is in the folder; only others are written beside it")


def _manifest(manifest: Manifest, packages: Sequence[Planned], digests: Mapping[Files, str], base: Base) -> Manifest:
    """The old manifest with the new parts; UNets are made of what the folder's own was made of."""
    new = parts(packages, digests)
    source = manifest.parts["unet"]
    for package in packages:
        if package.network.source is base.source:
            new[package.key] = _as_its_unet(new[package.key], source)
    replaced = {package.network.key for package in packages if package.network.sizes is None}
    kept = {key: part for key, part in manifest.parts.items() if key not in new and _network_key(key) not in replaced}
    return replace(manifest, parts={**kept, **new})


def _as_its_unet(part: Part, unet: Part) -> Part:
    """A part with the weights of the folder's UNet: made of what that was made of, and with what that has lost."""
    lost = {"palette": unet.about["palette"]} if "palette" in unet.about else {}
    about = {**part.about, **lost}
    return replace(part, source=unet.source, source_sha256=unet.source_sha256, palette=unet.palette, about=about)


def _network_key(key: str) -> str:
    """The key of a part's network, without its size."""
    return re.sub(r"_\d+x\d+$", "", key)


def _continue_indices(folder: Path, staged: Path, packages: Sequence[Planned]) -> None:
    """Where a weight.bin was continued, link its old packages to the new file, and write what lies where in all."""
    old = {index.package: index for index in read_indices(folder)}
    new = {index.package: index for index in read_indices(staged)}
    done = set()
    for package in packages:
        onto = package.lowered.plan.onto
        if onto is None or package.file not in new:
            continue
        siblings = [name for name in old if (folder / name / WEIGHT_FILE).samefile(onto)]
        before, added = old[siblings[0]], new[package.file]
        index = replace(added, places=(*before.places, *added.places), packed=(*before.packed, *added.packed))
        save_index(staged, index)
        if onto in done or not package.lowered.plan.records:
            continue
        done.add(onto)
        for name in siblings:
            link_or_copy(staged / package.file / WEIGHT_FILE, staged / f"{name}.bin")
            save_index(staged, replace(index, package=name))
