"""Which packages steer a picture: controls and a model's folder -> networks, and the UNet that takes what they return.

A folder has its nets as parts `control:NAME` (ControlNets) and `adapter:NAME` (T2I-Adapters). Their residuals go to a
second program on the UNet's own weights, `controlled_unet`, or `adapted_unet` where there are adapters too; steps
that nothing steers are drawn by the plain `unet`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassine.errors import PackageError, RequestError
from glassine.manifest import FILE_NAME, Manifest
from glassine.runtime.control import ReadyControl
from glassine.runtime.control_nets import ControlNets, Hinter, Net, residual_inputs
from glassine.runtime.denoiser import Predict
from glassine.runtime.engine.contract import COMPILED

if TYPE_CHECKING:
    from glassine.runtime.pipeline import Pipeline

PREFIXES = ("control:", "adapter:")  # of the parts that are nets, before their names
_SIZE = re.compile(r"_\d+x\d+$")  # behind the name, of a part for a further size
PACKAGE = ".mlpackage"  # a net whose name ends so, or as what Core ML has compiled, is a path


class Steered(NamedTuple):
    """A UNet, the rows of its calls, and what steers it."""

    predict: Predict
    rows: int
    control: ControlNets | None


def steered(pipe: Pipeline, controls: Sequence[ReadyControl], *, first: int, steps: int, role: str = "unet") -> Steered:
    """Return a model's UNet, and what steers it.

    Args:
        pipe: the model. controls: with their pictures. role: the part that draws without control.
        first, steps: index of the first step the run makes, and how many it makes.

    Raises:
        RequestError: no such net, or one that does not fit the model.
        PackageError: the model's UNet takes no control.
    """
    active = [ready for ready in controls if not ready.idle]
    if not active:
        return Steered(partial(_predict, pipe, role), pipe.rows(role), None)
    nets = {ready.control.net: _net(pipe, ready.control.net) for ready in active}
    adapted = any(net.kind == "t2i_adapter" for net in nets.values())
    controlled = f"{'adapted' if adapted else 'controlled'}_{role}"
    if pipe.manifest.part(controlled, pipe.size) is None:
        raise PackageError(
            f"{pipe.folder}: its {role} takes no control (there is no {controlled}); "
            f"convert the net into it: glassine convert NET.safetensors --base {pipe.folder}"
        )
    reads = _shapes(pipe.inputs(controlled))  # of what plays the part on this machine: it may have other rows
    control = ControlNets([(ready, nets[ready.control.net]) for ready in active], reads, first=first, steps=steps)
    takes = residual_inputs(reads)
    own = pipe.rows(role)

    def predict(**arrays: NDArray[np.generic]) -> Mapping[str, NDArray[np.generic]]:
        if takes.keys() <= arrays.keys():
            return _predict(pipe, controlled, **arrays)
        return in_calls(partial(_predict, pipe, role), own, arrays)

    return Steered(predict, pipe.rows(controlled), control)


def in_calls(
    predict: Predict, rows: int, arrays: Mapping[str, NDArray[np.generic]]
) -> Mapping[str, NDArray[np.generic]]:
    """Run a network of `rows` rows a call on arrays of any number of rows; the last call is filled up with its last."""
    count = len(next(iter(arrays.values())))
    if count == rows:
        return predict(**arrays)
    made: dict[str, list[NDArray[np.generic]]] = {}
    for at in range(0, count, rows):
        index = np.minimum(np.arange(at, at + rows), count - 1)
        answer = predict(**{name: array[index] for name, array in arrays.items()})
        for name, array in answer.items():
            made.setdefault(name, []).append(array[: count - at].copy())  # the buffer of the next call
    return {name: np.concatenate(pieces) for name, pieces in made.items()}


def _predict(pipe: Pipeline, role: str, **arrays: NDArray[np.generic]) -> Mapping[str, NDArray[np.generic]]:
    """Run a part, which is loaded at its first call."""
    return pipe.engine(role).predict(**arrays)


def _net(pipe: Pipeline, name: str) -> Net:
    """The net of the model's that has this name, or the package at this path."""
    for role in (prefix + name for prefix in PREFIXES):
        part = pipe.manifest.part(role, pipe.size)
        if part is not None:
            return Net(
                name=name,
                inputs=_shapes(part.inputs),
                outputs=_shapes(part.outputs),
                predict=partial(_predict, pipe, role),
                about=part.about,
                hinter=_hinter(pipe, name),
            )
    path = pipe.nets.get(name, Path(name))
    if path.suffix in (PACKAGE, COMPILED):
        engine = pipe.package(path)
        return Net(
            name=path.stem if name not in pipe.nets else name,
            inputs={spec.name: spec.shape for spec in engine.inputs.values()},
            outputs={spec.name: spec.shape for spec in engine.outputs.values()},
            predict=lambda **arrays: pipe.package(path).predict(**arrays),  # it may have been closed since
            about=_about(path),
            hinter=_hinter_beside(pipe, path) if "fused_hint" in engine.inputs else None,
        )
    parts = pipe.manifest.parts
    has = sorted({*pipe.nets, *(_SIZE.sub("", role.partition(":")[2]) for role in parts if role.startswith(PREFIXES))})
    raise RequestError(
        f'{pipe.folder}: this model has no control net "{name}", '
        + (f"only {', '.join(has)}; " if has else "and none at all; ")
        + f"convert it first: glassine convert NET.safetensors --base {pipe.folder} --name {name}"
    )


def _hinter(pipe: Pipeline, name: str) -> Hinter | None:
    """What makes the hints of a Union net ready; None for other nets."""
    role = f"hint:{name}"
    part = pipe.manifest.part(role, pipe.size)
    return None if part is None else Hinter(_shapes(part.inputs), partial(_predict, pipe, role))


def _hinter_beside(pipe: Pipeline, path: Path) -> Hinter:
    """The same for a package that is no part of the model."""
    beside = path.with_name(path.name.replace("ControlNet_", "ControlHint_"))
    shapes = {spec.name: spec.shape for spec in pipe.package(beside).inputs.values()}
    return Hinter(shapes, lambda **arrays: pipe.package(beside).predict(**arrays))


def _about(package: Path) -> Mapping[str, object]:
    """What the folder that a package lies in says about it; nothing if it is not a converted folder."""
    if not (package.parent / FILE_NAME).is_file():
        return {}
    parts = Manifest.read(package.parent).parts.values()
    return next((part.about for part in parts if part.file == package.name), {})


def _shapes(specs: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _) in specs.items()}
