"""LoRA and its kin as patches over a model's weights, merged in float32 while they stream into the packages.

LoRA, LoCon, LoHa, LoKr, DoRA, GLoRA, full differences, norms, (IA)3, OFT, BOFT, in the spellings of kohya, diffusers,
PEFT and ComfyUI; any number, each with a strength for the UNet and one for the text encoders. A key that changes
nothing here is an error: half a LoRA draws something its author never saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import Checkpoint, Tensor, open_checkpoint, shorten
from glassine.convert.lora_kinds import BIASES, Delta, Float, Tensors, delta_of, rescaled
from glassine.convert.lora_names import Module, Spellings, split_key
from glassine.convert.lora_settings import Settings
from glassine.convert.lora_transforms import Transform, bias_factors, transform_of
from glassine.convert.tiles import row_ranges
from glassine.convert.weights import Patched, WeightSource
from glassine.errors import ConversionError

Adder = Callable[[int, int, Float], None]  # adds to the rows [start, stop) of a weight, given as a matrix


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA and how strongly it is merged: 1 as trained, 0 not at all, negative the other way."""

    path: Path
    unet: float = 1.0
    text: float = 1.0

    @classmethod
    def parse(cls, words: str) -> LoraFile:
        """Read `FILE`, `FILE=0.8` (both) or `FILE=0.8,0.5` (UNet, text)."""
        file, equals, tail = words.rpartition("=")
        try:
            strengths = [float(number) for number in tail.split(",")] if equals else [1.0]
        except ValueError:  # the equals sign belongs to the name
            return cls(Path(words))
        if len(strengths) > 2 or not all(map(math.isfinite, strengths)) or (equals and not file):
            raise ConversionError(
                f"LoRA {words!r}: expected FILE, FILE=STRENGTH or FILE=UNET,TEXT, such as style.safetensors=0.8"
            )
        return cls(Path(file if equals else words), strengths[0], strengths[-1])

    def strength(self, part: str) -> float:
        """Its strength for a part of the model."""
        return self.unet if part == "unet" else self.text


def refuse_twins(files: Sequence[LoraFile]) -> None:
    """Refuse LoRAs of one name: it is how they are known afterwards.

    Raises:
        ConversionError: two files have the same name.
    """
    paths: dict[str, Path] = {}
    for file in files:
        first = paths.get(file.path.stem)
        if first is not None:
            advice = "say it once, with its whole strength" if first == file.path else "rename one of them"
            raise ConversionError(f"LoRA {file.path.stem!r}: is given twice, {first} and {file.path}; {advice}")
        paths[file.path.stem] = file.path


def with_loras(
    parts: Mapping[Any, WeightSource], files: Sequence[LoraFile], *, allow_pickle: bool = False
) -> dict[Any, WeightSource]:
    """Return the parts with the LoRAs over them, the first one at the bottom.

    Raises:
        CheckpointError: a file cannot be read.
        ConversionError: keys of a file change nothing in these parts, or its shapes are not theirs.
    """
    patches: dict[Any, list[Lora]] = {part: [] for part in parts}
    for file in files:
        for part, patch in lora_patches(file, parts, allow_pickle=allow_pickle).items():
            patches[part].append(patch)
    return {part: Patched(source, patches[part]) if patches[part] else source for part, source in parts.items()}


class Shaped(Protocol):
    """What a LoRA has to know of a part of a model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight there is, and its shape."""
        ...


def lora_patches(file: LoraFile, parts: Mapping[Any, Shaped], *, allow_pickle: bool = False) -> dict[str, Lora]:
    """Open a LoRA file for these parts: a patch for each part that it changes at its strength."""
    checkpoint = open_checkpoint(file.path, allow_pickle=allow_pickle)
    changes = _changes(checkpoint, file, parts)
    patches: dict[str, Lora] = {}
    for part, source in parts.items():
        own = {module.name: tensors for module, tensors in changes.items() if module.part == part}
        if own and file.strength(part) != 0:
            patches[part] = Lora(checkpoint, own, source.shapes, file.strength(part))
    return patches


def _changes(checkpoint: Checkpoint, file: LoraFile, parts: Mapping[Any, Shaped]) -> dict[Module, dict[str, Tensor]]:
    """The file's tensors by module and role; every key has to find its place."""
    spellings = Spellings({part: source.shapes for part, source in parts.items()})
    changes: dict[Module, dict[str, Tensor]] = {}
    unmatched: list[str] = []
    for key, tensor in checkpoint.tensors.items():
        spelt = _split(key, checkpoint)
        module = spellings.find(spelt[0]) if spelt is not None else None
        if spelt is None or module is None:
            if not (file.text == 0 and key.startswith(("lora_te", "text_encoder"))):
                unmatched.append(key)
            continue
        roles = changes.setdefault(module, {})
        if spelt[1] in roles:
            raise ConversionError(
                f'{checkpoint.path}: "{roles[spelt[1]].key}" and "{key}" are the same tensor under two names'
            )
        roles[spelt[1]] = tensor
    if unmatched:
        _refuse(checkpoint, unmatched, spellings, parts)
    if not changes:
        raise ConversionError(f"{checkpoint.path}: there is nothing in here that changes a model")
    return changes


def _split(key: str, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """`split_key`, and LyCORIS' (IA)3: its vector has the name that a layer's whole weight has elsewhere."""
    module = key.removesuffix(".weight")
    return (module, "ia3_w") if f"{module}.on_input" in checkpoint.tensors else split_key(key)


def _refuse(checkpoint: Checkpoint, unmatched: list[str], spellings: Spellings, parts: Mapping[Any, Any]) -> None:
    said = checkpoint.metadata.get("ss_base_model_version", checkpoint.metadata.get("modelspec.architecture"))
    made_for = f"; its header says it was made for {said}" if said else ""
    for key in unmatched:
        spelt = split_key(key)
        shared = spellings.ambiguous(spelt[0]) if spelt is not None else []
        if shared:
            raise ConversionError(f'{checkpoint.path}: "{key}" may mean {" or ".join(shared)}; nothing was merged')
    text = any(key.startswith(("lora_te", "text_encoder")) for key in unmatched)
    advice = "; FILE=0.8,0 merges it without its text encoder" if text and "text_encoder" not in parts else ""
    raise ConversionError(
        f"{checkpoint.path}: {len(unmatched)} of {len(checkpoint.tensors)} keys change nothing in this model "
        f"({', '.join(parts)}): {shorten(sorted(unmatched))}{made_for}; nothing was merged{advice}"
    )


class Lora:
    """The patch that one file is to one part: see `glassine.convert.weights.Patch`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        changes: Mapping[str, Mapping[str, Tensor]],
        base: Mapping[str, tuple[int, ...]],
        strength: float,
    ) -> None:
        self._path = checkpoint.path
        self._strength = strength
        self._settings = Settings(checkpoint)
        self._tensors: dict[str, Tensors] = {}
        self._deltas: dict[str, Delta] = {}
        self._transforms: dict[str, Transform] = {}
        self._bias_factors: dict[str, Float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for module, tensors in changes.items():
            t = Tensors(f"{checkpoint.path}: {module}", tensors)
            for name, takes in ((f"{module}.weight", self._takes), (f"{module}.bias", self._takes_bias)):
                if takes(name, t, base):
                    self._tensors[name] = t
                    self.shapes[name] = base[name]

    def _takes_bias(self, name: str, t: Tensors, base: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the tensors change the bias `name`, once their shapes have been held against it."""
        for role in BIASES & t.roles:
            self._expect(name in base, t, role, "the model has no such bias")
            self._expect(math.prod(t.shape(role)) == math.prod(base[name]), t, role, f"the bias is {base[name]}")
        module = name.removesuffix(".bias")
        factors = bias_factors(t, module, base[f"{module}.weight"], self._settings) if name in base else None
        if factors is not None:
            self._bias_factors[name] = factors
        return factors is not None or bool(BIASES & t.roles)

    def _takes(self, name: str, t: Tensors, base: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the tensors change the weight `name`, once their shapes have been held against it."""
        transform = transform_of(t, name.removesuffix(".weight"), base[name], self._settings)
        if transform is not None:
            self._transforms[name] = transform
            return True
        delta = delta_of(t)
        if delta is None:
            return False
        if not _fits(delta.shape, base[name]):
            roles = ", ".join(f"{t.key(role)} {t.shape(role)}" for role in sorted(t.roles - {"alpha", *BIASES}))
            raise ConversionError(
                f"{self._path}: {roles} make a difference of shape {delta.shape}, the model's {name} is {base[name]}; "
                "the file was made for another model"
            )
        part = _squeezed(delta.shape) != _squeezed(base[name]) and len(delta.shape) == 4  # of the input channels
        changed = delta.shape if part else base[name]
        for dora in {"dora", "magnitude"} & t.roles:
            fits = math.prod(t.shape(dora)) in _dora_sizes(changed)
            self._expect(fits, t, dora, f"the weight is {changed}")
        self._deltas[name] = delta._replace(shape=changed)
        return True

    def _expect(self, condition: bool, t: Tensors, role: str, why: str) -> None:
        if not condition:
            raise ConversionError(f'{self._path}: tensor "{t.key(role)}" has shape {t.shape(role)}, but {why}')

    def origin(self, name: str) -> str:
        """File and strength."""
        return f"{self._path} ({self._strength:g})"

    def apply(self, name: str, weight: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return the weight with the LoRA in it; `weight` itself may be changed."""
        assert weight is not None  # _takes refuses what is not in the base
        t = self._tensors[name]
        if name.endswith(".bias"):
            return self._with_bias(t, name, weight)
        if name in self._transforms:
            return self._transforms[name](weight, self._strength)
        add = self.adder(name)
        if add is not None:
            _in_pieces(add, np.reshape(weight, (self.shapes[name][0], -1)))
            return weight
        delta = self._deltas[name]
        # conv_in of an inpainting model: the latents' channels are the first ones.
        region = weight[:, : delta.shape[1]] if delta.shape != weight.shape else weight
        flat = region.reshape(region.shape[0], -1)
        if {"dora", "magnitude"} & t.roles:
            flat = self._dora(t, delta, name, flat)
        else:
            flat = np.array(flat)
            _in_pieces(self._adder(t, delta, name, self._strength), flat)
        region[...] = flat.reshape(region.shape)
        return weight

    def adder(self, name: str) -> Adder | None:
        """Return what adds this LoRA to any rows of the weight `name`; None if it does more than add to them."""
        t, delta = self._tensors[name], self._deltas.get(name)
        if delta is None or {"dora", "magnitude"} & t.roles or delta.shape != self.shapes[name]:
            return None
        return self._adder(t, delta, name, self._strength)

    def _adder(self, t: Tensors, delta: Delta, name: str, strength: float) -> Adder:
        rows, factor = delta.open(), np.float32(strength * self._scale(t, delta, name))

        def add(start: int, stop: int, matrix: Float) -> None:
            difference = rows(start, stop)
            difference *= factor
            matrix += difference

        return add

    def _with_bias(self, t: Tensors, name: str, bias: Float) -> Float:
        """A bias of the upper matrix counts as that matrix does: times alpha / rank."""
        for role in sorted(BIASES & t.roles):
            delta = self._deltas.get(f"{name.removesuffix('.bias')}.weight")
            scale = self._scale(t, delta, name) if role == "up_bias" and delta is not None else 1.0
            bias = bias + np.float32(self._strength * scale) * t.read(role).reshape(bias.shape)
        if name in self._bias_factors:
            bias = bias * (1 + np.float32(self._strength) * (self._bias_factors[name] - 1))
        return bias

    def _scale(self, t: Tensors, delta: Delta, name: str) -> float:
        """What the file itself multiplies with: alpha / rank."""
        if delta.rank is None:
            return 1.0
        if "alpha" not in t:
            return self._settings.scale(name.rpartition(".")[0], delta.rank)
        return t.alpha(0.0) / delta.rank

    def _dora(self, t: Tensors, delta: Delta, name: str, flat: Float) -> Float:
        """W + m (V / |V| * magnitude - W) with V = W + s * delta."""
        moved = np.array(flat)
        _in_pieces(self._adder(t, delta, name, 1.0), moved)
        role = "magnitude" if "magnitude" in t else "dora"
        rows, columns = _dora_sizes(delta.shape)
        # PEFT's are norms of rows. In LyCORIS' files the shape tells: (out, 1, ...) rows, (1, in, ...) columns.
        shape = t.shape(role)
        by_columns = role == "dora" and len(shape) > 1 and shape[0] == 1 and shape[1] == columns != 1
        if math.prod(shape) != (columns if by_columns else rows):
            raise ConversionError(f'{self._path}: tensor "{t.key(role)}" {shape} does not fit a weight {delta.shape}')
        target = rescaled(moved.reshape(rows, columns, -1), t.read(role).reshape(-1), by_columns).reshape(flat.shape)
        return np.asarray(flat + np.float32(self._strength) * (target - flat))


def _in_pieces(add: Adder, matrix: Float) -> None:
    """Add to a whole matrix."""
    for start, stop in row_ranges(*matrix.shape):
        add(start, stop, matrix[start:stop])


def _dora_sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that a magnitude may belong to."""
    return shape[0], shape[1] if len(shape) > 1 else 1


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a difference fits a weight.

    Sizes of 1 do not count (a 1x1 convolution is a matrix), LoHa and LoKr may keep the kernel in the columns, and the
    first convolution of an inpainting model, which has more input channels, takes a LoRA of the plain one.
    """
    if _squeezed(shape) == _squeezed(weight) or (len(shape) == 2 and shape == _matrix(weight)):
        return True
    wider = len(shape) == len(weight) == 4 and shape[1] == 4 < weight[1]
    return wider and (shape[0], *shape[2:]) == (weight[0], *weight[2:])


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
