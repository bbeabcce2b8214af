"""LayerDiffuse's files -> networks of a folder: the transparent decoder and encoder, patched UNets, their control.

What a file is, its keys tell. Three things leave no trace in them and come from the file's name, its sha256 (of the
released files), or the one who asks: which of two conditional models it is, for which family a decoder or encoder was
trained, and the encoder's factor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from glassine.convert.checkpoint import Checkpoint, open_checkpoint
from glassine.convert.digest import digests
from glassine.convert.layer_patches import Differences, SharedFrames, check_complete
from glassine.convert.lora import LoraFile, lora_patches
from glassine.convert.lora_names import split_key
from glassine.convert.names import Numbering, Source
from glassine.convert.network import Base, Form, Network, Size
from glassine.convert.program import Requests
from glassine.convert.weights import FileWeights, Patch, Patched
from glassine.errors import CheckpointError, ConversionError
from glassine.models.config import (
    FrameControlConfig,
    TransparentDecoderConfig,
    TransparentEncoderConfig,
    UNetConfig,
)
from glassine.models.mil import Program

Kind = Literal[
    "decoder", "encoder", "transparent", "joint", "fg2bg", "bg2fg", "fg2ble", "bg2ble", "fgble2bg", "bgble2fg"
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What a patched UNet draws: its frames, which of them are transparent, and the pictures it is given.

    conditions: latents behind those of the noise. control: the picture that the control network reads.
    """

    frames: tuple[str, ...]
    decoded: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    control: str | None = None


FRAMES: dict[Kind, Drawing] = {  # Stable Diffusion 1.5
    "transparent": Drawing(frames=("fg",), decoded=("fg",)),
    "joint": Drawing(frames=("fg", "bg", "blend"), decoded=("fg",)),
    "fg2bg": Drawing(frames=("bg", "blend"), control="fg"),
    "bg2fg": Drawing(frames=("fg", "blend"), decoded=("fg",), control="bg"),
}
CONDITIONS: dict[Kind, Drawing] = {  # Stable Diffusion XL
    "transparent": Drawing(frames=("fg",), decoded=("fg",)),
    "fg2ble": Drawing(frames=("blend",), conditions=("fg",)),
    "bg2ble": Drawing(frames=("blend",), conditions=("bg",)),
    "fgble2bg": Drawing(frames=("bg",), conditions=("fg", "blend")),
    "bgble2fg": Drawing(frames=("fg",), decoded=("fg",), conditions=("bg", "blend")),
}

# The released files that keys do not tell apart, as others have reported them.
_RELEASED: dict[str, tuple[str, Kind]] = {
    "59dc8feefe40d26b6cb7186aed7af70c60d94ac4f9db8ebe7f121a01ba27a2fc": ("sdxl", "decoder"),
    "6df4712dfbb3783231b22f869a5da5cbfea782ebb05f782bd9e8744bfb0cdf03": ("sd15", "decoder"),
    "5bade856ec3e55d6ceb0e35bbc97cea7fa4953f7776c8032f2fe52ba740ed580": ("sd15", "fg2bg"),
    "8367f976da1cc4275e513c7fb40f977ca312e79e720d7db7ae94978a9359fb62": ("sd15", "bg2fg"),
    "50a29851ad56308f14d6c9ed375be17df6921efeca240b31f567f6b8c76d1e70": ("sdxl", "fg2ble"),
    "2901d1353cc4ca763c8bedc48453b36e88680605f417c7f7ec730a7c36845d7c": ("sdxl", "bg2ble"),
}
_NAMED_FAMILIES = ((r"sd_?15|sd_?1\.5", "sd15"), (r"xl|^vae_transparent_(de|en)coder", "sdxl"))
_DIFFUSERS_SCALE = 300.0  # of the encoder in LayerDiffuse's own diffusers files (ld_diffusers_*), which is 1 elsewhere
_WEIGHT_FILE = 2**31  # bytes, the Neural Engine's limit

_SUMMARIES: dict[Kind, str] = {
    "decoder": "LayerDiffuse's decoder: a picture and its latent become alpha and colour.",
    "encoder": "LayerDiffuse's encoder: alpha and colour become an offset to a picture's latent.",
    "transparent": "Stable Diffusion's UNet, patched by LayerDiffuse to draw on nothing.",
    "joint": "Stable Diffusion's UNet, patched by LayerDiffuse to draw foreground, background and both at once.",
    "fg2bg": "Stable Diffusion's UNet, patched by LayerDiffuse to draw what is behind a foreground.",
    "bg2fg": "Stable Diffusion's UNet, patched by LayerDiffuse to draw what stands before a background.",
    "fg2ble": "Stable Diffusion's UNet, patched by LayerDiffuse to draw a whole picture around a foreground.",
    "bg2ble": "Stable Diffusion's UNet, patched by LayerDiffuse to draw a whole picture on a background.",
    "fgble2bg": "Stable Diffusion's UNet, patched by LayerDiffuse to draw the background of a whole picture.",
    "bgble2fg": "Stable Diffusion's UNet, patched by LayerDiffuse to draw the foreground of a whole picture.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransparentFile:
    """A LayerDiffuse file, and what it is if that has been said.

    strength: how strongly a patch of SDXL is merged. offset_scale: the factor of an encoder, if said.
    """

    path: Path
    kind: Kind | None = None
    strength: float = 1.0
    offset_scale: float | None = None

    @classmethod
    def parse(cls, words: str, *, strength: float = 1.0, offset_scale: float | None = None) -> TransparentFile:
        """Read `FILE` or `KIND=FILE`, such as `fg2bg=layers.safetensors`; the strength is for patches of SDXL alone."""
        kind, equals, file = words.partition("=")
        named = next((known for known in KINDS if known == kind), None) if equals else None
        path = Path(words if named is None else file)
        return cls(path=path, kind=named, strength=strength, offset_scale=offset_scale)


def transparent_networks(files: Sequence[TransparentFile], base: Base) -> list[Network]:
    """Recognise LayerDiffuse files and list their networks for `base`.

    Raises:
        CheckpointError: a file cannot be read, is something else, or does not say which of two it is.
        ConversionError: a file is damaged, or for another family of models.
    """
    networks = []
    for file in files:
        checkpoint = open_checkpoint(file.path)
        kind = _kind(checkpoint, file)
        if kind in ("decoder", "encoder"):
            _check_family(checkpoint, file, base)
            network = _decoder(checkpoint, base) if kind == "decoder" else _encoder(checkpoint, file, base)
            networks.append(network)
        elif any(key.startswith("hookers.layers.") for key in checkpoint.tensors):
            networks += _sharing(checkpoint, kind, file, base)
        else:
            networks.append(_differences(checkpoint, kind, file, base))
    twice = sorted({network.key for network in networks if [n.key for n in networks].count(network.key) > 1})
    if twice:
        raise ConversionError(f"two of the files would be the folder's {', '.join(twice)}; convert one of them")
    return networks


def is_transparent(path: Path) -> bool:
    """Whether a file is one of LayerDiffuse's, by its keys.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not path.is_file():
        return False
    checkpoint = open_checkpoint(path)
    try:
        return bool(_possible_kinds(checkpoint, said=False))
    except CheckpointError:
        return False


def _kind(checkpoint: Checkpoint, file: TransparentFile) -> Kind:
    """What the file is, by its keys, then by its name or digest where they cannot tell."""
    possible = _possible_kinds(checkpoint, said=file.kind == "transparent")
    if file.kind is not None:
        if file.kind not in possible:
            raise CheckpointError(f"{checkpoint.path}: said to be {file.kind}, its keys say {' or '.join(possible)}")
        return file.kind
    if len(possible) == 1:
        return possible[0]
    named = [kind for kind in possible if kind in checkpoint.path.stem.lower()]
    if len(named) == 1:
        return named[0]
    released = _released(checkpoint)
    if released is not None and released[1] in possible:
        return released[1]
    raise CheckpointError(
        f"{checkpoint.path}: its keys are those of {' and of '.join(possible)}, and its name says neither; "
        f"say which: {possible[0]}={checkpoint.path.name}"
    )


def _possible_kinds(checkpoint: Checkpoint, said: bool) -> tuple[Kind, ...]:
    keys = checkpoint.tensors.keys()
    if "latent_conv_in.weight" in keys and "mid_block.attentions.0.to_q.weight" in keys:
        return ("decoder",)
    if {"blocks.0.weight", "blocks.16.weight"} <= keys:
        return ("encoder",)
    if any(key.startswith("hookers.layers.") for key in keys):
        return ("fg2bg", "bg2fg") if any(key.startswith("kwargs_encoder.") for key in keys) else _frames_kind(keys)
    is_unet = any(key.startswith(("time_embedding.", "time_embed.", "model.")) for key in keys)  # a whole one
    first = next((checkpoint.tensors[key] for key in _FIRST if key in keys), None)
    if not is_unet and first is not None and len(first.shape) == 4 and first.shape[1] != 4:
        whole = any("transformer_blocks" in key for key in keys)
        wide: dict[int, tuple[Kind, ...]] = {8: ("fg2ble", "bg2ble"), 12: ("bgble2fg",) if whole else ("fgble2bg",)}
        if first.shape[1] in wide:
            return wide[first.shape[1]]
    elif not is_unet and _is_patch(checkpoint, said):
        return ("transparent",)
    lora = _is_lora(checkpoint)
    raise CheckpointError(
        f"{checkpoint.path}: no file of LayerDiffuse; expected a transparent decoder or encoder, or a patch for a UNet "
        f"(its first keys: {', '.join(sorted(keys)[:3])})"
        + ("; a LoRA is merged with --lora, or is LayerDiffuse's own if you say transparent=FILE" if lora else "")
    )


_FIRST = ("diffusion_model.input_blocks.0.0.weight::diff::0", "conv_in.weight")


def _frames_kind(keys: Any) -> tuple[Kind, ...]:
    return ("joint",) if any(".to_q_lora.1." in key for key in keys) else ("transparent",)


def _is_patch(checkpoint: Checkpoint, said: bool) -> bool:
    """Whether these are differences of a UNet: under LayerDiffuse's keys, under diffusers', or a LoRA.

    Any LoRA could be meant; only one that is called so is taken for LayerDiffuse's.
    """
    keys = checkpoint.tensors.keys()
    if any("::" in key for key in keys):
        return True
    if _is_lora(checkpoint):
        return said or "transparent" in checkpoint.path.stem.lower()
    return any(key.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for key in keys)


def _is_lora(checkpoint: Checkpoint) -> bool:
    spelt = [split_key(key) for key in checkpoint.tensors]
    return bool(spelt) and all(one is not None and one[1] in {"up", "down", "alpha"} for one in spelt)


def _released(checkpoint: Checkpoint) -> tuple[str, Kind] | None:
    """Family and kind of a released file."""
    with digests([(checkpoint.path,)]) as digest:
        return _RELEASED.get(digest()[(checkpoint.path,)])


def _check_family(checkpoint: Checkpoint, file: TransparentFile, base: Base) -> None:
    """Refuse a decoder or encoder that is known to belong to another family; the two are not interchangeable."""
    if file.kind is not None:
        return  # said to be the one for this model
    stem, why = checkpoint.path.stem.lower(), "its name"
    family = next((family for pattern, family in _NAMED_FAMILIES if re.search(pattern, stem)), None)
    if family is None:
        released = _released(checkpoint)
        family, why = (None if released is None else released[0]), "its sha256"
    if family is not None and family != base.family.name:
        raise ConversionError(
            f"{checkpoint.path}: this is for {family} ({why} says so), the model is {base.family.name}, whose latents "
            "are others; use the one of the model's family (if the name is wrong, say decoder=FILE or encoder=FILE)"
        )


def _weights(checkpoint: Checkpoint) -> FileWeights:
    return FileWeights(checkpoint, {key: Source(key) for key in checkpoint.tensors})


def _width(checkpoint: Checkpoint, key: str, axis: int = 0) -> int:
    tensor = checkpoint.tensors.get(key)
    if tensor is None or len(tensor.shape) <= axis:
        raise ConversionError(f"{checkpoint.path}: has no weight {key} that tells a width; the file is damaged")
    return tensor.shape[axis]


def _count(checkpoint: Checkpoint, pattern: str) -> int:
    number = 0
    while any(key.startswith(pattern.format(number)) for key in checkpoint.tensors):
        number += 1
    return number


def _decoder(checkpoint: Checkpoint, base: Base) -> Network:
    """The decoder, also for the turned picture where sizes are not square: the ensemble turns by quarters."""
    levels = _count(checkpoint, "down_blocks.{}.")
    config = TransparentDecoderConfig(
        channels=tuple(_width(checkpoint, f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)),
        layers=_count(checkpoint, "down_blocks.0.resnets.{}."),
        attention=tuple(_count(checkpoint, f"down_blocks.{i}.attentions.{{}}.") > 0 for i in range(levels)),
        latent_channels=_width(checkpoint, "latent_conv_in.weight", 1),
    )
    sizes = base.options.sizes
    turned = tuple((height, width) for width, height in sizes)
    return Network(
        key="transparent_decoder",
        role="transparent_decoder",
        package="TransparentDecoder",
        weights=_weights(checkpoint),
        source=checkpoint,
        files=(checkpoint.path,),
        write=partial(_write_decoder, config, base.options.form),
        config=config,
        summary=_SUMMARIES["decoder"],
        about={"family": base.family.name},
        sizes=tuple(dict.fromkeys((*sizes, *turned))),
        attention=base.options.attention,
        layout=base.options.layout,
    )


def _write_decoder(config: TransparentDecoderConfig, form: Form, weights: Requests, size: Size) -> Program:
    """Write the decoder for the next size that it can have: pictures are padded and cut."""
    from glassine.models.transparency import transparent_decoder

    width, height = (-(-side // config.downscale) * config.downscale for side in size)
    return transparent_decoder(
        config, weights, height=height, width=width, attention=form.attention, layout=form.layout
    )


def _encoder(checkpoint: Checkpoint, file: TransparentFile, base: Base) -> Network:
    config = TransparentEncoderConfig(
        widths=tuple(_width(checkpoint, f"blocks.{2 * i}.weight") for i in range(8)),
        latent_channels=_width(checkpoint, "blocks.16.weight"),
    )
    scale = _DIFFUSERS_SCALE if "ld_diffusers" in checkpoint.path.stem.lower() else 1.0
    return Network(
        key="transparent_encoder",
        role="transparent_encoder",
        package="TransparentEncoder",
        weights=_weights(checkpoint),
        source=checkpoint,
        files=(checkpoint.path,),
        write=partial(_write_encoder, config),
        config=config,
        summary=_SUMMARIES["encoder"],
        about={
            "family": base.family.name,
            "offset_scale": scale if file.offset_scale is None else file.offset_scale,
        },
    )


def _write_encoder(config: TransparentEncoderConfig, weights: Requests, size: Size) -> Program:
    from glassine.models.transparency import transparent_encoder

    width, height = size
    return transparent_encoder(config, weights, height=height, width=width)


def _differences(checkpoint: Checkpoint, kind: Kind, file: TransparentFile, base: Base) -> Network:
    """A UNet with the differences of an SDXL file."""
    patch: Patch
    if _is_lora(checkpoint) and not any("::" in key for key in checkpoint.tensors):
        patch = lora_patches(LoraFile(file.path, file.strength), {"unet": base.unet})["unet"]
    else:
        patch = Differences(checkpoint, base.unet.shapes, Numbering(base.family.unet.layers + 1), file.strength)
    check_complete(checkpoint.path, patch.shapes, base.unet.shapes)
    unet = base.family.unet
    channels = patch.shapes.get("conv_in.weight", (0, unet.in_channels))[1]
    drawing = CONDITIONS[kind]
    if channels - unet.in_channels != 4 * len(drawing.conditions):
        raise ConversionError(
            f"{checkpoint.path}: makes {channels} input channels of the UNet's {unet.in_channels}; "
            f"{kind} draws with {4 + 4 * len(drawing.conditions)}: the model's UNet must be a plain one with 4"
        )
    config = replace(unet, in_channels=channels, condition_channels=channels - unet.in_channels)
    return _unet(checkpoint, kind, drawing, config, patch, file, base)


def _sharing(checkpoint: Checkpoint, kind: Kind, file: TransparentFile, base: Base) -> list[Network]:
    """A UNet with the attention sharing of an SD 1.5 file, and the control network of a conditional one."""
    if file.strength != 1.0:
        raise ConversionError(f"{checkpoint.path}: a patch of Stable Diffusion 1.5 has no strength; leave it at 1")
    patch = SharedFrames(checkpoint, base.family.unet, base.unet.shapes)
    drawing = FRAMES[kind]
    if patch.frames != len(drawing.frames):
        raise ConversionError(
            f"{checkpoint.path}: draws {patch.frames} frames, {kind} has {len(drawing.frames)}: {list(drawing.frames)}"
        )
    config = replace(base.family.unet, frames=patch.frames, frame_control=patch.controlled)
    networks = [_unet(checkpoint, kind, drawing, config, patch, file, base)]
    if patch.controlled:
        control = FrameControlConfig(frames=patch.frames, units=tuple(patch.units), widths=patch.widths)
        networks.append(
            Network(
                key=f"{kind}_control",
                role=f"{kind}_control",
                package=f"{kind.capitalize()}Control",
                weights=FileWeights(checkpoint, patch.control),
                source=checkpoint,
                files=(checkpoint.path,),
                write=partial(_write_control, control),
                config=control,
                summary="LayerDiffuse's control encoder: a picture becomes what it adds to a UNet's attentions.",
            )
        )
    return networks


def _write_control(config: FrameControlConfig, weights: Requests, size: Size) -> Program:
    from glassine.models.transparency import frame_control

    width, height = size
    return frame_control(config, weights, height=height, width=width)


def _unet(
    checkpoint: Checkpoint,
    kind: Kind,
    drawing: Drawing,
    config: UNetConfig,
    patch: Patch,
    file: TransparentFile,
    base: Base,
) -> Network:
    """The patched UNet, beside the plain one: a host switches between the two, and both have one weight.bin."""
    changed = frozenset(patch.shapes)
    return Network(
        key=f"{kind}_unet",
        role=f"{kind}_unet",
        package=f"{kind.capitalize()}Unet",
        weights=Patched(base.unet, [patch]),
        source=base.source,
        files=base.files,
        write=partial(write_unet, config, base.options.form),
        config=config,
        summary=_SUMMARIES[kind],
        about={
            "kind": kind,
            "frames": list(drawing.frames),
            "decoded": list(drawing.decoded),
            "conditions": list(drawing.conditions),
            "control": drawing.control,
            "strength": file.strength,
            "patch": checkpoint.path.name,
        },
        hashed={"patch_sha256": (checkpoint.path,)},
        beside="unet" if _fit_together(base, patch) else None,
        changed=changed,
        chunks=base.options.chunks,
        functions=base.options.functions,
        attention=base.options.attention,
        layout=base.options.layout,
    )


def with_control(networks: Sequence[Network], base: Base) -> list[Network]:
    """The patched UNets among `networks` with inputs for what control networks add, where there are such networks."""
    if not any(network.role == "control" for network in networks):
        return []
    there = {network.key for network in networks}
    return [
        controlled(network, base)
        for network in networks
        if "frames" in network.about and f"controlled_{network.key}" not in there and not network.config.residuals
    ]


def controlled(network: Network, base: Base) -> Network:
    """The UNet with inputs for what control networks add: the same weights, one weight.bin."""
    config = replace(network.config, residuals=True)
    return replace(
        network,
        key=f"controlled_{network.key}",
        role=f"controlled_{network.role}",
        package=f"Controlled{network.package}",
        write=partial(write_unet, config, base.options.form),
        config=config,
        beside=network.key,
        changed=frozenset(),
    )


def _fit_together(base: Base, patch: Patch) -> bool:
    """Whether base and patched UNet may have one weight.bin.

    Not where it would be larger than the Neural Engine takes and each alone is not, nor where the base is cut into
    chunks: a chunk's file is full as it is.
    """
    if base.options.chunks is not None and base.options.chunks > 1:
        return False

    def nbytes(shapes: Any) -> int:
        total = 0
        for shape in shapes:
            count = 2
            for size in shape:
                count *= size
            total += count
        return total

    plain = nbytes(base.unet.shapes.values())
    alone = nbytes({**base.unet.shapes, **patch.shapes}.values())
    if plain + nbytes(patch.shapes.values()) < _WEIGHT_FILE:
        return True
    return base.options.chunks == 1 and max(plain, alone) >= _WEIGHT_FILE


def write_unet(config: UNetConfig, form: Form, weights: Requests, size: Size) -> Program:
    """Write a UNet in a form; a call takes all frames of every row."""
    from glassine.models.unet import unet

    width, height = size
    return unet(
        config,
        weights,
        batch=form.rows * max(1, config.frames),
        height=height // 8,
        width=width // 8,
        tokens=form.tokens,
        attention=form.attention,
        layout=form.layout,
    )
