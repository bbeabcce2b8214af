"""Control networks at work: what the UNet is about to read -> the residuals that are added inside it.

    NetworkCall -> every active net on the rows it steers -> sum of weighted residuals, by the UNet's input names

A net is called for the rows it steers and no others: not outside its interval, not where its weight is 0, and not for
the negative prompt where its mode spares that. A step without any active net has no residuals at all, so that the plain
UNet draws it. Sums are made on the host, in buffers that live as long as the run: 54 MB of residuals a step for Stable
Diffusion 1.x at 512 x 512 are read once and written once, in two threads, because memory is what they wait for.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, RequestError
from glassine.runtime.control import Control, Float, ReadyControl, at_size, mode_weights
from glassine.runtime.denoiser import Inputs, NetworkCall, Predict, Row

Shapes = Mapping[str, tuple[int, ...]]
# Inputs of a control network beside the UNet's own; a Union net has the sum of its hints, each made ready alone.
HINT, TYPE, FUSED, WEIGHT = "controlnet_cond", "control_type", "fused_hint", "control_weight"
# What a preprocessor makes, in the words of Union nets.
_TYPES = {
    "canny": "hard_edge", "lineart": "hard_edge", "mlsd": "hard_edge", "scribble": "soft_edge", "softedge": "soft_edge",
    "tile": "tile", "blur": "tile", "pose": "openpose",
}  # fmt: skip
_RESIDUALS = ("additional_residual_", "adapter_residual_")
_LUMINANCE = np.array((0.299, 0.587, 0.114), np.float32)
_THREADS = 2  # more wait for the same memory
_BLOCK = 1 << 18  # numbers summed at a time, so that they are still in the cache when the next net's are added


class Hinter(NamedTuple):
    """What makes one hint of a Union net ready: (hint, kind, weight) -> the part of the net's `fused_hint`."""

    inputs: Shapes
    predict: Predict


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network that steers: a package of the model's folder, or one beside it.

    inputs, outputs: shapes by name; batch and sizes are static. about: what its part in glassine.json says, see
    docs/control.md. predict: runs it; it is loaded at the first call. hinter: of a Union net.
    """

    name: str
    inputs: Shapes
    outputs: Shapes
    predict: Predict
    about: Mapping[str, Any] = field(default_factory=dict)
    hinter: Hinter | None = None

    @property
    def kind(self) -> str:
        """ "controlnet", "union" or "t2i_adapter"."""
        return str(self.about.get("kind", "controlnet"))

    @property
    def rows(self) -> int:
        """Rows of one call."""
        return self.inputs["sample" if "sample" in self.inputs else HINT][0]

    @property
    def hint_shape(self) -> tuple[int, ...]:
        """(B, C, H, W) of the hint that it, or what makes its hints ready, reads."""
        return self.inputs[HINT] if self.hinter is None else self.hinter.inputs[HINT]


class ControlNets:
    """The networks that steer one picture, as the denoiser's `control`.

    Args:
        nets: each control with its network.
        unet: the inputs of the controlled UNet, with their shapes.
        first, steps: index of the first step the run makes, and how many it makes; intervals are shares of these.

    Raises:
        RequestError: a net that does not fit the UNet, or a hint that does not fit the net.
        EngineError: at a call: a net returned NaN or infinity; the message names the net and the residual.
    """

    def __init__(self, nets: Sequence[tuple[ReadyControl, Net]], unet: Shapes, *, first: int = 0, steps: int) -> None:
        self._steered = [_Steered(group, net) for group, net in _passes(nets)]
        for steered in self._steered:
            check_fits(steered.net, unet)
        self._sum = _Sum(residual_inputs(unet))
        self._first, self._steps = first, steps

    def __call__(self, call: NetworkCall) -> Inputs:
        """Return the residuals of a call by the UNet's input names; none where no net is active at this step.

        The arrays are written again at the next call.
        """
        active = self._active(call)
        if not active:
            return {}
        if self._is_whole(call, active):
            return self._sum.whole(call, active[0].term(call, tuple(range(len(call.rows)))))
        self._sum.begin(call)
        for steered in active:
            for rows in steered.batches(call):
                self._sum.before(steered.net)  # its buffers are about to be used again
                self._sum.add(steered.term(call, rows))
        return self._sum.end()

    def _active(self, call: NetworkCall) -> list[_Steered]:
        return [steered for steered in self._steered if steered.control.acts(call.i - self._first, self._steps)]

    def _is_whole(self, call: NetworkCall, active: list[_Steered]) -> bool:
        """Whether the outputs of one net are the sums, and need no copy: it steers every row, and nothing is scaled."""
        if len(active) != 1 or not active[0].plain or active[0].net.rows != len(call.inputs["sample"]):
            return False
        return list(active[0].batches(call)) == [tuple(range(len(call.rows)))]


class _Term(NamedTuple):
    """Part of a sum: the residuals of one call of a net, and what of them goes where.

    scales: by name, a number or (h * w,). rows: (row of the UNet's call, row in `residuals`, weight).
    """

    net: Net
    residuals: Inputs
    scales: Mapping[str, Any]
    rows: tuple[tuple[int, int, float], ...]


def _passes(nets: Sequence[tuple[ReadyControl, Net]]) -> list[tuple[list[ReadyControl], Net]]:
    """The controls that one call of a net takes: hints of a Union net that count in the same way, or each its own."""
    passes: dict[object, tuple[list[ReadyControl], Net]] = {}
    for index, (ready, net) in enumerate(nets):
        if ready.idle:
            continue
        said = ready.control
        alone = net.hinter is None or ready.map is not None or len(said.weights) > 1
        how = (said.net, said.mode, said.start, said.stop, said.interval)
        passes.setdefault(index if alone else how, ([], net))[0].append(ready)
    return list(passes.values())


class _Steered:
    """One net in one picture: what it is given, and what its residuals count.

    group: one control; or several of a Union net, which takes them all at once. Then the weights are those of the
    hints, and the residuals count as they are, as in the published pipeline.
    """

    def __init__(self, group: Sequence[ReadyControl], net: Net) -> None:
        ready = group[0]
        self.control, self.net, self._group = ready.control, net, group
        self._cond_only = self.control.mode in ("control", "guess") or bool(net.about.get("global_pooling"))
        self._hints = [_hint_of(one, net) for one in group]
        self._types = [_type_of(one.control, net) for one in group] if TYPE in net.inputs else []
        if not self._types and self.control.control_type is not None:
            raise RequestError(f'control net "{net.name}" is for one kind of hint; leave type= out, Union nets have it')
        self._once = None if "sample" in net.inputs else lambda: net.predict(**self._given)
        self._features: Inputs | None = None
        weights = mode_weights(self.control.mode, net.kind, len(net.outputs))
        own = (1.0,) if len(group) > 1 else self.control.weights
        self.plain = {*weights, *own} == {1.0} and ready.map is None
        self._scales: dict[str, Any] = {name: weights[_number(name)] for name in net.outputs}
        if ready.map is not None:
            for name, (_, _, *size) in net.outputs.items():
                self._scales[name] *= at_size(ready.map, *size).reshape(-1)

    @cached_property
    def _given(self) -> Inputs:
        """What the net is given besides the UNet's inputs: the same at every step."""
        rows, hinter = self.net.rows, self.net.hinter
        kinds = {TYPE: np.tile(np.max(self._types, axis=0), (rows, 1))} if self._types else {}
        if hinter is None:
            return {HINT: np.repeat(self._hints[0], rows, axis=0), **kinds}
        fused: Float | None = None
        for one, hint, kind in zip(self._group, self._hints, self._types, strict=True):
            weight = np.array([one.control.weights[0] if len(self._group) > 1 else 1.0], np.float32)
            made = hinter.predict(**{HINT: hint, TYPE: kind[None], WEIGHT: weight})[FUSED].astype(np.float32)
            fused = made if fused is None else fused + made
        assert fused is not None
        return {FUSED: np.repeat(fused, rows, axis=0), **kinds}

    def batches(self, call: NetworkCall) -> Iterator[tuple[int, ...]]:
        """The rows of a call that the net steers, as many at a time as it takes."""
        rows = [index for index, row in enumerate(call.rows) if self._weight(row)]
        size = len(call.rows) if self._once is not None else self.net.rows
        return (tuple(rows[at : at + size]) for at in range(0, len(rows), size))

    def term(self, call: NetworkCall, rows: tuple[int, ...]) -> _Term:
        """Call the net for these rows of the UNet's call."""
        weights = [self._weight(call.rows[row]) for row in rows]
        if self._once is not None:  # does not look at the latents: the same features at every step, in every row
            if self._features is None:
                self._features = {name: array.copy() for name, array in self._once().items()}
            sources = [0] * len(rows)
            residuals = self._features
        else:
            sources = list(range(len(rows)))
            residuals = self.net.predict(**self._given, **self._shared(call, rows))
        return _Term(self.net, residuals, self._scales, tuple(zip(rows, sources, weights, strict=True)))

    def _weight(self, row: Row) -> float:
        if self._cond_only and row.branch != "cond":
            return 0.0
        return 1.0 if len(self._group) > 1 else self.control.weight_of(row.picture)

    def _shared(self, call: NetworkCall, rows: tuple[int, ...]) -> Inputs:
        """What the net reads of the UNet's inputs, row by row; the last row fills it up."""
        padded = [*rows, *rows[-1:] * (self.net.rows - len(rows))]
        names = [name for name in self.net.inputs if name not in self._given]
        arrays = {name: call.inputs[name] for name in names}
        if padded != list(range(len(call.inputs["sample"]))):
            arrays = {name: array[padded] for name, array in arrays.items()}
        # An inpainting UNet reads more channels than the latents; a control net reads the latents alone.
        return arrays | {"sample": arrays["sample"][:, : self.net.inputs["sample"][1]]}


class _Sum:
    """Sums of weighted residuals in buffers that are used again and again; what nothing is added to is 0."""

    def __init__(self, takes: Shapes) -> None:
        self._takes = takes
        self._buffers: dict[str, Float] = {}
        self._zeros: dict[str, Float] = {}
        self._pending: list[_Term] = []
        # By input: the rows written in this call, and those that are not 0 in the buffer.
        self._written: dict[str, set[int]] = {name: set() for name in takes}
        self._dirty: dict[str, set[int]] = {name: set() for name in takes}
        self._threads = ThreadPoolExecutor(_THREADS)
        self._local = threading.local()

    def whole(self, call: NetworkCall, term: _Term) -> Inputs:
        """Return the residuals of a term as they are, with zeros for the inputs that it does not feed."""
        self._call = call
        finite = self._threads.map(_is_finite, term.residuals.values())
        self._refuse([term], [name for name, good in zip(term.residuals, finite, strict=True) if not good])
        for name in self._takes.keys() - term.residuals.keys() - self._zeros.keys():
            self._zeros[name] = np.zeros(self._takes[name], np.float32)
        return {**self._zeros, **term.residuals}

    def begin(self, call: NetworkCall) -> None:
        """Start the sums of a call."""
        self._call = call
        for name, shape in self._takes.items():
            if name not in self._buffers:
                self._buffers[name] = np.zeros((len(call.inputs["sample"]), *shape[1:]), np.float32)
            self._written[name].clear()

    def add(self, term: _Term) -> None:
        """Note a term; it is read when its net is called again, or at the end."""
        self._pending.append(term)

    def before(self, net: Net) -> None:
        """Write down what is still in a net's own buffers: its next call may use them again."""
        if any(term.net is net for term in self._pending):
            self._write()

    def end(self) -> Inputs:
        """Return the sums, by input."""
        self._write()
        for name, buffer in self._buffers.items():
            for row in self._dirty[name] - self._written[name]:
                buffer[row] = 0
            self._dirty[name] = set(self._written[name])
        return self._buffers

    def _write(self) -> None:
        terms, self._pending = self._pending, []
        finite = self._threads.map(partial(self._write_one, terms), self._takes)
        self._refuse(terms, [name for name, good in zip(self._takes, finite, strict=True) if not good])

    def _refuse(self, terms: list[_Term], bad: list[str]) -> None:
        """Name the net that returned what is not finite, if there is any."""
        for term, name in ((term, name) for term in terms for name in bad if name in term.residuals):
            used = term.residuals[name][[source for _, source, _ in term.rows]]
            count = int((~np.isfinite(used)).sum())
            if count:
                raise EngineError(
                    f'step {self._call.i + 1} (sigma {self._call.sigma:.4g}): control net "{term.net.name}" returned '
                    f"{count} of {used.size} numbers of {name} as NaN or infinity, most likely a half-precision "
                    "overflow; run it on other compute units or in fp32, or convert it again"
                )

    def _write_one(self, terms: list[_Term], name: str) -> bool:
        """Add one residual of every term to its buffer, and say whether it is finite; a name has one thread alone."""
        written, finite = self._written[name], True
        for row, sums in enumerate(self._buffers[name]):
            parts = [
                (term.residuals[name][source], np.multiply(term.scales[name], weight, dtype=np.float32))
                for term in terms
                if name in term.residuals
                for target, source, weight in term.rows
                if target == row
            ]
            if parts:
                finite &= self._accumulate(sums, parts, fresh=row not in written)
                written.add(row)
        return finite

    def _accumulate(self, sums: Float, parts: list[tuple[NDArray[Any], Any]], *, fresh: bool) -> bool:
        """Sums (C, h, w) = or += every array (C, h, w) times its scale, block by block; say whether they are finite."""
        channels, cells = len(sums), sums[0].size
        flat = sums.reshape(channels, cells)
        sources = [(array.reshape(channels, cells), scale) for array, scale in parts]
        step = max(1, _BLOCK // cells)
        scratch, finite = self._scratch(step * cells), True
        with np.errstate(invalid="ignore", over="ignore"):  # it is looked for here, and reported by its net's name
            for at in range(0, channels, step):
                block = flat[at : at + step]
                product = scratch[: block.size].reshape(block.shape)
                for number, (array, scale) in enumerate(sources):
                    if fresh and number == 0:
                        np.multiply(array[at : at + step], scale, out=block)
                    else:
                        block += np.multiply(array[at : at + step], scale, out=product)
                finite &= _is_finite(block)
        return finite

    def _scratch(self, size: int) -> Float:
        """Return this thread's own array of products."""
        scratch: Float | None = getattr(self._local, "scratch", None)
        if scratch is None or scratch.size < size:
            self._local.scratch = scratch = np.empty(size, np.float32)
        return scratch


def _is_finite(array: NDArray[Any]) -> bool:
    """Whether all numbers are finite, at the speed of the memory: their sum is, if they all are."""
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(array.sum()))


def _number(name: str) -> int:
    """The index at the end of a residual's name."""
    return int(name.rpartition("_")[2])


def residual_inputs(inputs: Shapes) -> Shapes:
    """Return the inputs of a controlled UNet that residuals go to."""
    return {name: shape for name, shape in inputs.items() if name.startswith(_RESIDUALS)}


def check_fits(net: Net, unet: Shapes) -> None:
    """Raise RequestError if a net was made for another UNet than the one with these inputs."""
    takes = residual_inputs(unet)
    strange = [name for name in net.outputs if name not in takes]
    if strange:
        raise RequestError(
            f'control net "{net.name}" returns {len(net.outputs)} residuals, this model\'s UNet takes '
            f"{len(takes)} (it has no input {strange[0]}); the net was made for another family than the model"
        )
    for name in sorted(net.inputs.keys() - {HINT, TYPE, FUSED, "sample", "timestep"}):
        if net.inputs[name][1:] != unet.get(name, ())[1:]:
            raise RequestError(
                f'control net "{net.name}" reads {name} of shape {net.inputs[name][1:]}, this model has '
                f"{unet[name][1:] if name in unet else 'none'}; the net was made for another family or size"
            )
    for name, shape in net.outputs.items():
        if shape[1:] != takes[name][1:]:
            raise RequestError(
                f'control net "{net.name}" returns {name} of shape {shape[1:]}, this model\'s UNet takes '
                f"{takes[name][1:]}; the net was made for another family, or converted for another size"
            )


def _hint_of(ready: ReadyControl, net: Net) -> Float:
    """The hint as the net wants it: its channels, (1, C, H, W)."""
    _, channels, *size = net.hint_shape
    hint, said = ready.hint, ready.control
    if net.about.get("preprocessor") == "inpaint" and said.preprocess is None and said.mask is None:
        raise RequestError(
            f'control net "{net.name}" wants to know what to draw anew; give it a mask, or say preprocess=inpaint to '
            "take the run's (preprocess=none for the hint as it is)"
        )
    if list(hint.shape[2:]) != size:
        raise RequestError(
            f'control net "{net.name}" wants a hint of {size[1]}x{size[0]} pixels, this one has '
            f"{hint.shape[3]}x{hint.shape[2]}; convert the net for the model's size"
        )
    if channels == 1:
        hint = np.tensordot(_LUMINANCE, hint[0], axes=1)[None, None]
    return np.ascontiguousarray(hint, dtype=np.float32)


def _type_of(control: Control, net: Net) -> Float:
    """One-hot (T,) of what kind of hint a Union net is given."""
    names = list(net.about.get("control_types", ()))
    said = control.control_type
    if said is None and control.preprocess is not None:
        name = re.split("[=,]", control.preprocess)[0]
        said = _TYPES.get(name, name)
    if said not in names:
        raise RequestError(
            f'control net "{net.name}" is one for several kinds of hint; say which with type=, one of '
            f"{', '.join(names)}" + ("" if said is None else f" (got {said})")
        )
    one_hot: Float = np.zeros(net.inputs[TYPE][1], np.float32)
    one_hot[names.index(said)] = 1
    return one_hot
