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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Checkpoint
from glassine.convert.clone import link_or_copy
from glassine.convert.digest import Files, digests
from glassine.convert.index import Index, Place, read_indices, save_index
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
from glassine.convert.program import ALIGNMENT, Plan, Requests, Weight
from glassine.convert.swap import explained, locked
from glassine.convert.transparency import controlled
from glassine.convert.weights import Span
from glassine.errors import ConversionError, PackageError
from glassine.manifest import WEIGHT_FILE, Manifest, Part, finish_swap
from glassine.models.config import SD2_BASE, SD15, SDXL, UNetConfig, restored

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Program

_FAMILIES = {family.name: family for family in (SD15, SD2_BASE, SDXL)}


def add_networks(
    folder: Path,
    further: Sequence[Further],
    report: Report,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Manifest:
    """Add networks to a model folder: all of them, or none.

    Args:
        folder: made by `convert_checkpoint`.
        further: each lists networks for the base it is given. One that lives beside another and is in the folder
            already (a UNet that takes what control networks give) is left as it is.
        report: called often, from this thread.
        overwrite: a network that is in the folder already is replaced.
        dry_run: check everything and write nothing.

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
        networks += steered
        homes = {"unet": PackagedWeights(folder, manifest, "unet"), **patched}
        hosts = {key: Host(weights, weights.plan, weights.cuts) for key, weights in homes.items()}
        with digests(hashed_files(networks), skip=dry_run) as digest:
            packages = plan_packages(networks, manifest.sizes, manifest.name, report, hosts)
            for package in packages:
                if package.chunk and package.home in homes and not package.network.changed:
                    homes[package.home].share(package)
            if dry_run:
                return _manifest(manifest, packages, {}, base)
            with explained(folder):
                staged = store / "swap.partial"
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir()
                check_space(staged, bytes_needed(packages))
                write_packages(staged, packages, report)
                _continue_indices(folder, staged, packages)
                changed = _manifest(manifest, packages, digest(), base)
                changed.write(staged)
                staged.rename(store / "swap")
                finish_swap(folder)
    return changed


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
        if part.palette is not None or unknown:
            raise PackageError(
                f"{self._folder / files[0]}: its weights cannot be read back (they are palettes, or have no index); "
                "convert the checkpoint again, with this file beside it"
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

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight and its shape."""
        return {name: place.shape for name, (_, place) in self._places.items()}

    def cuts(self, size: Size) -> list[int]:
        """Bytes of weights in front of each cut between the chunks of a size."""
        sizes = [sum(place.nbytes for place in self.index(file).places) for file in self.files(size)]
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
        held = {place.offset: (place.dtype, place.nbytes) for place in self.index(file).places}
        if any(at not in records or (records[at].dtype, records[at].nbytes) != what for at, what in held.items()):
            raise PackageError(f"{path}: does not hold what its index says; convert the model again")
        for name, (_, place) in self._places.items():
            weight = Weight(name, place.shape, place.scale, "float32" if place.dtype == "float32" else "float16")
            plan.know(weight, place.dtype, place.offset - ALIGNMENT)
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
        places = {place.offset: (place.name, place.scale) for place in self.index(file).places}
        weights = {record.data_offset: (weight.name, weight.scale) for record, weight in plan.weights()}
        records = [(record.offset, record.nbytes, record.dtype) for record in plan.records]
        if weights != places or records != [(r.offset, r.nbytes, r.dtype) for r in read_records(path)]:
            raise PackageError(
                f"{self._folder / file}: was cut elsewhere than {package.file} would be; convert the checkpoint again, "
                "with this file beside it"
            )
        plan.onto, plan.begin, plan.records = path, self.index(file).size, []

    def span(self, name: str) -> Span | None:
        """Where the bytes lie, where nothing was folded into them."""
        path, place = self._places[name]
        if place.scale != 1.0:
            return None
        return Span(path, place.offset, place.nbytes, place.dtype)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop), as precise as they were stored."""
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


def _new(folder: Path, manifest: Manifest, networks: Sequence[Network], overwrite: bool) -> list[Network]:
    """Those that are not in the folder yet; what is there already is refused, replaced, or shared."""
    new = {network.key for network in networks}
    shared = {n.key for n in networks if n.beside is not None and n.beside not in new and not n.changed}
    there = [network.key for network in networks if network.key in manifest.parts and network.key not in shared]
    if there and not overwrite:
        raise PackageError(f"{folder}: has a {there[0]} already; pass --overwrite to replace it")
    return [network for network in networks if network.key not in manifest.parts or network.key not in shared]


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
            new[package.key] = replace(new[package.key], source=source.source, source_sha256=source.source_sha256)
    replaced = {package.network.key for package in packages}
    kept = {key: part for key, part in manifest.parts.items() if _network_key(key) not in replaced}
    return replace(manifest, parts={**kept, **new})


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
        index = replace(new[package.file], places=(*old[siblings[0]].places, *new[package.file].places))
        save_index(staged, index)
        if onto in done or not package.lowered.plan.records:
            continue
        done.add(onto)
        for name in siblings:
            link_or_copy(staged / package.file / WEIGHT_FILE, staged / f"{name}.bin")
            save_index(staged, replace(index, package=name))
