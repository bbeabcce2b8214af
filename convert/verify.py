"""A converted folder against its source: every package on an engine, its source weights in PyTorch, the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import Detected, detect
from glassine.errors import ConversionError, MissingDependency, PackageError
from glassine.manifest import Manifest, Part
from glassine.runtime.engine import Engine, EngineOptions, open_engine
from glassine.runtime.engine.compose import Chain

Arrays = dict[str, NDArray[Any]]
Report = Callable[[int, int, str], None]
TEXT_ROLES = ("text_encoder", "text_encoder_2")
JUDGED = (*TEXT_ROLES, "unet", "vae_decoder", "vae_encoder")  # what a checkpoint itself holds


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
    parts: Collection[str] = (),
    options: EngineOptions | None = None,
    report: Report | None = None,
) -> list[PartReport]:
    """Compare the packages of `folder` with the weights they were made of.

    The reference is float32 on the weights as the source stores them, so what separates the two is the rounding of
    weights and of folded factors to fp16 (and, on an engine that computes in fp16, of everything else).

    Args:
        folder: made by `convert_checkpoint`.
        source: what it was made of.
        parts: the roles to compare ("unet", "vae_decoder" ...); empty means all that come from a checkpoint.
        options: which engine to run the packages on.
        report: called with (done, total, role) before each part and after the last.

    Raises:
        PackageError: no such folder, or no such part in it.
        CheckpointError, ConversionError: the source cannot be read, or is of other sizes.
        MissingDependency: PyTorch is not installed.
    """
    manifest = Manifest.read(folder)
    unknown = sorted(set(parts) - set(manifest.parts))
    if unknown:
        raise PackageError(f"{folder}: has no part {', '.join(unknown)}, only {', '.join(manifest.parts)}")
    detected = detect(open_checkpoint(source), family=manifest.family)
    judged = [name for name, part in manifest.parts.items() if part.role in JUDGED]
    beyond = sorted(set(parts) - set(judged))
    if beyond:
        raise PackageError(f"{folder}: {', '.join(beyond)} cannot be compared with {source}, only {', '.join(judged)}")
    chosen = [name for name in judged if not parts or name in parts]
    reports = []
    for i, name in enumerate(chosen):
        if report is not None:
            report(i, len(chosen), name)
        reports.append(_verify(folder, name, manifest.parts[name], detected, options))
    if report is not None:
        report(len(chosen), len(chosen), "")
    return reports


def _verify(folder: Path, name: str, part: Part, detected: Detected, options: EngineOptions | None) -> PartReport:
    stages = [open_engine(folder / Path(file).name, options) for file in part.about.get("chunks", [part.file])]
    engine: Engine = Chain(stages) if len(stages) > 1 else stages[0]
    try:
        inputs = _inputs(part.role, engine, detected)
        outputs = {key: np.array(value) for key, value in engine.predict(**inputs).items()}
    finally:
        engine.close()
    expected = _reference(part.role, detected, inputs)
    for key, array in expected.items():
        if outputs[key].shape != array.shape:
            raise ConversionError(
                f"{folder / part.file}: {key} is {outputs[key].shape}, from this source it is {array.shape}; "
                "was the folder made of another file?"
            )
    return PartReport(
        name,
        min(_psnr(outputs[key], expected[key]) for key in expected),
        max(float(np.abs(outputs[key] - expected[key]).max()) for key in expected),
    )


def _psnr(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    error = np.sqrt(np.mean((actual.astype(np.float64) - expected) ** 2))
    with np.errstate(divide="ignore"):
        return float(20 * np.log10(np.abs(expected).max() / error))


def _inputs(role: str, engine: Engine, detected: Detected) -> Arrays:
    """Inputs as generation makes them, exact in fp16, so that both sides read the same numbers."""
    rng = np.random.default_rng(0)

    def normal(name: str, scale: float = 1.0) -> NDArray[Any]:
        return (scale * rng.standard_normal(engine.inputs[name].shape)).astype(np.float16).astype(np.float32)

    if role in TEXT_ROLES:
        config = detected.family.text_encoder(role)
        ids = rng.integers(0, config.vocab_size - 2, (1, config.tokens))
        end = config.tokens // 3
        ids[:, 0], ids[:, end:] = config.vocab_size - 2, config.vocab_size - 1
        if config.pad is not None:
            ids[:, end + 1 :] = config.pad
        return {"input_ids": ids.astype(np.float32)}
    if role == "unet":
        (batch,) = engine.inputs["timestep"].shape
        given = {name: normal(name) for name in engine.inputs if name not in {"timestep", "time_ids"}}
        given["timestep"] = np.linspace(999, 21, batch).round().astype(np.float32)
        if "time_ids" in engine.inputs:
            sizes = rng.integers(0, 4096, engine.inputs["time_ids"].shape)
            given["time_ids"] = sizes.astype(np.float32)
        return given
    if role == "vae_decoder":
        return {"z": normal("z")}
    return {"x": normal("x", 0.5).clip(-1, 1)}


def _reference(role: str, detected: Detected, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    try:
        import torch

        from glassine.convert import reference
    except ImportError:
        raise MissingDependency(
            "verify needs PyTorch as the judge; install it with pip install 'glassine[portable]'"
        ) from None
    family = detected.family
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.inference_mode():
        if role in TEXT_ROLES:
            config = family.text_encoder(role)
            last, pooled, states = reference.text_encoder(config, detected.parts[role], given["input_ids"].long())
            name = "last_hidden_state" if config.final_norm else "hidden_embeds"
            results = {name: last, "pooled_outputs": pooled, "hidden_states": states}
        elif role == "unet":
            results = {"noise_pred": reference.unet(family.unet, detected.parts["unet"], given)}
        elif role == "vae_decoder":
            results = {"image": reference.vae_decoder(family.vae, detected.parts["vae"], given["z"])}
        else:
            results = {"latent": reference.vae_encoder(family.vae, detected.parts["vae"], given["x"])}
    return {name: tensor.numpy() for name, tensor in results.items()}
