"""Checkpoint -> folder of packages: detect, write the graphs, check every weight, copy them, write down what it is."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glassine import __version__
from glassine.convert.checkpoint import Checkpoint, open_checkpoint, shorten
from glassine.convert.detect import Detected, detect
from glassine.convert.digest import digests
from glassine.convert.names import Part as SourcePart
from glassine.convert.package import check_space, replacing, write_files
from glassine.convert.program import Description, Lowered, Requests, lower
from glassine.convert.vocabulary import MERGES, VOCABULARY, tokenizer_files
from glassine.errors import CheckpointError, ConversionError, PackageError
from glassine.manifest import FILE_NAME, Manifest, Part
from glassine.models.config import Attention, Family, Layout, Prediction, TextEncoderConfig, UNetConfig, VAEConfig

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Program

Role = Literal["text_encoder", "unet", "vae_decoder", "vae_encoder"]
Size = tuple[int, int]

# The names that Apple's Swift pipeline looks for once each package has been compiled.
PACKAGES: dict[Role, str] = {
    "text_encoder": "TextEncoder",
    "unet": "Unet",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
_SOURCES: dict[Role, SourcePart] = {
    "text_encoder": "text_encoder",
    "unet": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}
_SUMMARIES: dict[Role, str] = {
    "text_encoder": "Stable Diffusion's text encoder: the tokens of a prompt become what the UNet reads.",
    "unet": "Stable Diffusion's UNet: predicts the noise in a latent picture at one time of the diffusion.",
    "vae_decoder": "Stable Diffusion's decoder: a latent becomes a picture.",
    "vae_encoder": "Stable Diffusion's encoder: a picture becomes the moments of its latent.",
}
_FEATURES = {
    "input_ids": "The token ids of the prompt, padded to this length.",
    "last_hidden_state": "One vector a token.",
    "pooled_outputs": "One vector for the whole prompt.",
    "hidden_states": "One vector a token after every layer, for a choice of clip skip.",
    "sample": "The noisy latents; the first half of the batch without, the second with guidance.",
    "timestep": "The time of the diffusion, 0 (clean) to 999 (noise).",
    "encoder_hidden_states": "The encoded prompt, (batch, width, 1, tokens).",
    "noise_pred": "What the model predicts of the noise.",
    "z": "A clean latent, divided by the latent scale.",
    "image": "The picture, RGB, -1 to 1.",
    "x": "The picture, RGB, -1 to 1.",
    "latent": "Mean and logarithm of the variance of the latent, not multiplied by the latent scale.",
}
_LONGEST_AXIS = 16384  # of the Neural Engine, for which `split` is written


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to make of a checkpoint.

    sizes: (width, height) in pixels, multiples of 8; the first is the folder's own, each further one adds a UNet and a
        VAE that share the weights. Empty: the size the family was trained at.
    batch: rows per UNet call; 2 is one picture with guidance. tokens: of the UNet's context, a multiple of the text
        encoder's.
    part: only this network ("vae": both ways).
    name: of the model; None takes the source's file name.
    prediction_type: overrides what the source says.
    tokenizer: a folder with vocab.json and merges.txt, in the place of CLIP's.
    overwrite: replace a folder that Glassine made, once the new one is complete.
    dry_run: check everything and write nothing.
    """

    sizes: tuple[Size, ...] = ()
    batch: int = 2
    tokens: int = 77
    attention: Attention = "split"
    layout: Layout = "channels_first"
    part: Role | Literal["vae"] | None = None
    name: str | None = None
    prediction_type: Prediction | None = None
    tokenizer: Path | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for width, height in self.sizes:
            if width < 64 or height < 64 or width % 8 or height % 8:
                raise ConversionError(f"size {width}x{height}: width and height are multiples of 8, 64 or more")
        if len(set(self.sizes)) != len(self.sizes):
            raise ConversionError("the same size is asked for twice")
        if self.batch < 1:
            raise ConversionError(f"batch {self.batch}: expected 1 or more; 2 is one picture with guidance")
        if self.tokens < 1:
            raise ConversionError(f"tokens {self.tokens}: expected 77 or a multiple of it")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: `done` of `total` steps (stage "graphs") or bytes (stage "weights") of `package`."""

    stage: Literal["graphs", "weights"]
    package: str
    done: int
    total: int


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """One package to be written."""

    role: Role
    name: str
    size: Size
    lowered: Lowered

    @property
    def file(self) -> str:
        return f"{self.name}.mlpackage"


def convert_checkpoint(
    source: Path, out: Path, options: ConvertOptions | None = None, report: Report | None = None
) -> Manifest:
    """Convert a checkpoint to a folder of .mlpackage files.

    Args:
        source: a .safetensors file, or a diffusers folder or one of its parts.
        out: the folder to make; complete or not at all.
        options: see `ConvertOptions`.
        report: called often, from this thread.

    Returns:
        What was written to glassine.json (`source_sha256` is empty after a dry run).

    Raises:
        CheckpointError: the source cannot be read, or is not Stable Diffusion 1.x.
        ConversionError: weights are missing, left over, of wrong shape, not finite or too large for fp16.
        PackageError: `out` is in the way, cannot be written, or the disk is too full.
    """
    options = ConvertOptions() if options is None else options
    report = _silent if report is None else report
    checkpoint = open_checkpoint(source)
    detected = detect(checkpoint, options.prediction_type)
    roles = _roles(checkpoint, detected, options)
    _check_out(out, options)
    texts = _texts(checkpoint, detected, options) if "text_encoder" in roles else {}
    with digests(checkpoint, {_SOURCES[role] for role in roles}, skip=options.dry_run) as digest:
        with _collector_off():
            packages = _plan(checkpoint, detected, roles, options, report)
        if options.dry_run:
            return _manifest(checkpoint, detected, packages, options, {})
        with replacing(out, overwrite=options.overwrite) as fresh:
            check_space(fresh, _bytes_needed(packages))
            _write(fresh, packages, detected, report)
            for name, content in texts.items():
                (fresh / name).write_bytes(content)
            manifest = _manifest(checkpoint, detected, packages, options, digest())
            manifest.write(fresh)
    return manifest


def _silent(progress: Progress) -> None:
    """Report to nobody."""


def _roles(checkpoint: Checkpoint, detected: Detected, options: ConvertOptions) -> list[Role]:
    """The networks to convert, in the order a picture meets them."""
    wanted = [role for role in PACKAGES if options.part in {None, role} or role.startswith(f"{options.part}_")]
    missing = sorted({_SOURCES[role] for role in wanted} - set(detected.parts))
    if missing:
        present = ", ".join(sorted(detected.parts))
        raise CheckpointError(
            f"{checkpoint.path}: there is no {' and no '.join(missing)} in here, only {present}; "
            "convert what there is with --part, or take a complete checkpoint"
        )
    return wanted


def _check_out(out: Path, options: ConvertOptions) -> None:
    """Refuse before any work what would be refused, or lost, after it: only a folder of ours is ever replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not options.overwrite:
        raise PackageError(f"{out}: exists; choose another folder or pass --overwrite to replace it")
    if not (out / FILE_NAME).is_file():
        raise PackageError(f"{out}: has no {FILE_NAME}, so Glassine did not make it and does not replace it")
    packages = rf"({'|'.join(PACKAGES.values())})(_\d+x\d+)?\.(mlpackage|mlmodelc)"
    texts = {FILE_NAME, VOCABULARY, MERGES, ".DS_Store"}
    strangers = sorted(
        entry.name for entry in out.iterdir() if entry.name not in texts and not re.fullmatch(packages, entry.name)
    )
    if strangers:
        raise PackageError(f"{out}: also holds {shorten(strangers)}, which would be lost; move it away first")


def _texts(checkpoint: Checkpoint, detected: Detected, options: ConvertOptions) -> dict[str, bytes]:
    return tokenizer_files(checkpoint, detected.family.text_encoders[0].vocab_size, options.tokenizer)


def _plan(
    checkpoint: Checkpoint, detected: Detected, roles: list[Role], options: ConvertOptions, report: Report
) -> list[_Planned]:
    """Write every graph and hold it against the weights; nothing is on disk yet."""
    sizes = options.sizes if options.sizes else ((detected.family.size, detected.family.size),)
    jobs = [(role, size) for role in roles for size in (sizes if role != "text_encoder" else sizes[:1])]
    asked: dict[SourcePart, set[str]] = {_SOURCES[role]: set() for role in roles}
    packages = []
    for i, (role, size) in enumerate(jobs):
        name = PACKAGES[role] if size == sizes[0] else f"{PACKAGES[role]}_{size[0]}x{size[1]}"
        report(Progress("graphs", name, i, len(jobs)))
        weights = Requests(detected.parts[_SOURCES[role]].shapes)
        program = _network(role, detected, weights, size, options)
        weights.check(str(checkpoint.path))
        asked[_SOURCES[role]] |= weights.asked
        lowered = lower(program, _description(role, checkpoint, options))
        packages.append(_Planned(role=role, name=name, size=size, lowered=lowered))
    _check_all_used(checkpoint, detected, roles, asked)
    report(Progress("graphs", "", len(jobs), len(jobs)))
    return packages


@contextmanager
def _collector_off() -> Iterator[None]:
    """Spare the garbage collector a graph of a million objects that all stay: a fifth of the time to write it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _network(role: Role, detected: Detected, weights: Requests, size: Size, options: ConvertOptions) -> Program:
    """Write the graph of one network; sizes are pixels here, latent cells inside."""
    from glassine.models.text_encoder import text_encoder
    from glassine.models.unet import unet
    from glassine.models.vae import vae_decoder, vae_encoder

    family, (width, height) = detected.family, size
    rows, columns = height // 8, width // 8
    attention, layout = options.attention, options.layout
    if role == "text_encoder":
        return text_encoder(family.text_encoders[0], weights)
    if attention == "split" and rows * columns > _LONGEST_AXIS:
        raise ConversionError(
            f"size {width}x{height}: attention over {rows * columns} cells; the Neural Engine, for which "
            f"--attention split is written, ends at {_LONGEST_AXIS}: use --attention einsum or sdpa"
        )
    if role == "vae_decoder":
        return vae_decoder(family.vae, weights, height=rows, width=columns, attention=attention, layout=layout)
    if role == "vae_encoder":
        return vae_encoder(family.vae, weights, height=height, width=width, attention=attention, layout=layout)
    if options.tokens % family.text_encoders[0].tokens:
        raise ConversionError(
            f"tokens {options.tokens}: expected a multiple of the text encoder's {family.text_encoders[0].tokens}"
        )
    return unet(
        family.unet,
        weights,
        batch=options.batch,
        height=rows,
        width=columns,
        tokens=options.tokens,
        attention=attention,
        layout=layout,
    )


def _check_all_used(
    checkpoint: Checkpoint, detected: Detected, roles: list[Role], asked: Mapping[SourcePart, set[str]]
) -> None:
    for part, names in asked.items():
        # The two ways of a VAE share a file; converting one leaves the other's weights, by their names.
        other = {"vae_decoder": ("encoder.", "quant_conv."), "vae_encoder": ("decoder.", "post_quant_conv.")}
        others = tuple(
            prefix for role, prefixes in other.items() if part == "vae" and roles == [role] for prefix in prefixes
        )
        weights = detected.parts[part]
        unused = [weights.key(name) for name in weights.shapes if name not in names and not name.startswith(others)]
        if unused:
            raise ConversionError(
                f"{checkpoint.path}: {len(unused)} keys of the {part} are of no use to it: {shorten(unused)}; "
                "this is a variant that Glassine does not know"
            )


def _description(role: Role, checkpoint: Checkpoint, options: ConvertOptions) -> Description:
    said = checkpoint.metadata
    return Description(
        author=said.get("modelspec.author", ""),
        licence=said.get("modelspec.license", ""),
        version=_name(checkpoint, options),
        summary=_SUMMARIES[role],
        features=_FEATURES,
        user_defined={
            "com.github.apple.coremltools.version": version("coremltools"),
            "com.github.apple.coremltools.source": "milinternal",
            "glassine.version": __version__,
            "glassine.role": role,
        },
    )


def _name(checkpoint: Checkpoint, options: ConvertOptions) -> str:
    if options.name is not None:
        return options.name
    path = checkpoint.path.absolute()
    return path.name if path.is_dir() else path.stem


def _bytes_needed(packages: list[_Planned]) -> int:
    return sum(
        len(package.lowered.model) + (package.lowered.plan.file_size if _twin(packages, package) is None else 0)
        for package in packages
    )


def _twin(packages: list[_Planned], package: _Planned) -> _Planned | None:
    """An earlier package of the same network whose weight.bin is the same, byte for byte."""
    for other in packages:
        if other is package:
            return None
        if other.role == package.role and other.lowered.plan == package.lowered.plan:
            return other
    return None


def _write(folder: Path, packages: list[_Planned], detected: Detected, report: Report) -> None:
    for package in packages:
        total = package.lowered.plan.file_size
        done = 0

        def copied(count: int, name: str = package.name, total: int = total) -> None:
            nonlocal done
            done += count
            report(Progress("weights", name, done, total))

        place = folder / package.file
        place.mkdir()
        twin = _twin(packages, package)
        weights = detected.parts[_SOURCES[package.role]]
        write_files(place, package.lowered, weights, copied, same_as=None if twin is None else folder / twin.file)


def _manifest(
    checkpoint: Checkpoint,
    detected: Detected,
    packages: list[_Planned],
    options: ConvertOptions,
    digests: Mapping[SourcePart, str],
) -> Manifest:
    family = detected.family
    width, height = packages[0].size
    return Manifest(
        name=_name(checkpoint, options),
        family=family.name,
        prediction_type=family.prediction,
        width=width,
        height=height,
        batch=options.batch,
        tokens=options.tokens,
        latent_scale=family.latent_scale,
        clip_skip=1,
        parts={_part_key(package): _part(checkpoint, detected, package, options, digests) for package in packages},
        scheduler=detected.scheduler,
        versions={"glassine": __version__, "coremltools": version("coremltools")},
    )


def _part_key(package: _Planned) -> str:
    """ "unet", and "unet_768x512" for a further size."""
    _, _, size = package.name.partition("_")
    return f"{package.role}_{size}" if size else package.role


def _config(role: Role, family: Family) -> UNetConfig | VAEConfig | TextEncoderConfig:
    if role == "unet":
        return family.unet
    return family.text_encoders[0] if role == "text_encoder" else family.vae


def _part(
    checkpoint: Checkpoint,
    detected: Detected,
    package: _Planned,
    options: ConvertOptions,
    digests: Mapping[SourcePart, str],
) -> Part:
    has_form = package.role != "text_encoder"
    return Part(
        file=package.file,
        role=package.role,
        inputs=package.lowered.inputs,
        outputs=package.lowered.outputs,
        parameters=package.lowered.plan.parameters,
        precision="float16",
        source=checkpoint.path.name,
        source_sha256=digests.get(_SOURCES[package.role], ""),
        attention=options.attention if has_form else None,
        layout=options.layout if has_form else None,
        config=dataclasses.asdict(_config(package.role, detected.family)),
    )
