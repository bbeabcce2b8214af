"""A converted folder against its source: every package on an engine, its source weights in PyTorch, the same inputs."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.convert.addition import base_of
from glassine.convert.checkpoint import is_pickle, open_checkpoint
from glassine.convert.control import read_adapter, read_controlnet
from glassine.convert.control_files import is_control, open_control
from glassine.convert.detect import Detected, detect
from glassine.convert.digest import digests
from glassine.convert.extras import file_sha256, with_extras
from glassine.convert.ingredients import ingredients
from glassine.convert.network import Network
from glassine.convert.previews import ROLE as PREVIEW_ROLE
from glassine.convert.previews import is_preview, read_preview
from glassine.convert.transparency import is_transparent
from glassine.convert.verify_layers import layer_networks, layer_outputs
from glassine.errors import ConversionError, MissingDependency, PackageError
from glassine.manifest import FILE_NAME, Manifest, Part
from glassine.runtime.engine import Engine, EngineOptions, open_engine
from glassine.runtime.engine.compose import Chain
from glassine.runtime.engine.interface import Interface
from glassine.runtime.engine.psnr import psnr

Arrays = dict[str, NDArray[Any]]
Report = Callable[[int, int, str], None]
TEXT_ROLES = ("text_encoder", "text_encoder_2")
UNET_ROLES = tuple(f"{how}{unet}" for unet in ("unet", "collage_unet") for how in ("", "controlled_", "adapted_"))
JUDGED = (*TEXT_ROLES, *UNET_ROLES, "vae_decoder", "vae_encoder")  # what a checkpoint itself holds
CONTROL_ROLES = ("control", "hint", "adapter")


@dataclass(frozen=True, slots=True)
class PartReport:
    """How close one package comes to its source, over all its outputs.

    psnr: of the worst output, dB: its largest value over the root mean square error. max_error: the largest difference.
    """

    role: str
    psnr: float
    max_error: float


def verify_folder(
    folder: Path,
    source: Path,
    *,
    given: Sequence[Path] = (),
    allow_pickle: bool = False,
    parts: Collection[str] = (),
    options: EngineOptions | None = None,
    report: Report | None = None,
) -> list[PartReport]:
    """Compare the packages of `folder` with the weights they were made of.

    The reference is float32 on the weights as the source stores them, with what was laid over them (LoRAs, embeddings,
    another VAE), so what separates the two is the rounding of weights and of folded factors to fp16 (and, on an engine
    that computes in fp16, of everything else).

    Args:
        folder: made by `convert_checkpoint`.
        source: what it was made of, or a control, LayerDiffuse or TAESD file that was added to it.
        given: further files that went into the checkpoint's parts, see `ingredients`.
        allow_pickle: the source and those files may be PyTorch pickles.
        parts: the keys to compare ("unet", "vae_decoder" ...); empty means all that come from the source.
        options: which engine to run the packages on.
        report: called with (done, total, role) before each part and after the last.

    Raises:
        PackageError: no such folder, no such part in it, or a file that went into it is not at hand.
        CheckpointError, ConversionError: the source cannot be read, or is of other sizes.
        MissingDependency: PyTorch is not installed.
    """
    manifest = Manifest.read(folder)
    unknown = sorted(set(parts) - set(manifest.parts))
    if unknown:
        raise PackageError(f"{folder}: has no part {', '.join(unknown)}, only {', '.join(manifest.parts)}")
    made = _made(folder, manifest, source, given, parts, allow_pickle)
    beyond = sorted(set(parts) - set(made))
    if not made:
        raise PackageError(f"{folder}: nothing in it was made of {source}; say which file it was, or convert that one")
    if beyond:
        raise PackageError(f"{folder}: {', '.join(beyond)} cannot be compared with {source}, only {', '.join(made)}")
    chosen = [name for name in made if not parts or name in parts]
    reports = []
    for i, name in enumerate(chosen):
        if report is not None:
            report(i, len(chosen), name)
        reports.append(_verify(folder, name, manifest.parts[name], made[name], options))
    if report is not None:
        report(len(chosen), len(chosen), "")
    return reports


@dataclass(frozen=True, slots=True)
class _Made:
    """How a part is judged: the inputs to give it, and what should come out of them."""

    inputs: Callable[[Engine], Arrays]
    expected: Callable[[Arrays], Arrays]


def _made(
    folder: Path, manifest: Manifest, source: Path, given: Sequence[Path], parts: Collection[str], allow_pickle: bool
) -> dict[str, _Made]:
    """The parts that a source made, by what it is."""
    pickle = allow_pickle and source.is_file() and is_pickle(source)  # only checkpoints convert from one
    for is_kind, read in ((is_control, _control), (is_transparent, _layers), (is_preview, _preview)):
        if not pickle and is_kind(source):
            return read(folder, manifest, source)
    return _checkpoint(manifest, detect_again(folder, manifest, source, given, parts, allow_pickle))


def detect_again(
    folder: Path, manifest: Manifest, source: Path, given: Sequence[Path], parts: Collection[str], allow_pickle: bool
) -> Detected:
    """Return what a folder's checkpoint is, with what was laid over it; arguments and errors as `verify_folder`."""
    checkpoint = open_checkpoint(source, allow_pickle=allow_pickle)
    detected = detect(checkpoint, family=manifest.family)
    found = ingredients(folder, manifest, given, parts=parts, allow_pickle=allow_pickle)
    return with_extras(checkpoint, detected, found.extras)


def _checkpoint(manifest: Manifest, detected: Detected) -> dict[str, _Made]:
    """The parts that a checkpoint made."""
    return {
        name: _Made(partial(inputs_of, part.role, detected), partial(_reference, part.role, detected))
        for name, part in manifest.parts.items()
        if part.role in JUDGED
    }


def _control(folder: Path, manifest: Manifest, source: Path) -> dict[str, _Made]:
    """The parts that a control file made, by its digest."""
    base = base_of(folder, manifest)
    file = open_control(source, base.unet)
    files = tuple(file.checkpoint.files)
    with digests([files]) as digest:
        sha256 = digest()[files]

    def expected(name: str, inputs: Arrays) -> Arrays:
        torch, reference = _judge("control_reference")
        given = {key: torch.from_numpy(array) for key, array in inputs.items()}
        with torch.inference_mode():
            if file.kind == "t2i_adapter":
                results = reference.adapter(read_adapter(file, base), file.weights, given["controlnet_cond"])
            elif manifest.parts[name].role == "hint":
                results = reference.union_hint(file.weights, given)
            else:
                results = reference.controlnet(read_controlnet(file, name, base), file.weights, given)
        return {output: tensor.numpy() for output, tensor in results.items()}

    return {
        name: _Made(_unet_inputs, partial(expected, name))
        for name, part in manifest.parts.items()
        if part.role in CONTROL_ROLES and part.source_sha256 == sha256
    }


def _layers(folder: Path, manifest: Manifest, source: Path) -> dict[str, _Made]:
    """The parts that a file of LayerDiffuse made, by its digest."""

    def expected(network: Network, inputs: Arrays) -> Arrays:
        torch, _ = _judge("reference_layers")
        with torch.inference_mode():
            results = layer_outputs(network, {key: torch.from_numpy(array) for key, array in inputs.items()})
        return {output: tensor.numpy() for output, tensor in results.items()}

    networks = layer_networks(folder, manifest, source)
    return {name: _Made(_unet_inputs, partial(expected, network)) for name, network in networks.items()}


def _preview(_: Path, manifest: Manifest, source: Path) -> dict[str, _Made]:
    """The preview decoders that a file of TAESD made, by its digest."""
    sha256 = file_sha256(source)
    config, weights = read_preview(source)

    def expected(inputs: Arrays) -> Arrays:
        torch, reference = _judge("reference")
        with torch.inference_mode():
            return {"image": reference.tiny_decoder(config, weights, torch.from_numpy(inputs["z"])).numpy()}

    return {
        name: _Made(_unet_inputs, expected)
        for name, part in manifest.parts.items()
        if part.role == PREVIEW_ROLE and part.source_sha256 == sha256
    }


def _verify(folder: Path, name: str, part: Part, made: _Made, options: EngineOptions | None) -> PartReport:
    files, function = part.about.get("chunks", [part.file]), part.about.get("function")
    stages = [open_engine(folder / Path(file).name, options, function=function) for file in files]
    engine: Engine = Chain(stages) if len(stages) > 1 else stages[0]
    try:
        inputs = made.inputs(engine)
        outputs = {key: np.array(value) for key, value in engine.predict(**inputs).items()}
    finally:
        engine.close()
    expected = made.expected(inputs)
    for key, array in expected.items():
        if outputs[key].shape != array.shape:
            raise ConversionError(
                f"{folder / part.file}: {key} is {outputs[key].shape}, from this source it is {array.shape}; "
                "was the folder made of another file?"
            )
    return PartReport(
        name,
        min(psnr(outputs[key], expected[key]) for key in expected),
        max(float(np.abs(outputs[key] - expected[key]).max()) for key in expected),
    )


def inputs_of(role: str, detected: Detected, engine: Engine | Interface) -> Arrays:
    """Return inputs as generation makes them, exact in fp16, so that both sides read the same numbers."""
    rng = np.random.default_rng(0)
    if role in TEXT_ROLES:
        config = detected.family.text_encoder(role)
        own = config.vocab_size - config.added_tokens  # the last two: start and end of text
        ids = rng.integers(0, own - 2, (1, config.tokens))
        end = config.tokens // 3
        ids[:, 0], ids[:, end:] = own - 2, own - 1
        learned = np.arange(own, config.vocab_size)[: end - 1]
        ids[:, 1 : 1 + len(learned)] = learned
        if config.pad is not None:
            ids[:, end + 1 :] = config.pad
        return {"input_ids": ids.astype(np.float32)}
    if role in UNET_ROLES:
        return _unet_inputs(engine)
    if role == "vae_decoder":
        return {"z": _normal(rng, engine, "z")}
    return {"x": _normal(rng, engine, "x", 0.5).clip(-1, 1)}


def _unet_inputs(engine: Engine | Interface) -> Arrays:
    """What a UNet reads, and what the networks that steer it read."""
    rng = np.random.default_rng(0)
    pictures = {"controlnet_cond", "pixel", "argb"}
    masks = {name for name in engine.inputs if name.startswith("collage_masks_")}
    special = {"timestep", "time_ids", "control_type", "control_weight", "collage_table", *masks, *pictures}
    given = {name: _normal(rng, engine, name) for name in engine.inputs if name not in special}
    shapes = {name: engine.inputs[name].shape for name in special if name in engine.inputs}
    if "timestep" in shapes:
        (rows,) = shapes["timestep"]
        given["timestep"] = np.linspace(999, 21, rows).round().astype(np.float32)
    if "time_ids" in shapes:
        given["time_ids"] = rng.integers(0, 4096, shapes["time_ids"]).astype(np.float32)
    if "collage_table" in shapes:
        given["collage_table"] = _normal(rng, engine, "collage_table", 0.2)
    for name in sorted((pictures | masks) & set(shapes)):
        given[name] = rng.random(shapes[name]).astype(np.float16).astype(np.float32)
    if "control_weight" in shapes:
        given["control_weight"] = np.full(shapes["control_weight"], 0.75, np.float32)
    if "control_type" in shapes:
        rows, types = shapes["control_type"]
        given["control_type"] = np.eye(types, dtype=np.float32)[np.arange(rows) % types]
    return given


def _normal(rng: np.random.Generator, engine: Engine | Interface, name: str, scale: float = 1.0) -> NDArray[Any]:
    return (scale * rng.standard_normal(engine.inputs[name].shape)).astype(np.float16).astype(np.float32)


def _judge(module: str) -> tuple[Any, Any]:
    """PyTorch, and the module that says in it what networks mean."""
    try:
        return importlib.import_module("torch"), importlib.import_module(f"glassine.convert.{module}")
    except ImportError:
        raise MissingDependency(
            "verify needs PyTorch as the judge; install it with pip install 'glassine[portable]'"
        ) from None


def _reference(role: str, detected: Detected, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    torch, reference = _judge("reference")
    family = detected.family
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.inference_mode():
        if role in TEXT_ROLES:
            config = family.text_encoder(role)
            weights = next(source for part, source in detected.parts.items() if part == role)
            last, pooled, states = reference.text_encoder(config, weights, given["input_ids"].long())
            name = "last_hidden_state" if config.final_norm else "hidden_embeds"
            results = {name: last, "pooled_outputs": pooled, "hidden_states": states}
        elif role in UNET_ROLES:
            results = {"noise_pred": reference.unet(family.unet, detected.parts["unet"], given)}
        elif role == "vae_decoder":
            results = {"image": reference.vae_decoder(family.vae, detected.parts["vae"], given["z"])}
        else:
            results = {"latent": reference.vae_encoder(family.vae, detected.parts["vae"], given["x"])}
    return {name: tensor.numpy() for name, tensor in results.items()}


def note_palettes(folder: Path, reports: Sequence[PartReport], threshold: float) -> dict[str, float]:
    """Write into glassine.json what parts with palettes do, and return what each part has to reach, in dB.

    A part with palettes loses what its weights lost, so it is held against that: their signal to noise, less 6 dB.
    """
    manifest = Manifest.read(folder)
    needed, parts = {}, dict(manifest.parts)
    for report in reports:
        part = parts[report.role]
        lost = part.about.get("palette")
        needed[report.role] = threshold
        if lost is not None and lost["snr_db"] is not None:
            needed[report.role] = min(threshold, lost["snr_db"] - 6)
            noted = {**part.about, "palette": {**lost, "output_psnr_db": round(report.psnr, 2)}}
            parts[report.role] = replace(part, about=noted)
    if parts != manifest.parts:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".verify") as fresh:  # the whole file, or what it was
            replace(manifest, parts=parts).write(Path(fresh))
            (Path(fresh) / FILE_NAME).replace(folder / FILE_NAME)
    return needed
