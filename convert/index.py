"""X.weights.json beside X.mlpackage: which weight lies where in its weight.bin, so that it can be changed in place.

Only packages that LoRAs change have one: UNets and text encoders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from glassine.convert.palettize import Form, Item
from glassine.convert.program import Encoded, Plan, Weight, bits_of
from glassine.convert.weights import WeightSource
from glassine.errors import ConversionError, PackageError

FORMAT_VERSION = 1
SUFFIX = ".weights.json"
_DTYPES = ("float16", "float32")


@dataclass(frozen=True, slots=True)
class Place:
    """One record of weight.bin: `nbytes` at `offset`, the weight `name` times `scale`, in the source's `shape`.

    owner: the key of a network that lives beside the file's own and has this weight for itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    offset: int
    owner: str = ""

    @property
    def nbytes(self) -> int:
        """Size of the data, in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Packed:
    """The weight `name` times `scale` in fewer bits: where the data of each item of its form lies.

    shape: the source's. stored: the program's, of which `form.items` says what the records are.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    scale: float
    form: Form
    offsets: Mapping[Item, int]
    owner: str = ""

    def nbytes(self, item: Item) -> int:
        """Size of the data of an item, in bytes."""
        shape, dtype = self.form.items(self.stored)[item]
        return -(-math.prod(shape) * bits_of(dtype) // 8)

    @property
    def spans(self) -> dict[int, int]:
        """Offset -> bytes of every item."""
        return {at: self.nbytes(item) for item, at in self.offsets.items()}


@dataclass(frozen=True, slots=True)
class Index:
    """The weights of one package: `part` is "unet", "text_encoder" or "text_encoder_2", `size` that of weight.bin."""

    package: str
    part: str
    size: int
    places: tuple[Place, ...]
    packed: tuple[Packed, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight and its shape in the source."""
        plain = {place.name: place.shape for place in self.places}
        return plain | {weight.name: weight.shape for weight in self.packed}


def part_of(role: str) -> str | None:
    """The part whose weights, by their names, a role's network has; None where no LoRA changes it."""
    if role in {"text_encoder", "text_encoder_2"}:
        return role
    return "unet" if role == "unet" or role.endswith("_unet") else None


def write_index(folder: Path, package: str, role: str, plan: Plan, weights: WeightSource) -> None:
    """Write the index of `package` (its file name) into `folder`, if it is one that LoRAs change."""
    part = part_of(role)
    if part is None:
        return
    places = []
    for record, weight in plan.weights():
        owner, _, name = weight.name.rpartition(":")  # a guest's own weights are called "key:name"
        shape = weights.shapes[weight.name]
        places.append(Place(name, shape, record.dtype, weight.scale, record.data_offset, owner))
    save_index(folder, Index(package, part, plan.file_size, tuple(places), tuple(_packed(plan, weights))))


def _packed(plan: Plan, weights: WeightSource) -> Iterator[Packed]:
    """The weights in fewer bits, each with the records that it is stored in."""
    found: dict[tuple[Weight, tuple[int, ...], Form], dict[Item, int]] = {}
    for record in plan.records:
        if isinstance(record.content, Encoded):
            content = record.content
            found.setdefault((content.weight, content.shape, content.form), {})[content.item] = record.data_offset
    for (weight, stored, form), offsets in found.items():
        owner, _, name = weight.name.rpartition(":")
        yield Packed(name, weights.shapes[weight.name], stored, weight.scale, form, offsets, owner)


def by_frame(places: Iterable[Place]) -> Iterator[Place]:
    """The places, those that hold a matrix for each frame (LayerDiffuse's attention sharing) taken apart."""
    places = tuple(places)
    plain = {place.name: place.shape for place in places if not place.owner}
    for place in places:
        own = plain.get(place.name, place.shape)
        frames = place.shape[0] // own[0] if own and own[0] else 1
        if frames < 2 or place.shape != (frames * own[0], *own[1:]):
            yield place
            continue
        step = place.nbytes // frames
        yield from (replace(place, shape=own, offset=place.offset + frame * step) for frame in range(frames))


def save_index(folder: Path, index: Index) -> None:
    """Write an index into `folder`."""
    raw = {"format_version": FORMAT_VERSION, **asdict(index)}
    packed = [{**asdict(weight), "form": str(weight.form)} for weight in index.packed]
    raw = {**raw, "packed": packed} if packed else {name: value for name, value in raw.items() if name != "packed"}
    (folder / f"{Path(index.package).stem}{SUFFIX}").write_text(json.dumps(raw) + "\n", encoding="utf-8")


def read_indices(folder: Path) -> list[Index]:
    """Read every index of a model folder, by package name.

    Raises:
        PackageError: an index cannot be read, or does not fit its package.
    """
    return [_read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]


def _read(path: Path) -> Index:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format_version") != FORMAT_VERSION:
            raise ValueError("written by a newer Glassine")
        places = tuple(Place(**{**place, "shape": tuple(place["shape"])}) for place in raw.pop("places"))
        packed = tuple(_read_packed(**weight) for weight in raw.pop("packed", ()))
        index = Index(places=places, packed=packed, **raw)
        if Path(index.package).name != index.package or index.package != f"{path.name.removesuffix(SUFFIX)}.mlpackage":
            raise ValueError(f"it is of {index.package!r}")
        if part_of(index.part) != index.part or type(index.size) is not int:
            raise ValueError(f"part {index.part!r}, size {index.size!r}")
        for place in places:
            _check(place, index.size)
        for weight in packed:
            _check_packed(weight, index.size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConversionError) as error:
        raise PackageError(f"{path}: cannot be used ({error}); convert the model again") from None
    return index


def _read_packed(*, shape: list[int], stored: list[int], form: str, **rest: Any) -> Packed:
    return Packed(shape=tuple(shape), stored=tuple(stored), form=Form.read(form), **rest)


def _check(place: Place, size: int) -> None:
    good = (
        _is_weight(place)
        and place.dtype in _DTYPES
        and _are_sizes(place.shape)
        and type(place.offset) is int
        and 0 <= place.offset <= place.offset + place.nbytes <= size
    )
    if not good:
        raise ValueError(f"{place} is no record of a file of {size} bytes")


def _check_packed(weight: Packed, size: int) -> None:
    good = (
        _is_weight(weight)
        and _are_sizes(weight.shape)
        and _are_sizes(weight.stored)
        and math.prod(weight.shape) == math.prod(weight.stored)
        and weight.form.fits(weight.stored)
        and set(weight.offsets) == set(weight.form.items(weight.stored))
        and all(type(at) is int and 0 <= at <= at + nbytes <= size for at, nbytes in weight.spans.items())
    )
    if not good:
        raise ValueError(f"{weight} is no weight of a file of {size} bytes")


def _is_weight(stored: Place | Packed) -> bool:
    return (
        isinstance(stored.name, str)
        and isinstance(stored.owner, str)
        and isinstance(stored.scale, (int, float))
        and math.isfinite(stored.scale)
        and stored.scale != 0
    )


def _are_sizes(shape: tuple[int, ...]) -> bool:
    return all(type(length) is int and length >= 0 for length in shape)
