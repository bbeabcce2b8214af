"""Checkpoint -> folder of packages: detect, list its networks, plan and write them, write down what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from glassine import __version__
from glassine.convert.checkpoint import Checkpoint, open_checkpoint, shorten
from glassine.convert.collage import steered_collages
from glassine.convert.detect import Detected, detect
from glassine.convert.digest import Files, digests
from glassine.convert.extras import merged, with_extras
from glassine.convert.names import Part as SourcePart
from glassine.convert.network import Base, ConvertOptions, Form, Network, Precision, Role, Size
from glassine.convert.package import check_space, replacing
from glassine.convert.packages import (
    Planned,
    Progress,
    Report,
    bytes_needed,
    hashed_files,
    parts,
    plan_packages,
    write_packages,
)
from glassine.convert.palettize import Palette
from glassine.convert.program import Requests
from glassine.convert.shapes import SAMPLE_CHANNELS
from glassine.convert.source import remember_source
from glassine.convert.transparency import with_control
from glassine.convert.vae_range import probe_vae
from glassine.convert.vocabulary import MERGES, VOCABULARY, tokenizer_files
from glassine.errors import CheckpointError, ConversionError, PackageError
from glassine.manifest import FILE_NAME, STORE, Manifest
from glassine.models.config import Family
from glassine.models.mil import Program

__all__ = ["ConvertOptions", "Progress", "convert_checkpoint"]

# The names that Apple's Swift pipeline looks for once each package has been compiled.
PACKAGES: dict[Role, str] = {
    "text_encoder": "TextEncoder",
    "text_encoder_2": "TextEncoder2",
    "unet": "Unet",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
_SOURCES: dict[Role, SourcePart] = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "unet": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}
_SUMMARIES: dict[Role, str] = {
    "text_encoder": "Stable Diffusion's text encoder: the tokens of a prompt become what the UNet reads.",
    "text_encoder_2": "Stable Diffusion XL's second text encoder: more of what the UNet reads, and a vector for all.",
    "unet": "Stable Diffusion's UNet: predicts the noise in a latent picture at one time of the diffusion.",
    "vae_decoder": "Stable Diffusion's decoder: a latent becomes a picture.",
    "vae_encoder": "Stable Diffusion's encoder: a picture becomes the moments of its latent.",
}
TEXT_ROLES: tuple[Role, ...] = ("text_encoder", "text_encoder_2")
VAE_ROLES: tuple[Role, ...] = ("vae_decoder", "vae_encoder")
_LONGEST_AXIS = 16384  # of the Neural Engine, for which `split` is written


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
        CheckpointError: the source cannot be read, or is not Stable Diffusion.
        ConversionError: weights are missing, left over, of wrong shape, not finite or too large for fp16.
        PackageError: `out` is in the way, cannot be written, or the disk is too full.
    """
    options = ConvertOptions() if options is None else options
    report = _silent if report is None else report
    checkpoint = open_checkpoint(source, allow_pickle=options.extras.allow_pickle)
    detected = detect(checkpoint, options.prediction_type, family=options.family, distilled=options.distilled)
    detected = with_extras(checkpoint, detected, options.extras)
    options = options.settled(detected)
    sizes = options.sizes
    networks = _networks(checkpoint, detected, options)
    for listed in options.further:
        networks += listed(_base(checkpoint, detected, networks, options))
    if options.further:
        base = _base(checkpoint, detected, networks, options)
        unets = {network.key: network.config for network in networks if network.role.endswith("unet")}
        networks += [*with_control(networks, base), *steered_collages(unets, base)]
    networks = [network.with_palette(options.palette) for network in networks]
    if options.palette is not None:
        _check_palette(options.palette, networks)
    _check_out(out, options)
    texts = _texts(checkpoint, detected, options) if any(network.role in TEXT_ROLES for network in networks) else {}
    with digests(hashed_files(networks), skip=options.dry_run) as digest:
        packages = plan_packages(networks, sizes, _name(checkpoint, options), report)
        manifest = partial(_manifest, checkpoint, detected, packages, options)
        if options.dry_run:
            return manifest({})
        with replacing(out, overwrite=options.overwrite) as fresh:
            check_space(fresh, bytes_needed(packages))
            write_packages(fresh, packages, report)
            for name, content in texts.items():
                (fresh / name).write_bytes(content)
            written = manifest(digest())
            written.write(fresh)
            if options.palette is not None:
                remember_source(fresh, source)
    return written


def _check_palette(palette: Palette, networks: Sequence[Network]) -> None:
    packed = [network for network in networks if network.palette is not None]
    if not packed:
        raise ConversionError(
            f"palette {palette}: is for UNets and control networks, and none is converted; without --palette, then"
        )
    palette.check({name: shape for network in packed for name, shape in network.weights.shapes.items()})


def _base(checkpoint: Checkpoint, detected: Detected, networks: list[Network], options: ConvertOptions) -> Base:
    """What further networks have to fit: the UNet that is being converted."""
    unet = next((network for network in networks if network.key == "unet"), None)
    if unet is None:
        raise ConversionError(f"{checkpoint.path}: further networks have to fit a UNet, and --part leaves it out")
    return Base(family=detected.family, unet=unet.weights, source=unet.source, files=unet.files, options=options)


def _silent(progress: Progress) -> None:
    """Report to nobody."""


def _networks(checkpoint: Checkpoint, detected: Detected, options: ConvertOptions) -> list[Network]:
    """The networks to convert, in the order a picture meets them."""
    roles = _roles(checkpoint, detected, options)
    family = detected.family
    vae_precision, vae_about = _vae_precision(checkpoint, detected, roles, options)
    # The two ways of a VAE share a file; converting one leaves the other's weights, by their names.
    other = {"vae_decoder": ("encoder.", "quant_conv."), "vae_encoder": ("decoder.", "post_quant_conv.")}
    return [
        Network(
            key=role,
            role=role,
            package="UnetRefiner" if (role, family.name) == ("unet", "sdxl_refiner") else PACKAGES[role],
            weights=detected.parts[_SOURCES[role]],
            source=detected.sources.get(_SOURCES[role], checkpoint),
            files=files_of(detected.sources.get(_SOURCES[role], checkpoint), _SOURCES[role]),
            write=partial(_write, role, family, replace(options.form, vae_precision=vae_precision)),
            config=_config(role, family),
            summary=_SUMMARIES[role],
            about=vae_about if role in VAE_ROLES else _about(role, family),
            leaves=other.get(role, ()) if options.part == role else (),
            sizes=options.sizes[:1] if role in TEXT_ROLES else None,
            attention=None if role in TEXT_ROLES else options.attention,
            layout=None if role in TEXT_ROLES else options.layout,
            precision=vae_precision if role in VAE_ROLES else "float16",
            chunks=options.chunks if role == "unet" else 1,
            functions=options.functions and role not in TEXT_ROLES,
        )
        for role in roles
    ]


def _roles(checkpoint: Checkpoint, detected: Detected, options: ConvertOptions) -> list[Role]:
    """The networks to convert, in the order a picture meets them."""
    has = {"unet", *VAE_ROLES, *detected.family.text_roles}
    parts = VAE_ROLES if options.part == "vae" else has if options.part is None else {options.part}
    wanted = [role for role in PACKAGES if role in has and role in parts]
    if not wanted:
        raise CheckpointError(f"{checkpoint.path}: {detected.family.name} has no {options.part}, only {sorted(has)}")
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
    ours = {FILE_NAME, STORE, VOCABULARY, MERGES, ".DS_Store"}
    for part in Manifest.read(out).parts.values():
        for file in (part.file, *part.about.get("chunks", ())):
            ours |= {file, *(Path(file).with_suffix(suffix).name for suffix in (".mlmodelc", ".weights.json"))}
    strangers = sorted({entry.name for entry in out.iterdir()} - ours)
    if strangers:
        raise PackageError(f"{out}: also holds {shorten(strangers)}, which would be lost; move it away first")


def _texts(checkpoint: Checkpoint, detected: Detected, options: ConvertOptions) -> dict[str, bytes]:
    encoder = detected.family.text_encoders[0]
    return tokenizer_files(checkpoint, encoder.vocab_size - encoder.added_tokens, options.tokenizer)


def _write(role: Role, family: Family, form: Form, weights: Requests, size: Size) -> Program:
    """Write the graph of one network; sizes are pixels here, latent cells inside."""
    from glassine.models.text_encoder import text_encoder
    from glassine.models.unet import unet
    from glassine.models.vae import vae_decoder, vae_encoder

    width, height = size
    rows, columns = height // 8, width // 8
    if role in TEXT_ROLES:
        return text_encoder(family.text_encoder(role), weights)
    attention, layout = form.attention, form.layout
    _check_axis(role, family, form, size)
    if role in VAE_ROLES:
        dtype = np.float32 if form.vae_precision == "float32" else np.float16
        vae = partial(vae_decoder, height=rows, width=columns)
        if role == "vae_encoder":
            vae = partial(vae_encoder, height=height, width=width)
        return vae(family.vae, weights, attention=attention, layout=layout, dtype=dtype)
    if form.tokens % family.text_encoders[0].tokens:
        raise ConversionError(
            f"tokens {form.tokens}: expected a multiple of the text encoder's {family.text_encoders[0].tokens}"
        )
    return unet(
        family.unet,
        weights,
        batch=form.rows,
        height=rows,
        width=columns,
        tokens=form.tokens,
        attention=attention,
        layout=layout,
    )


def _config(role: Role, family: Family) -> Any:
    if role == "unet":
        return family.unet
    return family.text_encoder(role) if role in TEXT_ROLES else family.vae


def _about(role: Role, family: Family) -> dict[str, Any]:
    """What the run time has to know beyond names and shapes."""
    if role == "unet":
        return {"sample": [list(part) for part in SAMPLE_CHANNELS[family.unet.in_channels]]}
    pad = family.text_encoder(role).pad
    return {} if pad is None else {"pad": pad}


def _vae_precision(
    checkpoint: Checkpoint, detected: Detected, roles: list[Role], options: ConvertOptions
) -> tuple[Precision, dict[str, Any]]:
    """fp16 unless the VAE needs a wider range, and what decided."""
    if options.vae_precision is not None:
        return options.vae_precision, {"why": "asked for"}
    if not detected.family.wide_vae or not any(role in VAE_ROLES for role in roles):
        return "float16", {}
    source = detected.sources.get("vae", checkpoint)  # another file, where the VAE was swapped
    if source.configs.get("vae", {}).get("force_upcast") is False:
        return "float16", {"why": "vae/config.json: force_upcast is false"}
    _check_whole_vae(source, detected)
    fits, why = probe_vae(detected.family.vae, detected.parts["vae"], detected.family.latent_scale)
    return "float16" if fits else "float32", {"why": why}


def _check_whole_vae(source: Checkpoint, detected: Detected) -> None:
    """Refuse a VAE that lacks something before any arithmetic is done with it."""
    for role in VAE_ROLES:
        requests = Requests(detected.parts["vae"].shapes)
        _write(role, detected.family, Form(attention="einsum"), requests, (64, 64))
        requests.check(str(source.path))


def _vae_decision(packages: list[Planned]) -> dict[str, str]:
    """What decided the VAE's precision, for those who look it up."""
    networks = (package.network for package in packages if package.network.role in VAE_ROLES)
    said = next((f"{net.precision}: {net.about['why']}" for net in networks if "why" in net.about), None)
    return {} if said is None else {"VAE precision": said}


def _check_axis(role: Role, family: Family, form: Form, size: Size) -> None:
    """Refuse what is longer than an axis of the Neural Engine: `split` is written for it. float32 never runs there."""
    if form.attention != "split" or (role in VAE_ROLES and form.vae_precision == "float32"):
        return
    width, height = size
    level = 0
    if role == "unet":
        level = next((level for level, depths in enumerate(family.unet.down_depths) if any(depths)), 0)
    cells = -(-height // (8 << level)) * -(-width // (8 << level))
    if cells > _LONGEST_AXIS:
        raise ConversionError(
            f"size {width}x{height}: attention over {cells} cells; the Neural Engine, for which "
            f"--attention split is written, ends at {_LONGEST_AXIS}: use --attention einsum or sdpa"
        )


def files_of(checkpoint: Checkpoint, part: SourcePart) -> tuple[Path, ...]:
    """The file of a part, or its shards in the order of their names."""
    if checkpoint.path.is_dir():
        return tuple(sorted({tensor.path for key, tensor in checkpoint.tensors.items() if key.startswith(f"{part}/")}))
    return (checkpoint.path,)


def _name(checkpoint: Checkpoint, options: ConvertOptions) -> str:
    if options.name is not None:
        return options.name
    path = checkpoint.path.absolute()
    return path.name if path.is_dir() else path.stem


def _manifest(
    checkpoint: Checkpoint,
    detected: Detected,
    packages: list[Planned],
    options: ConvertOptions,
    digests: Mapping[Files, str],
) -> Manifest:
    family = detected.family
    width, height = packages[0].size
    return Manifest(
        name=_name(checkpoint, options),
        family=family.name,
        prediction_type=family.prediction,
        width=width,
        height=height,
        batch=options.rows,
        tokens=options.tokens,
        latent_scale=family.latent_scale,
        clip_skip=1 + family.text_encoders[0].skip,
        parts=parts(packages, digests),
        embeddings=detected.embeddings,
        loras=() if options.dry_run else merged(options.extras.loras),
        scheduler=detected.scheduler,
        defaults=dict(detected.defaults),
        decided={**detected.reasons, **_vae_decision(packages)},
        versions={"glassine": __version__, "coremltools": version("coremltools")},
    )
