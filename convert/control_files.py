"""Control files -> weights under canonical names (diffusers'), whatever their layout.

whole          lllyasviel's names with and without `control_model.`, diffusers' names, as a file or as a folder
difference     deltas to the base's weights of the same names (the key `difference` says so)
Control-LoRA   low-rank deltas to the base's weights, and some whole ones (the key `lora_controlnet` says so)
adapter        T2I-Adapters in the authors' names or diffusers'
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import CONTROL_CLASSES, Checkpoint, open_checkpoint, open_component, read_json, shorten
from glassine.convert.names import RESNET_LDM, UNET_LDM, Layout, Lines, Source, map_names
from glassine.convert.weights import FileWeights, Patch, Patched, Span, WeightSource
from glassine.errors import CheckpointError, ConversionError

Kind = Literal["controlnet", "union", "t2i_adapter"]

_CONTROL_LDM: Lines = (
    *(line for line in UNET_LDM if not line[0].startswith("out")),
    ("zero_convs.{n}.0.", "controlnet_down_blocks.{}."),
    ("middle_block_out.0.", "controlnet_mid_block."),
    ("input_hint_block.0.", "controlnet_cond_embedding.conv_in."),
    *((f"input_hint_block.{2 * i + 2}.", f"controlnet_cond_embedding.blocks.{i}.") for i in range(6)),
    ("input_hint_block.14.", "controlnet_cond_embedding.conv_out."),
)
_UNION: Lines = (("transformer_layes.{n}.", "transformer_layes.{}."),)
_UNION_TAILS: Lines = (
    ("attn.in_proj_weight", "attn.to_{qkv}.weight"),
    ("attn.in_proj_bias", "attn.to_{qkv}.bias"),
    ("attn.out_proj.", "attn.to_out.0."),
)
_LDM_HINT, _DIFFUSERS_HINT = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"
_LAYOUTS = (
    Layout("unet", "LDM", "control_model.", _LDM_HINT, _CONTROL_LDM, RESNET_LDM),
    Layout("unet", "LDM, bare", "", _LDM_HINT, _CONTROL_LDM, RESNET_LDM),
    Layout("unet", "diffusers", "", _DIFFUSERS_HINT, _UNION, _UNION_TAILS),
    Layout("unet", "diffusers folder", "control/", _DIFFUSERS_HINT, _UNION, _UNION_TAILS),
)

# Files that steer a UNet and are neither of the two.
_OTHERS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"lllite_unet_", "a ControlNet-LLLite, which changes the UNet's own attention"),
        (r"(.*\.)?style_embedding$", "a style adapter, which adds tokens to the prompt"),
        (r"(ip_adapter|image_proj)\.", "an IP-Adapter"),
        (r".*motion_modules\.", "a ControlNet of AnimateDiff"),
        (
            r".*(double_blocks|transformer_blocks\.\d+\.attn\.add_q_proj|joint_blocks)\b",
            "a ControlNet of another family",
        ),
    )
)
# The first files of the authors hold the whole model they were trained with, beside what is of use here.
_REST_OF_A_CHECKPOINT = re.compile(r"(model\.diffusion_model|first_stage_model|cond_stage_model)\.")
_HALF = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")


@dataclass(frozen=True, slots=True)
class ControlFile:
    """An opened control file: its kind, and its weights, over the base's where they are deltas.

    layout: how the file spells and stores them, for reports.
    """

    checkpoint: Checkpoint
    kind: Kind
    layout: str
    weights: WeightSource

    @property
    def config(self) -> Mapping[str, Any]:
        """The folder's config.json; empty for files."""
        return next(iter(self.checkpoint.configs.values()), {})


def control_kind(keys: Collection[str]) -> str | None:
    """What a file is by its keys, in words, as far as it is one that `open_control` takes."""
    if any(pattern.match(key) for key in keys for pattern, _ in _OTHERS):
        return None
    if _adapter_keys(keys):
        return "T2I-Adapter"
    if _layout(keys) is None:
        return None
    return "Control-LoRA" if "lora_controlnet" in keys else "ControlNet"


def is_control(path: Path) -> bool:
    """Whether this is something that steers a UNet, of whatever layout, known here or not; it may have other faults."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and read_json(config).get("_class_name") in CONTROL_CLASSES
    keys = open_checkpoint(path).tensors
    others = any(pattern.match(key) for key in keys for pattern, _ in _OTHERS)
    return others or bool(_adapter_keys(keys)) or _layout(keys) is not None


def open_control(path: Path, base: WeightSource) -> ControlFile:
    """Recognise a control file and read its header.

    Args:
        path: a .safetensors file, or a diffusers folder of one ControlNet or T2I-Adapter.
        base: the weights of the UNet it steers, which deltas are added to.

    Raises:
        CheckpointError: it cannot be read, or is no ControlNet and no T2I-Adapter.
        ConversionError: keys that belong to nothing, or deltas to weights that the base does not have.
    """
    checkpoint = open_component(path, CONTROL_CLASSES) if path.is_dir() else open_checkpoint(path)
    keys = checkpoint.tensors
    for pattern, what in _OTHERS:
        key = next((key for key in keys if pattern.match(key)), None)
        if key is not None:
            raise CheckpointError(
                f'{path}: this is {what} (key "{key}"), expected a ControlNet or a T2I-Adapter; '
                "Glassine cannot draw with it"
            )
    if names := _adapter_keys(keys):  # what is none of its weights is found when the graph has been written
        return ControlFile(checkpoint, "t2i_adapter", "T2I-Adapter", FileWeights(checkpoint, names))
    layout = _layout(keys)
    if layout is None:
        first = ", ".join(sorted(keys)[:3]) if keys else "none"
        raise CheckpointError(
            f"{path}: no ControlNet and no T2I-Adapter in here (the first of {len(keys)} keys: {first}); "
            "convert a whole checkpoint without --base"
        )
    return _control(checkpoint, layout, base)


def _layout(keys: Collection[str]) -> Layout | None:
    return next((layout for layout in _LAYOUTS if layout.prefix + layout.marker in keys), None)


def _control(checkpoint: Checkpoint, layout: Layout, base: WeightSource) -> ControlFile:
    """Name the keys of a ControlNet, and lay deltas over the base."""
    tensors = checkpoint.tensors
    low_rank = "lora_controlnet" in tensors
    # A Control-LoRA has NAME.up and NAME.down in the place of NAME.weight.
    # In the file's order, so that the same file is refused in the same words every time.
    stems = dict.fromkeys(key.removesuffix(".up") for key in tensors if low_rank and key.endswith(".up"))
    keys = [f"{stem}.weight" for stem in stems]
    keys += [
        key
        for key in tensors
        if key not in {"difference", "lora_controlnet"}
        and not (low_rank and key.endswith((".up", ".down")) and key.rpartition(".")[0] in stems)
        and not (layout.prefix == "control_model." and _REST_OF_A_CHECKPOINT.match(key))
    ]
    names = map_names(keys, {"unet": layout})
    _refuse_leftovers(checkpoint.path, names.unknown, names.twice)
    # Queries and keys of a ControlNet++'s own transformer: see models/controlnet.py.
    unread = re.compile(r"transformer_layes\.\d+\.attn\.to_[qk]\.")
    table = {name: source for name, source in names.parts["unet"].items() if not unread.match(name)}
    whole = FileWeights(checkpoint, {name: source for name, source in table.items() if source.key in tensors})
    kind: Kind = "union" if "task_embedding" in table else "controlnet"
    if low_rank:
        pairs = {
            name: source.key.removesuffix(".weight") for name, source in table.items() if source.key not in tensors
        }
        under = [n for n in base.shapes if n.startswith(_HALF) and not n.startswith("time_embedding.cond_proj.")]
        patch: Patch = _LowRank(checkpoint, whole, pairs, base)
        return ControlFile(checkpoint, kind, "Control-LoRA", Patched(_Some(base, under), [patch]))
    if "difference" in tensors:
        under = [name for name in whole.shapes if name in base.shapes]
        return ControlFile(checkpoint, kind, "difference", Patched(_Some(base, under), [_Difference(whole, base)]))
    return ControlFile(checkpoint, kind, layout.origin, whole)


def _refuse_leftovers(path: Path, unknown: list[str], twice: Collection[tuple[str, str]]) -> None:
    if unknown:
        raise ConversionError(
            f"{path}: {len(unknown)} keys belong to no network that Glassine knows: {shorten(unknown)}; "
            "converting without them could draw something else than the model's author meant"
        )
    for first, second in twice:
        raise ConversionError(f'{path}: "{first}" and "{second}" are the same weight under two names')


def _adapter_keys(keys: Collection[str]) -> dict[str, Source]:
    """Canonical name -> key of a T2I-Adapter; empty for other files.

    The authors count the resnets of all levels of a full adapter in a row, two a level; the light one has levels.
    """
    body = re.compile(r"body\.(\d{1,3})\.(body\.(\d{1,3})\.)?(.*)")
    if any(key.removeprefix("adapter/").startswith("adapter.body.") for key in keys):
        return {key.removeprefix("adapter/"): Source(key) for key in keys}
    if "body.0.block1.weight" not in keys and "body.0.in_conv.weight" not in keys:
        return {}
    light = "body.0.in_conv.weight" in keys and "body.0.out_conv.weight" in keys
    names = {}
    for key in keys:
        match = body.fullmatch(key)
        if match is None:
            name = key
        elif light:
            resnet = f"resnets.{match[3]}." if match[2] else ""
            name = f"body.{match[1]}.{resnet}{match[4]}"
        else:
            level, number = divmod(int(match[1]), 2)
            name = f"body.{level}.{'' if match[4].startswith('in_conv') else f'resnets.{number}.'}{match[4]}"
        names[f"adapter.{name}"] = Source(key)
    return names


class _Some:
    """Some of a source's weights."""

    def __init__(self, source: WeightSource, names: Collection[str]) -> None:
        self._source = source
        self.shapes: Mapping[str, tuple[int, ...]] = {name: source.shapes[name] for name in names}

    def span(self, name: str) -> Span | None:
        return self._source.span(name)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        return self._source.read(name, start, stop)

    def key(self, name: str) -> str:
        return self._source.key(name)

    def origin(self, name: str) -> str:
        return self._source.origin(name)


class _Difference:
    """What the file holds is added to the base's weight of the same name; a name the base does not have is whole."""

    def __init__(self, file: FileWeights, base: WeightSource) -> None:
        self._file = file
        self.shapes: Mapping[str, tuple[int, ...]] = file.shapes
        for name, shape in file.shapes.items():
            if name in base.shapes:
                _check_same(file.origin(name), shape, base.origin(name), base.shapes[name])

    def apply(self, name: str, weight: NDArray[np.float32] | None) -> NDArray[np.float32]:
        shape = self.shapes[name]
        delta = self._file.read(name, 0, math.prod(shape)).astype(np.float32).reshape(shape)
        return delta if weight is None else delta + weight.reshape(shape)

    def origin(self, name: str) -> str:
        return self._file.origin(name)


class _LowRank:
    """W = W_base + up @ down for the `pairs`; what the file holds whole takes the base's place."""

    def __init__(
        self, checkpoint: Checkpoint, whole: FileWeights, pairs: Mapping[str, str], base: WeightSource
    ) -> None:
        self._whole = whole
        self._tensors = checkpoint.tensors
        self._path = checkpoint.path
        self._pairs = pairs
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **whole.shapes,
            **{name: self._shape(name, base) for name in pairs},
        }

    def _shape(self, name: str, base: WeightSource) -> tuple[int, ...]:
        up, down = (self._tensors.get(f"{self._pairs[name]}.{half}") for half in ("up", "down"))
        if up is None or down is None:
            raise ConversionError(f'{self._path}: "{self._pairs[name]}.up" has no ".down"; the file is incomplete')
        if name not in base.shapes:
            raise ConversionError(
                f"{self.origin(name)} changes {name}, which the base does not have: it is for another family"
            )
        if len(up.shape) < 2 or len(down.shape) < 2 or math.prod(up.shape[1:]) != down.shape[0]:
            raise ConversionError(f"{self.origin(name)}: up is {up.shape}, down {down.shape}: not of one rank")
        _check_same(self.origin(name), (up.shape[0], *down.shape[1:]), base.origin(name), base.shapes[name])
        return base.shapes[name]

    def apply(self, name: str, weight: NDArray[np.float32] | None) -> NDArray[np.float32]:
        shape = self.shapes[name]
        if name not in self._pairs:
            return self._whole.read(name, 0, math.prod(shape)).astype(np.float32).reshape(shape)
        assert weight is not None
        up, down = (self._tensors[f"{self._pairs[name]}.{half}"] for half in ("up", "down"))
        product = up.read().astype(np.float32).reshape(up.shape[0], -1) @ down.read().astype(np.float32).reshape(
            down.shape[0], -1
        )
        return weight + product.reshape(shape)

    def origin(self, name: str) -> str:
        return f'{self._path}: tensor "{self._pairs[name]}.up"' if name in self._pairs else self._whole.origin(name)


def _check_same(ours: str, shape: tuple[int, ...], theirs: str, other: tuple[int, ...]) -> None:
    if [size for size in shape if size != 1] != [size for size in other if size != 1]:
        raise ConversionError(
            f"{ours} changes a weight of shape {shape}, {theirs} has {other}: they are of different families"
        )
