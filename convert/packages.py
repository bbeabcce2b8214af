"""Networks -> packages: write every graph, hold it against the weights, copy them, say what each package is.

Packages whose plans are equal (one network at several sizes) or common (networks that live beside each other) share one
weight.bin, hard-linked.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glassine import __version__
from glassine.convert.checkpoint import shorten
from glassine.convert.chunks import cut, cuts_of
from glassine.convert.digest import Files
from glassine.convert.functions import join
from glassine.convert.index import write_index
from glassine.convert.network import Network, Size
from glassine.convert.package import write_files
from glassine.convert.palettize import Loss
from glassine.convert.program import Description, Lowered, Plan, Requests, described, lower
from glassine.convert.weights import Span, WeightSource
from glassine.errors import ConversionError
from glassine.manifest import Part
from glassine.models.layers import newest_opset

_FEATURES = {
    "input_ids": "The token ids of the prompt, padded to this length.",
    "last_hidden_state": "One vector a token.",
    "hidden_embeds": "One vector a token, after the last layer but one, not normalised.",
    "pooled_outputs": "One vector for the whole prompt.",
    "hidden_states": "One vector a token after every layer, for a choice of clip skip.",
    "sample": "The noisy latents; the first half of the batch without, the second with guidance.",
    "timestep": "The time of the diffusion, 0 (clean) to 999 (noise).",
    "encoder_hidden_states": "The encoded prompt, (batch, width, 1, tokens).",
    "time_ids": "Heights and widths: original, crop and target; the refiner: original, crop and an aesthetic score.",
    "text_embeds": "The pooled output of the second text encoder.",
    "timestep_cond": "The guidance scale, as an embedding.",
    "collage_table": "How strongly each token is drawn to the places of each mask; zeros change nothing.",
    **{f"collage_masks_{level}": "Where the layers of a collage lie, at one level's size." for level in range(4)},
    "noise_pred": "What the model predicts of the noise.",
    "z": "A clean latent, divided by the latent scale.",
    "image": "The picture, RGB, -1 to 1.",
    "x": "The picture, RGB, -1 to 1.",
    "latent": "Mean and logarithm of the variance of the latent, not multiplied by the latent scale.",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: `done` of `total` steps (stage "graphs") or bytes (stage "weights") of `package`."""

    stage: Literal["graphs", "weights"]
    package: str
    done: int
    total: int


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One package to be written; `weights` serve its whole plan, which it may share.

    home: the key of the network in whose weight.bin it lives.
    """

    network: Network
    home: str
    size: Size
    suffix: str  # of a size that is not the folder's own, "_768x512"
    lowered: Lowered
    weights: WeightSource
    whole: Lowered | None = None  # of which it is the chunk of this number, counted from 1, or one function
    chunk: int = 0
    function: str = ""  # in a package that all sizes share

    @property
    def name(self) -> str:
        """The package's stem."""
        stem = self.network.package + (f"Chunk{self.chunk}" if self.chunk else "")
        return stem if self.function else stem + self.suffix

    @property
    def file(self) -> str:
        """The package's file name."""
        return f"{self.name}.mlpackage"

    @property
    def key(self) -> str:
        """Its key in the manifest."""
        return self.network.key + self.suffix


@dataclass(frozen=True, slots=True)
class Host:
    """A network whose packages exist already.

    plan: the one that continues its weight.bin of a size; of a network in chunks an empty one. cuts: as `cuts_of` them.
    newest: they are in the opset of macOS 15, whose records of 4 and 6 bits are of other types.
    """

    weights: WeightSource
    plan: Callable[[Size], Plan]
    cuts: Callable[[Size], Sequence[int]]
    newest: bool = False


def plan_packages(
    networks: Sequence[Network],
    sizes: Sequence[Size],
    name: str,
    report: Report,
    hosts: Mapping[str, Host] = MappingProxyType({}),
) -> list[Planned]:
    """Write every graph and hold it against the weights; nothing is on disk yet.

    Args:
        networks: a network that lives beside another one comes after it, or that one is among the `hosts`.
        sizes: of the folder, its own first.
        name: of the model.
        report: called before each graph.

    Raises:
        ConversionError: weights are missing, left over, or of another shape.
    """
    jobs = [(network, size) for network in networks for size in (sizes if network.sizes is None else network.sizes)]
    plans: dict[tuple[str, Size], Plan] = {}
    cuts: dict[tuple[str, Size], Sequence[int]] = {}  # of the network at home there
    homes = _homes(networks, hosts)
    # Those who share a weight.bin are in one opset, or their records would not be the same.
    newest = {_place(network, networks)[0] for network in networks if network.functions or _is_grouped(network)}
    newest |= {key for key, host in hosts.items() if host.newest}
    asked: dict[int, set[str]] = {}
    packages = []
    for i, (network, size) in enumerate(jobs):
        suffix = "" if size == sizes[0] else f"_{size[0]}x{size[1]}"
        report(Progress("graphs", network.package + suffix, i, len(jobs)))
        home, renamed = _place(network, networks)
        requests = Requests(network.weights.shapes, renamed)
        if (home, size) not in plans:
            plans[home, size] = hosts[home].plan(size) if home in hosts else Plan()
            if home in hosts:
                cuts[home, size] = hosts[home].cuts(size)
        between = cuts.get((home, size), ()) if network.beside is not None else ()
        words = _description(network, name)
        lowered, *pieces = (
            replace(one, model=described(one.model, words), source=None)
            for one in _lowered(network, size, requests, plans[home, size], between, home in newest)
        )
        cuts.setdefault((home, size), cuts_of(pieces))
        asked.setdefault(id(network.weights), set()).update(requests.asked)
        package = Planned(network=network, home=home, size=size, suffix=suffix, lowered=lowered, weights=homes[home])
        if len(pieces) == 1:
            packages.append(package)
        else:
            packages += [replace(package, lowered=p, whole=lowered, chunk=n) for n, p in enumerate(pieces, start=1)]
    for network in networks:
        _check_all_used(network, asked[id(network.weights)])
        if network.functions:
            packages = _joined(packages, network)
    report(Progress("graphs", "", len(jobs), len(jobs)))
    return packages


def _lowered(
    network: Network, size: Size, requests: Requests, plan: Plan, between: Sequence[int], newest: bool
) -> list[Lowered]:
    """Write a network's program: whole, and the packages it is cut into (itself, where it is not).

    Raises:
        ConversionError: `requests` has not what the network asks for.
    """
    with _collector_off(), newest_opset(newest):
        program = network.write(requests, size)
        requests.check(str(network.source.path))
        whole = lower(program, Description(features=_FEATURES), plan, network.palette)
        return [whole, *cut(whole, network.chunks, between)]


def _is_grouped(network: Network) -> bool:
    return network.palette is not None and network.palette.grouped


def _joined(packages: list[Planned], network: Network) -> list[Planned]:
    """The packages, those of one network at several sizes being functions of one package (or of each of its chunks)."""
    own = [package for package in packages if package.network is network]
    for chunk in {package.chunk for package in own}:
        names = {f"size_{p.size[0]}x{p.size[1]}": p for p in own if p.chunk == chunk}
        if len(names) < 2:
            continue
        together = join({name: package.lowered for name, package in names.items()})
        whole = {id(p): p.lowered if p.whole is None else p.whole for p in names.values()}
        as_functions = {
            id(p): replace(p, lowered=together, whole=whole[id(p)], function=name) for name, p in names.items()
        }
        packages = [as_functions.get(id(package), package) for package in packages]
    return packages


@contextmanager
def _collector_off() -> Iterator[None]:
    """Spare the garbage collector a graph of 200,000 objects that all stay: a fifth of the time to write it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Home:
    """The weights of one weight.bin: a network's own, and "key:name" for what those that live beside it changed."""

    def __init__(self, own: WeightSource, guests: Mapping[str, WeightSource]) -> None:
        self._sources = {"": own, **guests}
        self.shapes = {
            **own.shapes,
            **{f"{key}:{name}": shape for key, guest in guests.items() for name, shape in guest.shapes.items()},
        }

    def _find(self, name: str) -> tuple[WeightSource, str]:
        key, _, rest = name.rpartition(":")
        return self._sources[key], rest

    def span(self, name: str) -> Span | None:
        source, rest = self._find(name)
        return source.span(rest)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        source, rest = self._find(name)
        return source.read(rest, start, stop)

    def key(self, name: str) -> str:
        source, rest = self._find(name)
        return source.key(rest)

    def origin(self, name: str) -> str:
        source, rest = self._find(name)
        return source.origin(rest)


def _place(network: Network, networks: Sequence[Network]) -> tuple[str, dict[str, str]]:
    """The network at home where this one lives, and what each weight is called there that is not the home's own.

    A network that lives beside a guest shares what that guest changed.
    """
    renamed = {name: f"{network.key}:{name}" for name in network.changed}
    if network.beside is None:
        return network.key, {}
    host = next((other for other in networks if other.key == network.beside), None)
    home, known = (network.beside, {}) if host is None else _place(host, networks)
    return home, {**known, **renamed}


def _homes(networks: Sequence[Network], hosts: Mapping[str, Host]) -> dict[str, WeightSource]:
    guests: dict[str, dict[str, WeightSource]] = {}
    for network in networks:
        guests.setdefault(_place(network, networks)[0], {})[network.key] = network.weights
    own = {key: host.weights for key, host in hosts.items() if key in guests}
    own |= {network.key: network.weights for network in networks if network.beside is None}
    return {key: _Home(weights, guests[key]) for key, weights in own.items()}


def _check_all_used(network: Network, asked: set[str]) -> None:
    names = network.weights.shapes
    unused = [network.weights.key(name) for name in names if name not in asked and not name.startswith(network.leaves)]
    if unused:
        raise ConversionError(
            f"{network.source.path}: {len(unused)} keys of the {network.key} are of no use to it: {shorten(unused)}; "
            "this is a variant that Glassine does not know"
        )


def _description(network: Network, name: str) -> Description:
    said = network.source.metadata
    return Description(
        author=said.get("modelspec.author", ""),
        licence=said.get("modelspec.license", ""),
        version=name,
        summary=network.summary,
        user_defined={
            "com.github.apple.coremltools.version": version("coremltools"),
            "com.github.apple.coremltools.source": "milinternal",
            "glassine.version": __version__,
            "glassine.role": network.role,
        },
    )


def bytes_needed(packages: Sequence[Planned]) -> int:
    """What the packages take on a disk with hard links."""
    return sum(
        len(package.lowered.model) + (package.lowered.plan.file_size if _is_written(packages, package) else 0)
        for package in packages
    )


def _is_written(packages: Sequence[Planned], package: Planned) -> bool:
    """Whether its weight.bin is a new file, not a link to one that is there or that comes before it."""
    plan = package.lowered.plan
    if _is_function_of_an_earlier(packages, package):
        return False
    return _twin(packages, package) is None and (plan.onto is None or bool(plan.records))


def _is_function_of_an_earlier(packages: Sequence[Planned], package: Planned) -> bool:
    """Whether the package's file is that of another size, which comes before it."""
    return next(other for other in packages if other.file == package.file) is not package


def _twin(packages: Sequence[Planned], package: Planned) -> Planned | None:
    """An earlier package whose weight.bin is the same, byte for byte."""
    for other in packages:
        if other is package:
            return None
        if (other.home, other.chunk) == (package.home, package.chunk) and other.lowered.plan == package.lowered.plan:
            return other
    return None


def write_packages(folder: Path, packages: Sequence[Planned], report: Report) -> None:
    """Write the packages into `folder`.

    Raises:
        ConversionError: a weight is not finite, or too large for fp16.
        OSError: the disk.
    """
    for package in packages:
        if _is_function_of_an_earlier(packages, package):
            continue
        total = package.lowered.plan.file_size
        done = 0

        def copied(count: int, name: str = package.name, total: int = total) -> None:
            nonlocal done
            done += count
            report(Progress("weights", name, done, total))

        place = folder / package.file
        place.mkdir()
        twin = _twin(packages, package)
        same_as = None if twin is None else folder / twin.file
        write_files(place, package.lowered, package.weights, copied, same_as=same_as)
        if twin is not None:
            package.lowered.plan.losses.update(twin.lowered.plan.losses)
        write_index(folder, package.file, package.network.role, package.lowered.plan, package.weights)


def hashed_files(networks: Sequence[Network]) -> list[Files]:
    """The groups of files whose sha256 the manifest will hold."""
    return [files for network in networks for files in (network.files, *network.hashed.values())]


def parts(packages: Sequence[Planned], digests: Mapping[Files, str]) -> dict[str, Part]:
    """Describe the packages for glassine.json; `digests` is empty where nothing was hashed."""
    by_key: dict[str, list[Planned]] = {}
    for package in packages:
        by_key.setdefault(package.key, []).append(package)
    return {key: _part(group, digests) for key, group in by_key.items()}


def _part(group: Sequence[Planned], digests: Mapping[Files, str]) -> Part:
    """Describe one package, or the chunks of one network, which run in this order."""
    package = group[0]
    network = package.network
    whole = package.lowered if package.whole is None else package.whole
    return Part(
        file=package.file,
        role=network.role,
        inputs=whole.inputs,
        outputs=whole.outputs,
        parameters=whole.parameters,
        precision=network.precision,
        source=network.source.path.name,
        source_sha256=digests.get(network.files, ""),
        attention=network.attention,
        layout=network.layout,
        palette=None if network.palette is None else str(network.palette),
        config=dataclasses.asdict(network.config),
        about={
            **network.about,
            **{key: digests.get(files, "") for key, files in network.hashed.items()},
            **({"chunks": [chunk.file for chunk in group]} if package.chunk else {}),
            **({"function": package.function} if package.function else {}),
            **_lost({name: loss for piece in group for name, loss in piece.lowered.plan.losses.items()}),
        },
    )


def _lost(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """What storing weights in fewer bits has lost, for glassine.json: signal to noise in dB, over all and the worst."""
    if not losses:
        return {}
    forms = Counter(str(loss.form) for loss in losses.values())
    worst = min(losses, key=lambda name: losses[name].snr)
    power, error = (math.fsum(getattr(loss, what) for loss in losses.values()) for what in ("power", "error"))
    return {
        "palette": {
            "weights": dict(sorted(forms.items())),
            "snr_db": round(10 * math.log10(power / error), 2) if error else None,
            "worst": {"name": worst, "snr_db": round(losses[worst].snr, 2) if error else None},
        }
    }
