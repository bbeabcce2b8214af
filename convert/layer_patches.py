"""LayerDiffuse's UNet files as patches over a UNet's weights: differences for SDXL, attention sharing for SD 1.5.

Both are complete or refused: a patch of which a part is not merged draws pictures without usable transparency.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Checkpoint, Tensor, shorten
from glassine.convert.names import RESNET_LDM, UNET_LDM, Layout, Numbering, Source
from glassine.errors import ConversionError
from glassine.models.config import UNetConfig

Float = NDArray[np.float32]
Shape = tuple[int, ...]

_LDM = Layout("unet", "LDM", "diffusion_model.", "", UNET_LDM, RESNET_LDM)
_SLOT = re.compile(r"(?P<weight>.+)::(?P<kind>\w+)::(?P<slot>\d)$")


# Layers that a patch changes all of, or none; the first line that matches a weight's name tells which they are.
_LAYERS = (
    (re.compile(r".*\.attn\d\.to_[qkv]\.weight$"), "attention projections"),
    (re.compile(r".*\.attn\d\.to_out\.0\.weight$"), "attention outputs"),
    (re.compile(r".*\.attn\d\.to_out\.0\.bias$"), "biases of attention outputs"),
    (re.compile(r".*\.transformer_blocks\.\d+\.norm\d\."), "layer norms"),
    (re.compile(r".*\.attentions\."), "transformers"),
    (re.compile(r"(time|add)_embedding\."), "embeddings"),
    (re.compile(r""), "convolutions"),
)


def check_complete(path: Path, changed: Iterable[str], base: Iterable[str]) -> None:
    """Refuse a patch that changes some layers of a kind and not all: a part of it is missing.

    Raises:
        ConversionError: it names what is missing.
    """
    kinds = {name: next(kind for pattern, kind in _LAYERS if pattern.match(name)) for name in base}
    changed = set(changed)
    touched = {kinds[name] for name in changed if name in kinds}
    missing = sorted(name for name, kind in kinds.items() if kind in touched and name not in changed)
    if missing:
        raise ConversionError(
            f"{path}: changes {len(changed)} weights of the UNet and not {shorten(missing)}, which are of the same "
            f"kinds ({', '.join(sorted({kinds[name] for name in missing}))}); the file is incomplete, or for another "
            "family of models"
        )


class Differences:
    """The patch of an SDXL file: W + strength * difference, or W + strength * (up @ down).

    Keys are `diffusion_model.<LDM name>::diff::0` or `::lora::0` (up) and `::lora::1` (down), or diffusers' names of
    whole differences. A difference of conv_in may have more input channels than the weight: those begin at 0.
    """

    def __init__(
        self, checkpoint: Checkpoint, base: Mapping[str, Shape], numbering: Numbering, strength: float
    ) -> None:
        """Hold the file's tensors against the weights of the UNet.

        Raises:
            ConversionError: keys that match no weight, or whose shapes do not.
        """
        self._path, self._strength = checkpoint.path, strength
        self._tensors = _by_weight(checkpoint, base, numbering)
        self.shapes: dict[str, Shape] = {
            name: self._shape(name, base[name], slots) for name, slots in self._tensors.items()
        }

    def _shape(self, name: str, weight: Shape, slots: Mapping[str, Tensor]) -> Shape:
        if "diff" in slots:
            shape = slots["diff"].shape
            if shape == weight:
                return weight
            widened = name == "conv_in.weight" and len(shape) == 4 and shape[1] > weight[1]
            if widened and (shape[0], *shape[2:]) == (weight[0], *weight[2:]):
                return shape
            raise ConversionError(
                f'{self._path}: tensor "{slots["diff"].key}" is {shape}, the UNet\'s {name} {weight}; '
                "the patch is for another family of models"
            )
        up, down = slots["up"], slots["down"]
        rows, columns = weight[0], int(np.prod(weight[1:]))
        rank = down.shape[0] if down.shape else 0
        if up.shape != (rows, rank) or down.shape != (rank, columns):
            raise ConversionError(
                f'{self._path}: "{up.key}" {up.shape} times "{down.key}" {down.shape} is no difference of the UNet\'s '
                f"{name} {weight}; expected ({rows}, rank) and (rank, {columns}): the patch is for another family of "
                "models, or its two factors are swapped"
            )
        return weight

    def apply(self, name: str, weight: Float | None) -> Float:
        """Return the patched weight."""
        assert weight is not None  # every name is one of the base
        slots, shape = self._tensors[name], self.shapes[name]
        if "diff" in slots:
            difference = _read(slots["diff"])
        else:
            difference = (_read(slots["up"]) @ _read(slots["down"])).reshape(shape)
        if shape != weight.shape:
            weight = np.pad(weight, [(0, new - old) for new, old in zip(shape, weight.shape, strict=True)])
        weight += np.float32(self._strength) * difference
        return weight

    def origin(self, name: str) -> str:
        """File and key."""
        return f'{self._path}: tensor "{next(iter(self._tensors[name].values())).key}"'


def _by_weight(checkpoint: Checkpoint, base: Mapping[str, Shape], numbering: Numbering) -> dict[str, dict[str, Tensor]]:
    """The tensors by the weight they change and by what they are to it: "diff", "up" or "down"."""
    slots = {("diff", "0"): "diff", ("lora", "0"): "up", ("lora", "1"): "down"}
    found: dict[str, dict[str, Tensor]] = {}
    strange, unmatched = [], []
    for key, tensor in checkpoint.tensors.items():
        match = _SLOT.match(key)
        name, what = key, "diff"
        if match is not None:
            name = _LDM.canonical(match["weight"].removeprefix(_LDM.prefix), numbering)
            what = slots.get((match["kind"], match["slot"]), "")
        if name not in base:
            unmatched.append(key)
        elif not what or what in found.get(name, {}):
            strange.append(key)
        else:
            found.setdefault(name, {})[what] = tensor
    if unmatched:
        raise ConversionError(
            f"{checkpoint.path}: {len(unmatched)} of {len(checkpoint.tensors)} keys match no weight of the UNet: "
            f"{shorten(sorted(unmatched))}; the patch is for another family of models. Nothing was merged: with a part "
            "of it pictures would have no transparency"
        )
    if strange:
        raise ConversionError(
            f"{checkpoint.path}: {len(strange)} keys are no known form of a difference: {shorten(sorted(strange))}; "
            "expected ::diff::0, or ::lora::0 and ::lora::1"
        )
    half = [name for name, tensors in found.items() if set(tensors) not in ({"diff"}, {"up", "down"})]
    if half:
        keys = [tensor.key for name in half for tensor in found[name].values()]
        raise ConversionError(f"{checkpoint.path}: {len(half)} factors have no other half: {shorten(sorted(keys))}")
    return found


def _read(tensor: Tensor) -> Float:
    return tensor.read().astype(np.float32).reshape(tensor.shape)


class SharedFrames:
    """The patch of an SD 1.5 file, and what the UNet is with it.

    Every attention gets matrices of its own for each frame (W + up @ down, one below the other) and a second attention
    over the frames. With one frame that second attention is one affine map behind a LayerNorm, which is computed here:
    softmax over one element is 1, so queries and keys drop out.

    config: the UNet's description with its frames. control: the names of `frame_control`'s weights, empty without.
    """

    def __init__(self, checkpoint: Checkpoint, config: UNetConfig, base: Mapping[str, Shape]) -> None:
        """Hold the file's tensors against the weights of the UNet.

        Raises:
            ConversionError: keys that are missing, left over, or of another shape.
        """
        self._path, self._tensors = checkpoint.path, checkpoint.tensors
        self.frames = frames_of(checkpoint)
        from glassine.models.sharing import attention_units

        self.units = attention_units(config)
        self.controlled = any(key.startswith("kwargs_encoder.") for key in checkpoint.tensors)
        self.control: dict[str, Source] = {}
        self._expected: dict[str, Shape] = {}
        self._make: dict[str, Callable[[Float | None], Float]] = {}
        self.shapes: dict[str, Shape] = {}
        for index, (unit, channels, _) in enumerate(self.units):
            self._unit(f"hookers.layers.{index}", unit, channels, base)
        if self.controlled:
            self._control()
        self._check()

    def _unit(self, prefix: str, unit: str, channels: int, base: Mapping[str, Shape]) -> None:
        """List what one attention takes from the file, and the weights it has then."""
        frames = self.frames
        for name, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out")):
            rows, columns = base[f"{unit}.{name}.weight"]
            pairs = [
                (f"{prefix}.{theirs}_lora.{f}.up.weight", f"{prefix}.{theirs}_lora.{f}.down.weight")
                for f in range(frames)
            ]
            for up, down in pairs:
                rank = self._tensors[down].shape[0] if down in self._tensors and self._tensors[down].shape else 0
                self._expected |= {up: (rows, rank), down: (rank, columns)}
            self._add(f"{unit}.{name}.weight", (frames * rows, columns), partial(self._merged, pairs))
        if frames > 1:
            self._add(f"{unit}.to_out.0.bias", (frames * channels,), partial(_repeated, frames))
        self._expected |= {f"{prefix}.temporal_n.weight": (channels,), f"{prefix}.temporal_n.bias": (channels,)}
        for letter in "iqkvo":
            self._expected[f"{prefix}.temporal_{letter}.weight"] = (channels, channels)
            self._expected[f"{prefix}.temporal_{letter}.bias"] = (channels,)
        if frames == 1:
            self._add(f"{unit}.temporal.weight", (channels, channels), partial(self._affine_weight, prefix))
            self._add(f"{unit}.temporal.bias", (channels,), partial(self._affine_bias, prefix))
        else:
            for key, shape in list(self._expected.items()):
                if key.startswith(f"{prefix}.temporal_"):
                    self._add(unit + key.removeprefix(prefix), shape, partial(self._plain, key))
        if self.controlled:
            self._control_unit(prefix, unit, channels)

    def _add(self, name: str, shape: Shape, make: Callable[[Float | None], Float]) -> None:
        self.shapes[name], self._make[name] = shape, make

    def _control_unit(self, prefix: str, unit: str, channels: int) -> None:
        signal = self._width("kwargs_encoder.blocks_0.14.weight")
        for frame in range(self.frames):
            place = f"control_convs.{frame}"
            self._expected |= {
                f"{prefix}.{place}.0.weight": (signal, signal, 3, 3),
                f"{prefix}.{place}.0.bias": (signal,),
                f"{prefix}.{place}.2.weight": (channels, signal, 1, 1),
                f"{prefix}.{place}.2.bias": (channels,),
            }
            for tail in ("0.weight", "0.bias", "2.weight", "2.bias"):
                self.control[f"{unit}.{place}.{tail}"] = Source(f"{prefix}.{place}.{tail}")

    def _control(self) -> None:
        widths = [3, *self.widths]
        places = [(f"blocks_0.{2 * i}", widths[i], widths[i + 1]) for i in range(len(self.widths))]
        for block in range(1, 1 + max(level for _, _, level in self.units)):
            places += [(f"blocks_{block}.{i}", widths[-1], widths[-1]) for i in (0, 2)]
        for place, inner, outer in places:
            for tail, shape in (("weight", (outer, inner, 3, 3)), ("bias", (outer,))):
                self._expected[f"kwargs_encoder.{place}.{tail}"] = shape
                self.control[f"{place}.{tail}"] = Source(f"kwargs_encoder.{place}.{tail}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the first eight convolutions of the control encoder."""
        return tuple(self._width(f"kwargs_encoder.blocks_0.{2 * i}.weight") for i in range(8))

    def _width(self, key: str) -> int:
        """How many channels a convolution gives; 0, which fits nothing, where it is missing."""
        tensor = self._tensors.get(key)
        return tensor.shape[0] if tensor is not None and tensor.shape else 0

    def _check(self) -> None:
        missing = sorted(set(self._expected) - set(self._tensors))
        unknown = sorted(set(self._tensors) - set(self._expected))
        wrong = [
            f"{key} is {self._tensors[key].shape}, expected {shape}"
            for key, shape in self._expected.items()
            if key in self._tensors and self._tensors[key].shape != shape
        ]
        for what, keys in (("are missing", missing), ("belong to no attention", unknown), ("do not fit", wrong)):
            if keys:
                raise ConversionError(
                    f"{self._path}: {len(keys)} of its tensors {what}: {shorten(keys)}; the UNet has {len(self.units)} "
                    "attentions: the file is damaged, or for another family of models"
                )

    def apply(self, name: str, weight: Float | None) -> Float:
        """Return the patched weight, or the one that the patch adds."""
        return self._make[name](weight)

    def origin(self, name: str) -> str:
        """The file; most weights are made of several of its tensors."""
        return f"{self._path} ({name})"

    def _tensor(self, key: str) -> Float:
        return _read(self._tensors[key])

    def _plain(self, key: str, weight: Float | None) -> Float:
        return self._tensor(key)

    def _merged(self, pairs: Iterable[tuple[str, str]], weight: Float | None) -> Float:
        """Each frame's matrix, one below the other."""
        assert weight is not None
        return np.concatenate([weight + self._tensor(up) @ self._tensor(down) for up, down in pairs])

    def _affine_weight(self, prefix: str, weight: Float | None) -> Float:
        """Wo Wv Wi, times the LayerNorm's own factors."""
        return self._through(prefix) * self._tensor(f"{prefix}.temporal_n.weight")

    def _affine_bias(self, prefix: str, weight: Float | None) -> Float:
        """Wo (Wv (Wi beta + bi) + bv) + bo."""
        x = self._tensor(f"{prefix}.temporal_n.bias")
        for letter in "ivo":
            x = self._tensor(f"{prefix}.temporal_{letter}.weight") @ x + self._tensor(
                f"{prefix}.temporal_{letter}.bias"
            )
        return x

    def _through(self, prefix: str) -> Float:
        o, v, i = (self._tensor(f"{prefix}.temporal_{letter}.weight") for letter in "ovi")
        product: Float = o @ (v @ i)
        return product


def _repeated(times: int, weight: Float | None) -> Float:
    assert weight is not None
    return np.tile(weight, times)


def frames_of(checkpoint: Checkpoint) -> int:
    """How many frames an SD 1.5 file draws together."""
    pattern = re.compile(r"hookers\.layers\.0\.to_q_lora\.(\d{1,2})\.")
    return len({match[1] for key in checkpoint.tensors if (match := pattern.match(key))})
