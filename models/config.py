"""What the networks are, in numbers: one frozen description per network and the families made of them.

A new family is a new constant here; a new kind of network is a new dataclass. Everything that differs between
Stable Diffusion checkpoints (depths, heads, extra channels, extra embeddings) is a field, never a subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    entries a level, up: `layers + 1`); 0 is a resnet without attention. `mid_depth` None means no mid block at all,
    `mid_resnets` 1 a single resnet there (some distilled models have one or the other). `heads` is per down level; the
    mid block uses the last, the up path the reverse.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    down_depths: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (1, 1), (0, 0))
    mid_depth: int | None = 1
    mid_resnets: int = 2
    up_depths: tuple[tuple[int, ...], ...] = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False
    norm_groups: int = 32
    time_ids: int | None = None  # SDXL base 6, refiner 5: the numbers of the micro-conditioning
    pooled_dim: int | None = None  # SDXL 1280: width of text_embeds
    timestep_cond_dim: int | None = None  # LCM 256: width of the guidance embedding
    projected_levels: tuple[int, ...] = ()  # where transformers have projections and no blocks (SDXL ControlNets -mid)
    residuals: bool = False  # inputs for what ControlNets add to the skips and the middle
    features: int = 0  # inputs for what T2I-Adapters add on the way down, one a level, then the middle
    condition_channels: int = 0  # of `in_channels`: clean latents, an input of their own (LayerDiffuse on SDXL 4 or 8)
    frames: int = 0  # pictures drawn together, row by row of a sample, by attention sharing (LayerDiffuse on SD 1.5)
    frame_control: bool = False  # inputs for what a picture that is given adds to every attention of every frame
    collage: int = 0  # layers, at most, whose words are drawn to where they lie (Collage Diffusion)

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
class ControlNetConfig:
    """A ControlNet (Zhang et al. 2023): the way down and the middle of a UNet, and an encoder of the hint.

    unet: the one it is a copy of; its way up means nothing. hint_widths: of the hint's encoder, which halves the
    picture between two. pooled: every residual is one vector for the whole picture (v1.1 shuffle). control_types: a
    ControlNet++ (Union 6, ProMax 8) is told what kind of hint it gets; `fusion_layers` work on its mean.
    """

    unet: UNetConfig
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    pooled: bool = False
    control_types: int | None = None
    fusion_layers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """A T2I-Adapter (Mou et al. 2023): convolutions that make the UNet's features of a hint, once a picture.

    shrink: pixels a side of one cell of the first feature (SDXL: 16). halved: which levels begin with half the size.
    layers: of each level. light: each level works at a quarter of its channels.
    """

    hint_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    shrink: int = 8
    halved: tuple[bool, ...] = (False, True, True, True)
    light: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TransparentDecoderConfig:
    """LayerDiffuse's decoder (Zhang and Agrawala 2024): a UNet over a picture, with its latent beside it at one eighth.

    attention: which levels of the way down attend; the way up mirrors them, the middle always does.
    """

    channels: tuple[int, ...] = (32, 32, 64, 128, 256, 512, 512)
    layers: int = 2
    attention: tuple[bool, ...] = (False, False, False, False, True, True, True)
    latent_channels: int = 4
    norm_groups: int = 4
    head_dim: int = 8

    def __post_init__(self) -> None:
        """Refuse numbers that describe no network (ConversionError)."""
        if len(self.attention) != len(self.channels) or len(self.channels) < 4:
            raise ConversionError(
                f"transparent decoder: {len(self.channels)} levels, attention said of {len(self.attention)}; expected "
                "four levels or more, as the latent joins the fourth"
            )
        for channels, attends in zip(self.channels, self.attention, strict=True):
            _check_divides("transparent decoder: norm_groups", self.norm_groups, channels)
            if attends:
                _check_divides("transparent decoder: head_dim", self.head_dim, channels)

    @property
    def downscale(self) -> int:
        """Pixels a side of one cell of the deepest level: 64 with seven levels."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class TransparentEncoderConfig:
    """LayerDiffuse's offset encoder: nine convolutions, the third, fifth and seventh with stride 2.

    widths: of all but the last.
    """

    widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128, 256, 256)
    latent_channels: int = 4

    def __post_init__(self) -> None:
        """Refuse another number of convolutions than nine (ConversionError)."""
        if len(self.widths) != 8:
            raise ConversionError(f"transparent encoder: {len(self.widths) + 1} convolutions, expected 9")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameControlConfig:
    """What a given picture adds to the attentions of a UNet whose frames share them, computed once a picture.

    widths: of the encoder's first eight convolutions; the last one is that of all its signals. units: every attention:
    its canonical name, its channels, and which signal it takes (0 is one eighth of the picture's size, 1 half of that).
    """

    frames: int
    units: tuple[tuple[str, int, int], ...]
    widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128, 256, 256)


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
    `added_tokens` of the `vocab_size` are behind CLIP's own: the rows of textual inversions.
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
    added_tokens: int = 0
    pad: int | None = None  # the token behind a prompt's end; None is the end token again

    def __post_init__(self) -> None:
        """Refuse heads that do not divide the width, and a skip that leaves no layer (ConversionError)."""
        _check_divides("text encoder: heads", self.heads, self.width)
        if not 0 <= self.skip < self.layers:
            raise ConversionError(f"text encoder: cannot skip {self.skip} of {self.layers} layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDecoderConfig:
    """TAESD's decoder: `blocks` before every doubling of the size, and before the last convolution."""

    channels: int = 64
    latent_channels: int = 4
    blocks: tuple[int, ...] = (3, 3, 3, 1)


Config = TypeVar(
    "Config",
    UNetConfig,
    ControlNetConfig,
    AdapterConfig,
    TransparentDecoderConfig,
    TransparentEncoderConfig,
    FrameControlConfig,
    VAEConfig,
    TextEncoderConfig,
)


def restored(kind: type[Config], record: Mapping[str, Any]) -> Config:
    """Return the description that `dataclasses.asdict` and JSON made of one.

    Raises:
        ConversionError: fields that this Glassine does not know, or numbers that describe no network.
    """

    def frozen(value: Any) -> Any:
        if isinstance(value, Mapping):  # the only description inside another one is a UNet
            return restored(UNetConfig, value)
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
    """The networks and constants that belong together under one name.

    text_encoders: in the order in which the UNet's context holds their states, side by side; text_roles are the parts
    they play (a refiner's only one is the second of the base). wide_vae: whether the VAE of the family is known to need
    more than fp16's range. size: pixels a side it was trained at.
    """

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    latent_scale: float
    prediction: Prediction
    size: int
    text_roles: tuple[str, ...] = ("text_encoder",)
    wide_vae: bool = False

    def text_encoder(self, role: str) -> TextEncoderConfig:
        """Return the encoder that plays `role`."""
        return self.text_encoders[self.text_roles.index(role)]


SD15 = Family(
    name="sd15",
    unet=UNetConfig(),
    vae=VAEConfig(),
    text_encoders=(TextEncoderConfig(),),
    latent_scale=0.18215,
    prediction="epsilon",
    size=512,
)

# OpenCLIP ViT-H without its last layer, which Stable Diffusion 2 does not read, and ViT-bigG.
OPEN_CLIP_H = TextEncoderConfig(width=1024, layers=23, heads=16, intermediate=4096, activation="gelu", pad=0)
OPEN_CLIP_BIGG = TextEncoderConfig(
    width=1280,
    layers=32,
    heads=20,
    intermediate=5120,
    activation="gelu",
    skip=1,
    final_norm=False,
    projection_dim=1280,
    pad=0,
)

SD2_BASE = Family(
    name="sd2",
    unet=UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
    vae=VAEConfig(),
    text_encoders=(OPEN_CLIP_H,),
    latent_scale=0.18215,
    prediction="epsilon",
    size=512,
)
SD21 = replace(SD2_BASE, prediction="v_prediction", size=768)

SDXL = Family(
    name="sdxl",
    unet=UNetConfig(
        channels=(320, 640, 1280),
        down_depths=((0, 0), (2, 2), (10, 10)),
        mid_depth=10,
        up_depths=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
        heads=(5, 10, 20),
        context_dim=2048,
        linear_projection=True,
        time_ids=6,
        pooled_dim=1280,
    ),
    vae=VAEConfig(),
    text_encoders=(TextEncoderConfig(skip=1, final_norm=False), OPEN_CLIP_BIGG),
    latent_scale=0.13025,
    prediction="epsilon",
    size=1024,
    text_roles=("text_encoder", "text_encoder_2"),
    wide_vae=True,
)

SDXL_REFINER = replace(
    SDXL,
    name="sdxl_refiner",
    unet=UNetConfig(
        channels=(384, 768, 1536, 1536),
        down_depths=((0, 0), (4, 4), (4, 4), (0, 0)),
        mid_depth=4,
        up_depths=((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)),
        heads=(6, 12, 24, 24),
        context_dim=1280,
        linear_projection=True,
        time_ids=5,
        pooled_dim=1280,
    ),
    text_encoders=(OPEN_CLIP_BIGG,),
    text_roles=("text_encoder_2",),
)

FAMILIES = {family.name: family for family in (SD15, SD2_BASE, SDXL, SDXL_REFINER)}
