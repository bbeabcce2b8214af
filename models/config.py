"""What the networks are, in numbers: one frozen description per network and the families made of them.

A new family is a new constant here; a new kind of network is a new dataclass. Everything that differs between
Stable Diffusion checkpoints (depths, heads, extra channels, extra embeddings) is a field, never a subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from glassine.errors import ConversionError

Attention = Literal["split", "einsum", "sdpa"]
Layout = Literal["channels_first", "channels_last"]
Activation = Literal["quick_gelu", "gelu"]
Prediction = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """A Stable Diffusion UNet.

    `*_depths` count the transformer blocks behind each resnet, level by level in the order they run (down: `layers`
    entries a level, up: `layers + 1`); 0 is a resnet without attention. `mid_depth` None means no mid block at all
    (some distilled SDXL models). `heads` is per down level; the mid block uses the last, the up path the reverse.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    down_depths: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (1, 1), (0, 0))
    mid_depth: int | None = 1
    up_depths: tuple[tuple[int, ...], ...] = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False
    norm_groups: int = 32
    time_ids: int | None = None  # SDXL base 6, refiner 5: the numbers of the micro-conditioning
    pooled_dim: int | None = None  # SDXL 1280: width of text_embeds
    timestep_cond_dim: int | None = None  # LCM 256: width of the guidance embedding

    def __post_init__(self) -> None:
        """Refuse numbers that describe no network.

        Raises:
            ConversionError: fields that disagree about the levels, or heads or groups that do not divide the channels.
        """
        for field in ("down_depths", "up_depths", "heads"):
            if len(getattr(self, field)) != len(self.channels):
                raise ConversionError(
                    f"UNet: {field} is {getattr(self, field)}, channels is {self.channels}: not a level each"
                )
        if (self.time_ids is None) != (self.pooled_dim is None):
            raise ConversionError(f"UNet: time_ids is {self.time_ids} and pooled_dim {self.pooled_dim}; SDXL has both")
        for level, channels in enumerate(self.channels):
            _check_divides("UNet: norm_groups", self.norm_groups, channels)
            last = level == len(self.channels) - 1
            if any(self.down_depths[level]) or any(self.up_depths[-1 - level]) or (last and self.mid_depth):
                _check_divides("UNet: heads", self.heads[level], channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """AutoencoderKL: pictures (B, 3, H, W) in [-1, 1] <-> latents (B, latent_channels, H/8, W/8)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    norm_groups: int = 32

    def __post_init__(self) -> None:
        """Refuse groups that do not divide the channels (ConversionError)."""
        for channels in self.channels:
            _check_divides("VAE: norm_groups", self.norm_groups, channels)

    @property
    def downscale(self) -> int:
        """Pixels a side of one latent cell: 8 with four levels."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """A CLIP text transformer.

    `skip` counts the layers left out at the end (A1111 clip skip 2 is `skip=1`); `final_norm` says whether the hidden
    state passes the final LayerNorm (SDXL: no). `projection_dim` is the width of the projected pooled output or None.
    """

    vocab_size: int = 49408
    tokens: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    activation: Activation = "quick_gelu"
    skip: int = 0
    final_norm: bool = True
    projection_dim: int | None = None

    def __post_init__(self) -> None:
        """Refuse heads that do not divide the width, and a skip that leaves no layer (ConversionError)."""
        _check_divides("text encoder: heads", self.heads, self.width)
        if not 0 <= self.skip < self.layers:
            raise ConversionError(f"text encoder: cannot skip {self.skip} of {self.layers} layers")


Config = TypeVar("Config", UNetConfig, VAEConfig, TextEncoderConfig)


def restored(kind: type[Config], record: Mapping[str, Any]) -> Config:
    """Return the description that `dataclasses.asdict` and JSON made of one.

    Raises:
        ConversionError: fields that this Glassine does not know, or numbers that describe no network.
    """

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    try:
        return kind(**{name: frozen(value) for name, value in record.items()})
    except TypeError as error:
        raise ConversionError(f"{kind.__name__}: not its fields ({error}); convert the model again") from None


def _check_divides(what: str, divisor: int, channels: int) -> None:
    if divisor < 1 or channels % divisor:
        raise ConversionError(f"{what} is {divisor}, which does not divide a level's {channels} channels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The networks and constants that belong together under one name."""

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    latent_scale: float
    prediction: Prediction
    size: int  # pixels a side the family was trained at


SD15 = Family(
    name="sd15",
    unet=UNetConfig(),
    vae=VAEConfig(),
    text_encoders=(TextEncoderConfig(),),
    latent_scale=0.18215,
    prediction="epsilon",
    size=512,
)
