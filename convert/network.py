"""What is to be converted: a folder's options, and one `Network` for each kind of package that goes into it.

A checkpoint is a list of networks; a ControlNet, a transparent decoder or a patched UNet is one more. What all further
networks have to fit is the `Base`: the checkpoint they come with, or the folder they are added to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from glassine.convert.checkpoint import Checkpoint
from glassine.convert.detect import Detected, FamilyName
from glassine.convert.extras import Extras
from glassine.convert.palettize import Palette
from glassine.convert.prediction import Distilled
from glassine.convert.program import Requests
from glassine.convert.weights import WeightSource
from glassine.errors import ConversionError
from glassine.models.config import Attention, Family, Layout, Prediction
from glassine.models.mil import Program

Role = Literal["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
Precision = Literal["float16", "float32"]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a network is written, besides what it is: rows and tokens of a UNet's call, a VAE's precision."""

    rows: int = 2
    tokens: int = 77
    attention: Attention = "split"
    layout: Layout = "channels_first"
    vae_precision: Precision = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to make of a checkpoint.

    sizes: (width, height) in pixels, multiples of 8; the first is the folder's own, each further one adds a UNet and a
        VAE that share the weights. Empty: the size the family was trained at.
    batch: rows per UNet call; 2 is one picture with guidance. None: 2, or 1 for a model drawn without guidance.
    tokens: of the UNet's context, a multiple of the text encoder's.
    chunks: packages to cut each UNet into, 1 for a whole one. None: for `attention` "split" the fewest that the Neural
        Engine can load (weight files below 2 GiB), else 1.
    palette: how the UNets and control networks store their weights in fewer bits; None: in fp16.
    functions: several sizes become functions of one package, which needs macOS 15; else they are packages that share
        their weight file by hard links.
    part: only this network ("vae": both ways).
    name: of the model; None takes the source's file name.
    family, prediction_type, distilled, vae_precision: override what the source says, see `detect` and `vae_range.py`.
    tokenizer: a folder with vocab.json and merges.txt, in the place of CLIP's.
    overwrite: replace a folder that Glassine made, once the new one is complete.
    dry_run: check everything and write nothing.
    extras: LoRAs and other weights that are laid over the checkpoint's.
    further: networks of other files: each function lists those of its files, for the base it is given.
    """

    sizes: tuple[Size, ...] = ()
    batch: int | None = None
    tokens: int = 77
    attention: Attention = "split"
    layout: Layout = "channels_first"
    chunks: int | None = None
    functions: bool = False
    palette: Palette | None = None
    part: Role | Literal["vae"] | None = None
    name: str | None = None
    family: FamilyName | None = None
    prediction_type: Prediction | None = None
    distilled: Distilled | None = None
    vae_precision: Precision | None = None
    tokenizer: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    extras: Extras = field(default_factory=Extras)
    further: tuple[Further, ...] = ()

    def __post_init__(self) -> None:
        for width, height in self.sizes:
            if width < 64 or height < 64 or width % 8 or height % 8:
                raise ConversionError(f"size {width}x{height}: width and height are multiples of 8, 64 or more")
        if len(set(self.sizes)) != len(self.sizes):
            raise ConversionError("the same size is asked for twice")
        if self.batch is not None and self.batch < 1:
            raise ConversionError(f"batch {self.batch}: expected 1 or more; 2 is one picture with guidance")
        if self.tokens < 1:
            raise ConversionError(f"tokens {self.tokens}: expected 77 or a multiple of it")

    def settled(self, detected: Detected) -> ConvertOptions:
        """Return the options with what nobody asked for as the model wants it."""
        size = detected.family.size
        guided = detected.defaults.get("guidance_scale", 0.0) != 1.0 and detected.family.unet.timestep_cond_dim is None
        return replace(
            self,
            sizes=self.sizes if self.sizes else ((size, size),),
            batch=self.batch if self.batch is not None else (2 if guided else 1),
            chunks=1 if self.chunks is None and self.attention != "split" else self.chunks,
        )

    @property
    def rows(self) -> int:
        """The batch of settled options."""
        assert self.batch is not None
        return self.batch

    @property
    def form(self) -> Form:
        """How settled options write networks."""
        return Form(rows=self.rows, tokens=self.tokens, attention=self.attention, layout=self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network to be written, as a package for every size.

    key: in the manifest, for the first size ("unet", "control:canny"); a further size adds "_768x512". role: what it
        does there. package: the file's stem, which takes the same suffix.
    weights: by canonical name; all of them are used, but for names that begin with one of `leaves`, which another
        network takes. source: what messages call them. files: what `Part.source_sha256` is the digest of.
    write: writes the graph for a size in pixels.
    config: the network's description, a dataclass of `glassine.models.config`.
    about: what only this kind of part has to say. hashed: further entries of `about` -> files of which they are the
        sha256.
    beside: the key of a network whose weight.bin this one lives in, hard-linked; it has that network's weights, but
        for the names in `changed`, which get records of their own. That network may itself live beside another.
    sizes: None means all of the folder's.
    attention, layout: the form it is written in; None where it has no choice.
    chunks: packages that it is cut into; None: the fewest that the Neural Engine can load.
    functions: all sizes in one package, as functions of it.
    palette: how its weights are stored in fewer bits; those who live in one weight.bin have the same.
    """

    key: str
    role: str
    package: str
    weights: WeightSource
    source: Checkpoint
    files: tuple[Path, ...]
    write: Callable[[Requests, Size], Program]
    config: Any
    summary: str
    about: Mapping[str, Any] = field(default_factory=dict)
    hashed: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    beside: str | None = None
    changed: frozenset[str] = frozenset()
    leaves: tuple[str, ...] = ()
    sizes: tuple[Size, ...] | None = None
    attention: Attention | None = None
    layout: Layout | None = None
    precision: str = "float16"
    chunks: int | None = 1
    functions: bool = False
    palette: Palette | None = None

    def with_palette(self, palette: Palette | None) -> Network:
        """Return the network with its weights in fewer bits, if it is of the large ones: a UNet or a control network.

        Text encoders and VAEs are a tenth of a model's size, and what they lose shows.
        """
        large = self.role in ("unet", "control") or self.role.endswith("_unet")
        return replace(self, palette=palette) if large else self


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that further networks are for.

    unet: its UNet's weights. source, files: where those come from. options: how its folder is written; `sizes` is never
    empty here.
    """

    family: Family
    unet: WeightSource
    source: Checkpoint
    files: tuple[Path, ...]
    options: ConvertOptions


Further = Callable[[Base], list[Network]]
