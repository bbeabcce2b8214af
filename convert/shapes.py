"""Shapes -> the description of each network: how wide, how deep, with how many heads, and which tensor decided.

All sizes come from shapes, so a small network of the same layout is read by the same code. Heads, groups of GroupNorm
and activations leave no trace in shapes: they come from a diffusers config.json, else from the header's
`__metadata__`, else from the family.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from glassine.convert.checkpoint import Checkpoint
from glassine.convert.names import Part
from glassine.convert.weights import WeightSource
from glassine.errors import CheckpointError, ConversionError
from glassine.models.config import Family, TextEncoderConfig, UNetConfig, VAEConfig

TIME_ID = 256  # numbers that each of SDXL's sizes becomes
_HEAD_DIM = 64  # of every family with linear projections: Stable Diffusion 2 and XL
_OTHER_CHANNELS = {
    5: "a depth model",
    7: "the x4 upscaler",
    12: "an IC-Light model",
    16: "a model with latents of 16 channels",
}
SAMPLE_CHANNELS: dict[int, tuple[tuple[str, int], ...]] = {
    4: (("latents", 4),),
    9: (("latents", 4), ("mask", 1), ("masked_image", 4)),  # inpainting
    8: (("latents", 4), ("image", 4)),  # instruct-pix2pix
}
SUPPORTED = (
    "Glassine converts Stable Diffusion 1.x, 2.x, XL and its refiner, their inpainting, instruct-pix2pix and LCM models"
)


class Shapes:
    """Shapes of one part by canonical name, remembering which tensor decided what."""

    def __init__(self, part: Part, weights: WeightSource, file: str = "the source") -> None:
        self.part = part
        self.reasons: dict[str, str] = {}
        self._weights = weights
        self._file = file

    def size(self, what: str, name: str, axis: int, rank: int | None = None) -> int:
        """The size of `name` along `axis`, which decides `what`."""
        shape = self._weights.shapes.get(name)
        if shape is None:
            raise ConversionError(
                f"{self._file}: the {self.part} has no {name}, which tells the {what}; it is incomplete"
            )
        if len(shape) <= axis or (rank is not None and len(shape) != rank):
            raise ConversionError(f"{self._weights.origin(name)} has shape {shape}, which tells no {what}")
        if shape[axis] < 1:
            raise ConversionError(f"{self._weights.origin(name)} has shape {shape}: no {what} at all; it is damaged")
        self.reasons.setdefault(f"{self.part} {what}", self.said(name))
        return shape[axis]

    def rank(self, name: str) -> int | None:
        """How many dimensions `name` has, or None."""
        shape = self._weights.shapes.get(name)
        return None if shape is None else len(shape)

    def said(self, name: str) -> str:
        """The tensor as a reason: its key and its shape."""
        return f'"{self._weights.key(name)}" {self._weights.shapes[name]}'

    def origin(self, name: str) -> str:
        """File and key of `name`."""
        return self._weights.origin(name)

    def count(self, pattern: str) -> int:
        """How many numbers 0, 1, 2 ... stand at the place of {} in names that begin so."""
        head, _, tail = pattern.partition("{}")
        number = 0
        while any(name.startswith(f"{head}{number}{tail}") for name in self._weights.shapes):
            number += 1
        return number

    def linear_projection(self) -> str | None:
        """The UNet's first projection into a transformer that is a matrix, or None: then all are convolutions."""
        names = (name for name in self._weights.shapes if name.endswith(".proj_in.weight"))
        return next((name for name in names if self.rank(name) == 2), None)

    def context(self) -> int | None:
        """How many numbers a token the UNet reads, or None where it reads no text."""
        name = next((n for n in self._weights.shapes if n.endswith("attn2.to_k.weight")), None)
        return None if name is None else self.size("context", name, 1, rank=2)


def read_unet(checkpoint: Checkpoint, shapes: Shapes, family: Family) -> UNetConfig:
    """Describe the UNet in `shapes`; what shapes cannot tell is the family's.

    Raises:
        CheckpointError: a UNet that Glassine cannot draw with.
        ConversionError: shapes that make no network.
    """
    config = checkpoint.configs.get("unet", {})
    levels = shapes.count("down_blocks.{}.resnets.")
    layers = shapes.count("down_blocks.0.resnets.{}.")
    in_channels = shapes.size("input channels", "conv_in.weight", 1, rank=4)
    if in_channels not in SAMPLE_CHANNELS:
        what = _OTHER_CHANNELS.get(in_channels, "a model with extra inputs")
        raise CheckpointError(
            f"{shapes.origin('conv_in.weight')} takes {in_channels} channels: this is {what}, "
            f"expected {', '.join(map(str, sorted(SAMPLE_CHANNELS)))}; {SUPPORTED}"
        )

    def depths(side: str, level: int, count: int) -> tuple[int, ...]:
        return tuple(
            shapes.count(f"{side}_blocks.{level}.attentions.{i}.transformer_blocks.{{}}.") for i in range(count)
        )

    mid_resnets = shapes.count("mid_block.resnets.{}.")
    channels = tuple(
        shapes.size(f"channels {level}", f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels)
    )
    context = shapes.context()
    linear = shapes.linear_projection() is not None
    groups = _number(checkpoint, "norm_groups", config.get("norm_num_groups"), UNetConfig().norm_groups)
    _check_divisible(checkpoint, "UNet channels", channels, "norm_groups", [groups] * levels)
    time_ids, pooled = (
        _micro_conditioning(checkpoint, shapes, family) if family.unet.time_ids is not None else (None, None)
    )
    guidance = "time_embedding.cond_proj.weight"
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes.size("output channels", "conv_out.weight", 0),
        channels=channels,
        layers=layers,
        down_depths=tuple(depths("down", level, layers) for level in range(levels)),
        mid_depth=shapes.count("mid_block.attentions.0.transformer_blocks.{}.") if mid_resnets else None,
        mid_resnets=mid_resnets if mid_resnets else 2,
        up_depths=tuple(depths("up", level, layers + 1) for level in range(levels)),
        heads=_heads(checkpoint, channels, linear=linear),
        context_dim=family.unet.context_dim if context is None else context,
        linear_projection=linear,
        norm_groups=groups,
        time_ids=time_ids,
        pooled_dim=pooled,
        timestep_cond_dim=shapes.size("guidance embedding", guidance, 1) if shapes.rank(guidance) else None,
    )


def _heads(checkpoint: Checkpoint, channels: tuple[int, ...], *, linear: bool) -> tuple[int, ...]:
    """Heads a level: eight everywhere in Stable Diffusion 1, of 64 channels each in 2 and XL."""
    config = checkpoint.configs.get("unet", {})
    # diffusers calls the number of heads attention_head_dim in every config older than num_attention_heads.
    said = config.get("num_attention_heads")
    said = config.get("attention_head_dim") if said is None else said
    by_width = [max(1, width // _HEAD_DIM) for width in channels]
    heads = _numbers(checkpoint, "heads", said, by_width if linear else UNetConfig().heads[0])
    heads = heads * len(channels) if len(heads) == 1 else heads
    _check_divisible(checkpoint, "UNet channels", channels, "heads", heads)
    return tuple(heads)


def time_id_count(shapes: Shapes, pooled: int | None) -> int:
    """How many sizes an SDXL UNet reads beside the pooled text: 6 in the base, 5 in the refiner.

    pooled: the width of the pooled text where the text encoder is there and says so. A UNet alone leaves two readings;
    it is a refiner if it then reads a context as wide as the pooled text, from one encoder alone.

    Raises:
        ConversionError: the width fits neither.
    """
    name = "add_embedding.linear_1.weight"
    width = shapes.size("micro-conditioning", name, 1, rank=2)
    if pooled is None:
        return 5 if width - 5 * TIME_ID == shapes.context() else 6
    for count in (6, 5):
        if width == pooled + count * TIME_ID:
            return count
    raise ConversionError(
        f"{shapes.origin(name)} reads {width} numbers; expected the pooled text's {pooled} and {TIME_ID} for each of "
        "6 sizes (SDXL) or 5 (its refiner): UNet and text encoder are not of one model"
    )


def _micro_conditioning(checkpoint: Checkpoint, shapes: Shapes, family: Family) -> tuple[int, int]:
    name = "add_embedding.linear_1.weight"
    count = family.unet.time_ids
    assert count is not None
    pooled = shapes.size("micro-conditioning", name, 1, rank=2) - count * TIME_ID
    if pooled < 1:
        raise ConversionError(f"{checkpoint.path}: {shapes.said(name)} leaves no room for pooled text")
    return count, pooled


def read_vae(checkpoint: Checkpoint, shapes: Shapes) -> VAEConfig:
    """Describe the VAE in `shapes`.

    Raises:
        CheckpointError: the VAE of another kind of model.
        ConversionError: shapes that make no network.
    """
    config = checkpoint.configs.get("vae", {})
    levels = shapes.count("encoder.down_blocks.{}.resnets.")
    channels = tuple(
        shapes.size(f"channels {level}", f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0)
        for level in range(levels)
    )
    groups = _number(checkpoint, "norm_groups", config.get("norm_num_groups"), VAEConfig().norm_groups)
    _check_divisible(checkpoint, "VAE channels", channels, "norm_groups", [groups] * levels)
    if levels != len(VAEConfig().channels):
        raise ConversionError(f"{checkpoint.path}: a VAE of {levels} levels; one of Stable Diffusion has 4 (8x)")
    latent = shapes.size("latent channels", "post_quant_conv.weight", 0)
    if latent != VAEConfig().latent_channels:
        raise CheckpointError(
            f"{shapes.origin('post_quant_conv.weight')}: latents of {latent} channels, expected 4; {SUPPORTED}"
        )
    return VAEConfig(
        channels=channels,
        layers=shapes.count("encoder.down_blocks.0.resnets.{}."),
        latent_channels=latent,
        norm_groups=groups,
    )


def read_text_encoder(checkpoint: Checkpoint, shapes: Shapes, like: TextEncoderConfig) -> TextEncoderConfig:
    """Describe the text encoder in `shapes`; `like` is the family's in the same role."""
    config = checkpoint.configs.get(shapes.part, {})
    number = shapes.part.removeprefix("text_encoder")  # "" or "_2"
    table = "text_model.embeddings.token_embedding.weight"
    width = shapes.size("width", table, 1, rank=2)
    heads = _number(checkpoint, f"text_heads{number}", config.get("num_attention_heads"), max(1, width // 64))
    _check_divisible(checkpoint, "text encoder width", [width], f"text_heads{number}", [heads])
    activation = config.get("hidden_act", checkpoint.metadata.get(f"glassine.activation{number}", like.activation))
    if activation not in ("quick_gelu", "gelu"):  # a list, as a config may hold things that no set can look up
        raise ConversionError(f"{checkpoint.path}: activation {activation!r}, expected quick_gelu or gelu")
    projection = None
    if like.projection_dim is not None:
        projection = shapes.size("pooled text", "text_projection.weight", 0, rank=2)
    return TextEncoderConfig(
        vocab_size=shapes.size("vocabulary", table, 0),
        tokens=shapes.size("tokens", "text_model.embeddings.position_embedding.weight", 0),
        width=width,
        layers=shapes.count("text_model.encoder.layers.{}."),
        heads=heads,
        intermediate=shapes.size("inner width", "text_model.encoder.layers.0.mlp.fc1.weight", 0),
        activation=activation,
        skip=like.skip,
        final_norm=like.final_norm,
        projection_dim=projection,
        pad=like.pad,
    )


def _number(checkpoint: Checkpoint, key: str, config: Any, default: int) -> int:
    numbers = _numbers(checkpoint, key, config, default)
    if len(numbers) != 1:
        raise ConversionError(f"{checkpoint.path}: {key} is {numbers}, expected one number")
    return numbers[0]


def _numbers(checkpoint: Checkpoint, key: str, config: Any, default: int | list[int]) -> list[int]:
    """A config.json's value, else `glassine.<key>` of the header's metadata, else the default."""
    text = checkpoint.metadata.get(f"glassine.{key}")
    value: Any = config if config is not None else text.split(",") if text is not None else default
    try:
        numbers = [int(number) for number in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConversionError(f"{checkpoint.path}: {key} is {value!r}, expected a positive number or several")
    return numbers


def _check_divisible(checkpoint: Checkpoint, what: str, sizes: Collection[int], key: str, by: Collection[int]) -> None:
    if len(sizes) != len(by) or any(size % number for size, number in zip(sizes, by, strict=True)):
        raise ConversionError(
            f"{checkpoint.path}: {what} {tuple(sizes)} cannot be divided by {key} {tuple(by)}; "
            f'if the file is right, say what it is in its metadata ("glassine.{key}")'
        )
