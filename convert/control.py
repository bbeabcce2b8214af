"""Control files -> networks of a folder: what each is, whether it fits the base, and UNets that take what it gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from glassine.convert.control_files import ControlFile, open_control
from glassine.convert.network import Base, Form, Network, Size
from glassine.convert.program import Requests
from glassine.convert.shapes import TIME_ID, Shapes
from glassine.errors import CheckpointError, ConversionError
from glassine.models.config import AdapterConfig, ControlNetConfig, UNetConfig
from glassine.models.mil import Program

# What the hint of a ControlNet++ may be, in the order of its ids; ProMax has the last two as well.
CONTROL_TYPES = ("openpose", "depth", "soft_edge", "hard_edge", "normal", "segment", "tile", "inpaint")

# A word of the file's name -> the preprocessor whose pictures it was trained on; the first that matches.
_PREPROCESSORS = (
    ("canny", "canny"),
    ("mlsd", None),  # straight lines: there is none for them
    ("depth", "depth"),
    ("normal", "normal"),
    ("inpaint", "inpaint"),
    ("lineart", "lineart"),
    ("pose", "pose"),
    ("scribble", "scribble"),
    ("sketch", "scribble"),
    ("softedge", "softedge"),
    ("hed", "softedge"),
    ("pidi", "softedge"),
    ("seg", "segment"),
    ("shuffle", "shuffle"),
    ("ip2p", "none"),
    ("tile", "tile"),
    ("blur", "blur"),
    ("recolor", "luminance"),
    ("gray", "luminance"),
    ("color", "grid"),
)
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Control:
    """One control file to convert.

    name: in the folder; None takes the file's. batch: rows of a call; None takes the UNet's.
    """

    path: Path
    name: str | None = None
    batch: int | None = None


def control_networks(controls: Sequence[Control], base: Base) -> list[Network]:
    """List what the control files add to the folder of `base`: a network each, and the UNets that take their results.

    Raises:
        CheckpointError: a file cannot be read, is no control file, or is for another family than the base.
        ConversionError: keys are left over, shapes make no network, or two nets have one name.
    """
    networks: list[Network] = []
    for control in controls:
        file = open_control(control.path, base.unet)
        network = (
            _adapter(file, _name(control), base) if file.kind == "t2i_adapter" else _controlnet(file, control, base)
        )
        if network.key in {other.key for other in networks}:
            raise ConversionError(f"{control.path}: a second {network.key}; give it another name")
        networks.append(network)
        if file.kind == "union":
            networks.append(_union_hint(network, base))
    if any(network.role == "control" for network in networks):
        networks.append(steered_unet(base, "controlled_unet", "ControlledUnet", residuals=True))
    features = max((len(n.config.channels) for n in networks if n.role == "adapter"), default=0)
    if features:
        networks.append(steered_unet(base, "adapted_unet", "AdaptedUnet", residuals=True, features=features))
    return networks


def steered_unet(base: Base, key: str, package: str, **steering: Any) -> Network:
    """The base's UNet with inputs for control: other inputs, the same weights, one weight.bin."""
    config = replace(base.family.unet, **steering)
    return Network(
        key=key,
        role=key,
        package=package,
        weights=base.unet,
        source=base.source,
        files=base.files,
        write=partial(_write_unet, config, base.options.form),
        config=config,
        summary="Stable Diffusion's UNet with inputs for what control networks add.",
        beside="unet",
        chunks=base.options.chunks,
        attention=base.options.attention,
        layout=base.options.layout,
    )


def _write_unet(config: UNetConfig, form: Form, weights: Requests, size: Size) -> Program:
    from glassine.models.unet import unet

    return unet(config, weights, **_arguments(form, size))


def _arguments(form: Form, size: Size) -> dict[str, Any]:
    width, height = size
    return {
        "batch": form.rows,
        "height": height // 8,
        "width": width // 8,
        "tokens": form.tokens,
        "attention": form.attention,
        "layout": form.layout,
    }


def _name(control: Control) -> str:
    """What the net is called in the folder."""
    if control.name is None:
        path = control.path.absolute()
        stem = path.name if path.is_dir() else path.stem
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("_.")
    else:
        name = control.name
    if not _NAME.fullmatch(name) or re.search(r"_\d+x\d+$", name):
        raise ConversionError(
            f"{control.path}: {name!r} cannot be the name of a control network; expected letters, digits, ., _ and -, "
            "and no size at the end: give it one with --name"
        )
    return name


def _about(file: ControlFile, name: str, base: Base, **said: Any) -> dict[str, Any]:
    words = f"{file.checkpoint.path.stem} {name}".lower()
    about: dict[str, Any] = {
        "kind": file.kind,
        "family": base.family.name,
        "preprocessor": next((what for word, what in _PREPROCESSORS if word in words), None),
        "control_types": [],
        "global_pooling": False,
    }
    return about | said


def _controlnet(file: ControlFile, control: Control, base: Base) -> Network:
    name = _name(control)
    options = base.options if control.batch is None else replace(base.options, batch=control.batch)
    config = read_controlnet(file, name, base)
    types = list(CONTROL_TYPES[: config.control_types]) if config.control_types is not None else []
    about = _about(file, name, base, hint_channels=config.hint_channels)
    about |= {"control_types": types, "global_pooling": config.pooled, "layout": file.layout}
    return Network(
        key=f"control:{name}",
        role="control",
        package=f"ControlNet_{name}",
        weights=file.weights,
        source=file.checkpoint,
        files=tuple(file.checkpoint.files),
        write=partial(_write_controlnet, config, options.form),
        config=config,
        summary="A ControlNet: what a picture of edges, depth, poses ... adds to Stable Diffusion's UNet.",
        about=about,
        attention=base.options.attention,
        layout=base.options.layout,
    )


def _write_controlnet(config: ControlNetConfig, form: Form, weights: Requests, size: Size) -> Program:
    from glassine.models.controlnet import controlnet

    return controlnet(config, weights, **_arguments(form, size))


def _union_hint(net: Network, base: Base) -> Network:
    """What makes one hint of a ControlNet++ ready, on the weights of the net's own file that it alone reads."""
    return replace(
        net,
        key=net.key.replace("control:", "hint:"),
        role="hint",
        package=net.package.replace("ControlNet_", "ControlHint_"),
        write=partial(_write_union_hint, net.config, base.options.form),
        summary="What a ControlNet++ makes of one hint, once a picture.",
        about={},
    )


def _write_union_hint(config: ControlNetConfig, form: Form, weights: Requests, size: Size) -> Program:
    from glassine.models.controlnet import union_hint

    said = _arguments(form, size)
    return union_hint(config, weights, **{name: said[name] for name in ("height", "width", "attention", "layout")})


def read_controlnet(file: ControlFile, name: str, base: Base) -> ControlNetConfig:
    """Describe a ControlNet by its shapes; heads and groups, which they cannot tell, are those of the UNet it copies.

    Raises:
        CheckpointError: it is for another family than the base.
        ConversionError: shapes that make no network.
    """
    shapes = Shapes("unet", file.weights)
    hint = "controlnet_cond_embedding"
    stages = shapes.count(f"{hint}.blocks.{{}}.") // 2
    half = _half(shapes, base.family.unet)
    _check_fits(file, half, shapes, base)
    return ControlNetConfig(
        unet=half,
        hint_channels=shapes.size("channels of the hint", f"{hint}.conv_in.weight", 1, rank=4),
        hint_widths=(
            shapes.size("hint encoder", f"{hint}.conv_in.weight", 0, rank=4),
            *(shapes.size("hint encoder", f"{hint}.blocks.{2 * i + 1}.weight", 0, rank=4) for i in range(stages)),
        ),
        pooled=_is_pooled(file, name),
        control_types=shapes.size("control types", "task_embedding", 0, rank=2) if file.kind == "union" else None,
        fusion_layers=max(1, shapes.count("transformer_layes.{}.")),
    )


def _half(shapes: Shapes, like: UNetConfig) -> UNetConfig:
    """The way down and the middle, as the UNet `like` where shapes say nothing."""
    levels = shapes.count("down_blocks.{}.resnets.")
    layers = shapes.count("down_blocks.0.resnets.{}.")
    blocks = "attentions.{}.transformer_blocks.{{}}."
    context = shapes.context()
    reads_sizes = shapes.rank("add_embedding.linear_1.weight") is not None
    down = tuple(
        tuple(shapes.count(f"down_blocks.{level}.{blocks.format(i)}") for i in range(layers)) for level in range(levels)
    )
    return replace(
        like,
        in_channels=shapes.size("input channels", "conv_in.weight", 1, rank=4),
        channels=tuple(
            shapes.size(f"channels {i}", f"down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels)
        ),
        layers=layers,
        down_depths=down,
        projected_levels=tuple(
            level
            for level in range(levels)
            if not any(down[level]) and shapes.rank(f"down_blocks.{level}.attentions.0.proj_in.weight") is not None
        ),
        mid_depth=shapes.count("mid_block.attentions.0.transformer_blocks.{}."),
        mid_resnets=max(1, shapes.count("mid_block.resnets.{}.")),
        up_depths=((0,) * (layers + 1),) * levels,
        heads=(*like.heads, *[like.heads[-1]] * levels)[:levels],
        context_dim=like.context_dim if context is None else context,
        linear_projection=shapes.linear_projection() is not None,
        time_ids=like.time_ids if reads_sizes else None,
        pooled_dim=like.pooled_dim if reads_sizes else None,
        timestep_cond_dim=None,
    )


def _is_pooled(file: ControlFile, name: str) -> bool:
    """Whether residuals are means over the picture: only a name says so, or a folder's config.json."""
    said = file.config.get("global_pool_conditions")
    return bool(said) if said is not None else "shuffle" in f"{file.checkpoint.path.stem} {name}".lower()


def _check_fits(file: ControlFile, half: UNetConfig, shapes: Shapes, base: Base) -> None:
    """Refuse a net of another family than the base's."""
    theirs = base.family.unet
    reads = shapes.context()
    sizes = "add_embedding.linear_1.weight"
    width = shapes.size("micro-conditioning", sizes, 1, rank=2) if shapes.rank(sizes) is not None else None
    wanted = (
        None if theirs.pooled_dim is None or theirs.time_ids is None else theirs.pooled_dim + TIME_ID * theirs.time_ids
    )
    fits = (
        (half.channels, half.layers) == (theirs.channels, theirs.layers)
        and reads in {None, theirs.context_dim}
        and width == wanted
        and half.in_channels <= theirs.in_channels
    )
    if not fits:
        raise CheckpointError(
            f"{file.checkpoint.path}: this ControlNet is for {_family(half.channels, reads, width)}, "
            f"the base {base.source.path} is {_family(theirs.channels, theirs.context_dim, wanted)}; "
            "choose a base of the net's own family"
        )


def _family(channels: tuple[int, ...], context: int | None, micro: int | None) -> str:
    """A family in words and numbers."""
    names = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    name = "Stable Diffusion XL" if micro is not None else names.get(0 if context is None else context, "a UNet")
    text = "no text" if context is None else f"text of {context} numbers a token"
    return f"{name} (channels {', '.join(map(str, channels))}; {text})"


def _adapter(file: ControlFile, name: str, base: Base) -> Network:
    config = read_adapter(file, base)
    return Network(
        key=f"adapter:{name}",
        role="adapter",
        package=f"Adapter_{name}",
        weights=file.weights,
        source=file.checkpoint,
        files=tuple(file.checkpoint.files),
        write=partial(_write_adapter, config),
        config=config,
        summary="A T2I-Adapter: what a picture of edges, depth, poses ... adds on the way down of the UNet.",
        about=_about(file, name, base, hint_channels=config.hint_channels),
    )


def _write_adapter(config: AdapterConfig, weights: Requests, size: Size) -> Program:
    from glassine.models.adapter import adapter

    width, height = size
    if width % config.shrink or height % config.shrink:
        raise ConversionError(
            f"size {width}x{height}: the adapter makes one cell of {config.shrink}x{config.shrink} pixels; "
            f"it needs multiples of {config.shrink}"
        )
    return adapter(config, weights, height=height // 8, width=width // 8)


def read_adapter(file: ControlFile, base: Base) -> AdapterConfig:
    """Describe a T2I-Adapter by its shapes and by the features that the base's UNet takes.

    Raises:
        CheckpointError: it is for another family than the base.
        ConversionError: shapes that make no network.
    """
    from glassine.models.unet import feature_shapes

    shapes = Shapes("unet", file.weights)
    levels = shapes.count("adapter.body.{}.")
    light = shapes.rank("adapter.body.0.out_conv.weight") is not None
    cells = shapes.size("cells", "adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight", 1, rank=4)
    inner = "out_conv" if light else "resnets.0.block1"
    channels = tuple(shapes.size(f"channels {i}", f"adapter.body.{i}.{inner}.weight", 0) for i in range(levels))
    grid = 64  # cells a side of some latents; only ratios count
    features = feature_shapes(replace(base.family.unet, features=levels), grid, grid)
    rows = [feature[1] for feature in features]
    shrink = 8 * grid // rows[0]
    hint_channels, rest = divmod(cells, shrink**2)
    if rest or hint_channels not in {1, 3} or channels != tuple(feature[0] for feature in features):
        theirs = base.family.unet
        raise CheckpointError(
            f"{file.checkpoint.path}: this T2I-Adapter turns pictures into {cells} channels, then {channels}; the base "
            f"{base.source.path} is {_family(theirs.channels, theirs.context_dim, theirs.pooled_dim)} and takes "
            f"{shrink**2} or {3 * shrink**2}, then {tuple(feature[0] for feature in features)}; "
            "choose a base of the adapter's own family"
        )
    return AdapterConfig(
        hint_channels=hint_channels,
        channels=channels,
        layers=shapes.count("adapter.body.0.resnets.{}."),
        shrink=shrink,
        halved=tuple(i > 0 and rows[i] < rows[i - 1] for i in range(levels)),
        light=light,
    )
