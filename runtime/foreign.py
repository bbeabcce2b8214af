"""Folders that others made, read as Glassine's: Apple's converter and its Swift bundles, Mochi Diffusion, `coreml-*`.

Such a folder has no glassine.json. What a part is follows from its file's name, and everything else from what the
packages declare: sizes, rows and tokens from the UNet's inputs, the family from what it reads. Two things stand nowhere
and are the family's: the latent scale and what the network predicts.

    Unet.mlpackage                                              a Swift bundle, as .mlmodelc on a Mac
    UnetChunk1.mlmodelc, UnetChunk2.mlmodelc                    the same, in pieces
    Stable_Diffusion_version_runwayml_..._unet.mlpackage        what Apple's Python code writes
    original/packages/, split_einsum/compiled/ ...              the folders of a coreml-* repository
    controlnet/LllyasvielSdControlnetCanny.mlmodelc             control networks, beside the parts
    ControlNet_lllyasviel_sd-controlnet-canny.mlpackage         the same from Apple's Python code
    models/NAME/ and controlnet/ beside models/                 Mochi Diffusion's, for all models that they fit
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from glassine.errors import EngineError, PackageError
from glassine.manifest import FILE_NAME, Manifest, Part, Prediction
from glassine.runtime.engine.contract import COMPILED, TensorSpec
from glassine.runtime.engine.interface import Interface, read_interface

PACKAGE = ".mlpackage"
VOCABULARY = ("vocab.json", "merges.txt")
_PLACES = ("", "Resources", "packages", "compiled")  # where a folder may have its parts
_SCHEDULERS = ("scheduler_config.json", "scheduler/scheduler_config.json")  # diffusers'
_CONTROL_NET = "ControlNet_"  # how Apple's Python code begins a control network's name
_OPEN_CLIP_H = 1024  # width of Stable Diffusion 2's text encoder

# Ends of a file's name, in lower case without separators; the first that fits counts.
_ENDS = re.compile(
    r"(?:(?P<controlled_unet>controlledunet|controlunet)|(?P<refiner>unetrefiner|refiner)|(?P<unet>unet)"
    r"|(?<!multilingual)(?P<text_encoder>textencoder)(?P<second>2)?|(?P<vae_decoder>vaedecoder)"
    r"|(?P<vae_encoder>vaeencoder)|(?P<sd3>mmdit|multimodaldiffusiontransformer))(?:chunk(?P<chunk>\d+))?$"
)
Files = dict[str, list[Path]]
Names = dict[str, Any]  # what `Renamed` takes: "inputs", "outputs", "zeros"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A folder ready to draw with.

    folder: where the packages are. vocabulary: where vocab.json and merges.txt are; None = CLIP's own.
    refiner: a second model in the same folder that draws the last steps. nets: control networks beside it, by name.
    notices: what was taken for granted.
    """

    folder: Path
    manifest: Manifest
    vocabulary: Path | None
    refiner: Manifest | None = None
    nets: Mapping[str, Path] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def packages(self) -> dict[str, Path]:
        """Return every .mlpackage, by role and, for a network in chunks, its number.

        Raises:
            PackageError: they are compiled, and what is inside can be seen in the packages only.
        """
        packages: dict[str, Path] = {}
        for role, part in self.manifest.parts.items():
            files = part.about.get("chunks", [part.file])
            names = [role] if len(files) == 1 else [f"{role} {number}" for number in range(1, len(files) + 1)]
            packages.update({name: self.folder / file for name, file in zip(names, files, strict=True)})
        packages.update({f"control:{name}": path for name, path in self.nets.items()})
        compiled = [path.name for path in packages.values() if path.suffix == COMPILED]
        if compiled:
            raise PackageError(
                f"{self.folder}: {', '.join(compiled)}: compiled for Core ML; what is inside can be seen in the "
                ".mlpackage only"
            )
        return packages


def is_model(folder: Path) -> bool:
    """Whether a folder is a converted model, or a part of one: Glassine's, or as others make it."""
    return (folder / FILE_NAME).is_file() or bool(_places(folder)) or bool(_files(folder))


def read_model(folder: Path) -> Model:
    """Read a folder that Glassine or somebody else converted.

    Raises:
        PackageError: it holds no model, several, or one that lacks parts or cannot be understood.
        EngineError: a package that is no ML Program.
    """
    if (folder / FILE_NAME).is_file():
        return Model(folder=folder, manifest=Manifest.read(folder), vocabulary=folder)
    places = _places(folder)
    if not places:
        _refuse_parts_alone(folder)
        return Model(folder=folder, manifest=Manifest.read(folder), vocabulary=folder)  # says that there is none
    if len(places) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in places)
        raise PackageError(f"{folder}: holds several models; take one of its folders: {names}")
    (place,) = places
    files = _files(place)
    manifest, notices = _manifest(place, folder.name, files)
    nets, left_out = _control_nets(place, folder, manifest)
    return Model(
        folder=place,
        manifest=manifest,
        vocabulary=_vocabulary(place, folder),
        refiner=_refiner(place, files, manifest) if "refiner" in files else None,
        nets=nets,
        notices=(*notices, *left_out),
    )


def _places(folder: Path) -> list[Path]:
    """The folders with a UNet: this one, or those below it that this machine can run, or else any."""
    below = [folder, *(sorted(entry for entry in folder.iterdir() if _is_folder(entry)) if folder.is_dir() else ())]
    found = [place / name for place in below for name in _PLACES if (place / name).is_dir()]
    places = list(dict.fromkeys(place for place in found if _has_unet(_files(place))))
    if folder in places:
        return [folder]
    runs = [place for place in places if any(path.suffix == _preferred() for path in place.iterdir())]
    return runs if runs else places


def _is_folder(entry: Path) -> bool:
    return entry.is_dir() and entry.suffix not in (PACKAGE, COMPILED)


def _preferred() -> str:
    """What Core ML has compiled loads at once on a Mac, and nowhere else."""
    return COMPILED if sys.platform == "darwin" else PACKAGE


def _has_unet(files: Files) -> bool:
    return bool({"unet", "controlled_unet", "sd3"} & set(files))


def _files(folder: Path) -> Files:
    """The packages by role, chunks in order; where a part is there as a package and compiled, the one that runs here.

    Raises:
        PackageError: two packages for one part, or a chunk that is missing.
    """
    found: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(folder.iterdir()):
        match = _ENDS.search(re.sub(r"[^a-z0-9]", "", path.stem.lower()))
        if path.suffix not in (PACKAGE, COMPILED) or match is None or path.stem.startswith(_CONTROL_NET):
            continue
        role = next(name for name in _ENDS.groupindex if match[name] is not None)
        role += "_2" if match["second"] is not None else ""
        found.setdefault(role, {}).setdefault(int(match["chunk"] or 0), []).append(path)
    return {role: _one_of_each(folder, role, chunks) for role, chunks in found.items()}


def _one_of_each(folder: Path, role: str, chunks: dict[int, list[Path]]) -> list[Path]:
    # Where a network is there whole and in chunks, Apple's pipeline takes the chunks: so do we.
    numbers = sorted(number for number in chunks if number) if len(chunks) > 1 or 0 not in chunks else [0]
    if numbers != [0] and numbers != list(range(1, len(numbers) + 1)):
        missing = sorted(set(range(1, numbers[-1] + 1)) - set(numbers))
        raise PackageError(f"{folder}: chunk {missing[0]} of the {role} is missing; there is {numbers}")
    chosen = []
    for number in numbers:
        paths = chunks[number]
        fitting = [path for path in paths if path.suffix == _preferred()] if len(paths) > 1 else paths
        if len(fitting) != 1:
            names = ", ".join(path.name for path in paths)
            raise PackageError(f"{folder}: {names}: each could be the {role}; keep one model in a folder")
        chosen += fitting
    return chosen


def _refuse_parts_alone(folder: Path) -> None:
    """Say what is missing where there are parts of a model but no UNet."""
    if not folder.is_dir():
        return
    files = _files(folder)
    if files:
        names = sorted(path.name for paths in files.values() for path in paths)
        raise PackageError(
            f"{folder}: no UNet among {', '.join(names)}; expected Unet.mlpackage, UnetChunk1.mlpackage and "
            "UnetChunk2.mlpackage, or a name ending in _unet.mlpackage, as Apple's converter writes it"
        )


def _manifest(folder: Path, name: str, files: Files) -> tuple[Manifest, tuple[str, ...]]:
    """What glassine.json would say, and what had to be taken for granted."""
    if "sd3" in files:
        raise PackageError(
            f"{folder}: Stable Diffusion 3, which Glassine does not draw with; it draws with 1, 2 and XL"
        )
    parts = {role: _part(role, paths) for role, paths in files.items() if role != "refiner"}
    if "unet" not in parts:
        parts["unet"] = _without_control(parts["controlled_unet"])
    first = files.get("unet", files.get("controlled_unet", []))[0]
    return _described(folder, name, parts, read_interface(first).version)


def _refiner(folder: Path, files: Files, base: Manifest) -> Manifest:
    """The refiner of the same folder: it reads what the second text encoder makes."""
    shared = {role: part for role, part in base.parts.items() if role in ("text_encoder_2", "vae_decoder")}
    parts = {**shared, "unet": _part("unet", files["refiner"])}
    manifest, _ = _described(folder, f"{base.name} refiner", parts, "")
    return manifest


def _described(folder: Path, name: str, parts: Mapping[str, Part], version: str) -> tuple[Manifest, tuple[str, ...]]:
    inputs = parts["unet"].inputs
    batch, _, rows, columns = inputs["sample"][0]
    _, width, _, tokens = inputs["encoder_hidden_states"][0]
    numbers = inputs["time_ids"][0][-1] if "time_ids" in inputs else 0
    family = {6: "sdxl", 5: "sdxl_refiner"}.get(numbers, "sd2" if width == _OPEN_CLIP_H else "sd15")
    _check_size(folder, parts, rows, columns)
    prediction, notices = _prediction(folder, family, 8 * columns, version)
    manifest = Manifest(
        name=name,
        family=family,
        prediction_type=prediction,
        width=8 * columns,
        height=8 * rows,
        batch=batch,
        tokens=tokens,
        latent_scale=0.13025 if numbers else 0.18215,
        clip_skip=2 if numbers else 1,
        parts={role: _padded(part, family) for role, part in parts.items()},
        decided={
            "family": f"a UNet that reads {f'{numbers} time_ids' if numbers else f'text {width} wide'}",
            "prediction_type": f"{family}'s, as the packages do not say" if not notices else notices[0],
            "latent_scale": f"{family}'s, as the packages do not say",
        },
        defaults={"steps": 4, "sampler": "lcm", "guidance_scale": 8.0} if "timestep_cond" in inputs else {},
    )
    return manifest, notices


def _prediction(folder: Path, family: str, size: int, version: str) -> tuple[Prediction, tuple[str, ...]]:
    """What scheduler_config.json says, where diffusers' lies beside the packages; else what was published.

    Stable Diffusion 2 was, for 768 pixels (predicts v) and, as "base", for 512 (predicts the noise).
    """
    for path in (parent / name for parent in (folder, folder.parent) for name in _SCHEDULERS):
        if path.is_file():
            return _said_prediction(path)
    if family != "sd2":
        return "epsilon", ()
    said = re.search(r"stable-diffusion-2(-1)?(?P<base>-base)?", version)
    based = said["base"] is not None if said is not None else size < 768
    prediction: Prediction = "epsilon" if based else "v_prediction"
    reason = f"its name {version}" if said is not None else f"its {size} pixels"
    return prediction, (
        f"taken for a Stable Diffusion 2 that predicts {prediction}, because of {reason}; if pictures are noise, "
        "it is the other: --prediction-type epsilon or v_prediction",
    )


def _said_prediction(path: Path) -> tuple[Prediction, tuple[str, ...]]:
    """The prediction type of a scheduler_config.json."""
    try:
        said = json.loads(path.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise PackageError(f"{path}: cannot be read ({error}); put diffusers' own here, or remove it") from None
    if said not in get_args(Prediction):
        choices = ", ".join(get_args(Prediction))
        raise PackageError(f"{path}: prediction_type is {said!r}, expected one of {choices}")
    prediction: Prediction = said
    return prediction, (f"predicts {prediction}, as {path.name} says",)


def _control_nets(place: Path, folder: Path, model: Manifest) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The control networks that lie beside a model and fit it, by name, and what is to be said of the others."""
    own = [place, place / "controlnet"]
    shelf = folder.absolute().parent
    shared = [shelf.parent / "controlnet"] if shelf.name == "models" else []  # Mochi Diffusion's
    found: dict[str, Path] = {}
    for path in (path for below in (*own, *shared) if below.is_dir() for path in sorted(below.iterdir())):
        is_net = path.parent != place or path.stem.startswith(_CONTROL_NET)
        name = path.stem.removeprefix(_CONTROL_NET)
        if is_net and path.suffix in (PACKAGE, COMPILED) and (name not in found or path.suffix == _preferred()):
            found[name] = path
    unet = model.parts.get("controlled_unet")
    if unet is None:
        named = ", ".join(name for name, path in found.items() if path.parent in own)
        why = f"control networks {named} have nowhere to go: the model has no ControlledUnet"
        return {}, (why,) if named else ()
    misfits = {name: _misfit(path, unet) for name, path in found.items()}
    fitting = {name: path for name, path in found.items() if misfits[name] is None}
    return fitting, tuple(f"control network {name} left out: {why}" for name, why in misfits.items() if why is not None)


def _misfit(path: Path, unet: Part) -> str | None:
    """Why a UNet does not take what a control network returns, or lacks what it reads; shapes may be undeclared."""
    try:
        net = read_interface(path)
    except (PackageError, EngineError) as error:
        return str(error)
    if not {"sample", "timestep", "controlnet_cond"} <= net.inputs.keys():
        return f"it reads {', '.join(net.inputs)}; one of Apple's converter reads sample, timestep and controlnet_cond"
    takes = {name: shape for name, (shape, _) in unet.inputs.items() if name.startswith("additional_residual_")}
    read = {name: spec.shape for name, spec in net.inputs.items() if name not in ("controlnet_cond", "timestep")}
    fits = (
        net.outputs.keys() <= takes.keys()
        and all(spec.shape in ((), takes[name]) for name, spec in net.outputs.items())
        and all(name in unet.inputs and shape[1:] == unet.inputs[name][0][1:] for name, shape in read.items())
    )
    return None if fits else "it is for another size or family than the model's ControlledUnet"


def _padded(part: Part, family: str) -> Part:
    """OpenCLIP's text encoders (SD2's, SDXL's second) are padded with 0, CLIP-L with its end token."""
    open_clip = part.role == "text_encoder_2" or (part.role == "text_encoder" and family == "sd2")
    return replace(part, about={**part.about, "pad": 0}) if open_clip else part


def _check_size(folder: Path, parts: Mapping[str, Part], rows: int, columns: int) -> None:
    """Refuse a VAE of another size than the UNet's."""
    expected = {"vae_decoder": ("z", (rows, columns)), "vae_encoder": ("x", (8 * rows, 8 * columns))}
    for role, (name, size) in expected.items():
        if role in parts and parts[role].inputs[name][0][2:] != size:
            got = parts[role].inputs[name][0]
            raise PackageError(
                f"{folder}: {parts[role].file} reads {got}, the UNet draws {columns}x{rows} latent cells; "
                "take packages that were converted together"
            )


def _part(role: str, paths: list[Path]) -> Part:
    """One network under Glassine's names; of several chunks the inputs are the caller's, the outputs the last one's."""
    stages = [read_interface(path) for path in paths]
    inputs: dict[str, TensorSpec] = {}
    made: set[str] = set()
    for stage in stages:
        inputs.update({name: spec for name, spec in stage.inputs.items() if name not in made})
        made |= set(stage.outputs)
    theirs = Interface(inputs, stages[-1].outputs, stages[0].version)
    names = _NAMES[role](paths[0], theirs)
    ours = {name: theirs.inputs[given] for name, given in names["inputs"].items()}
    about: dict[str, Any] = {"names": names}
    if len(paths) > 1:
        about["chunks"] = [path.name for path in paths]
    return Part(
        file=paths[0].name,
        role=role,
        inputs={name: (_our_shape(name, spec, ours), spec.dtype) for name, spec in ours.items()},
        outputs={
            name: (theirs.outputs[given].shape, theirs.outputs[given].dtype) for name, given in names["outputs"].items()
        },
        parameters=0,
        precision="as converted",
        source="",
        source_sha256="",
        about=about,
    )


def _unet_names(path: Path, model: Interface) -> Names:
    missing = [name for name in ("sample", "timestep", "encoder_hidden_states") if name not in model.inputs]
    if missing or len(model.inputs["sample"].shape) != 4:
        raise PackageError(
            f"{path}: its inputs are {_spelled(model.inputs)}; expected sample (B, C, h, w), timestep and "
            "encoder_hidden_states, as Apple's converter names them"
        )
    return {"inputs": {name: name for name in model.inputs}, "outputs": {"noise_pred": _only(path, model.outputs)}}


def _text_names(path: Path, model: Interface) -> Names:
    outputs = {name: name for name in model.outputs}
    if not {"last_hidden_state", "hidden_embeds"} & set(outputs):
        states = [name for name, spec in model.outputs.items() if len(spec.shape) == 3]
        if len(states) != 1:
            raise PackageError(
                f"{path}: its outputs are {_spelled(model.outputs)}; expected last_hidden_state (SDXL: hidden_embeds)"
            )
        outputs = {"last_hidden_state": states[0], **{n: n for n in model.outputs if n != states[0]}}
    return {"inputs": {"input_ids": _only(path, model.inputs)}, "outputs": outputs}


def _vae_names(given: str, returned: str) -> Callable[[Path, Interface], Names]:
    def names(path: Path, model: Interface) -> Names:
        return {"inputs": {given: _only(path, model.inputs)}, "outputs": {returned: _only(path, model.outputs)}}

    return names


_NAMES: dict[str, Callable[[Path, Interface], Names]] = {
    "unet": _unet_names,
    "controlled_unet": _unet_names,
    "text_encoder": _text_names,
    "text_encoder_2": _text_names,
    "vae_decoder": _vae_names("z", "image"),
    "vae_encoder": _vae_names("x", "latent"),
}


def _only(path: Path, specs: Mapping[str, TensorSpec]) -> str:
    """The one name there is: as in Apple's Swift code, a network with a single output may call it what it likes."""
    if len(specs) != 1:
        raise PackageError(f"{path}: expected one input or output here, got {_spelled(specs)}")
    return next(iter(specs))


def _our_shape(name: str, spec: TensorSpec, inputs: Mapping[str, TensorSpec]) -> tuple[int, ...]:
    """The shape that Glassine gives; the package may want the same numbers laid out otherwise (`Renamed`)."""
    shape = spec.shape
    if "sample" not in inputs:
        return shape
    batch = inputs["sample"].shape[0]
    if name == "timestep":
        return (batch,)
    if name == "encoder_hidden_states" and len(shape) == 3:
        return (shape[0], shape[2], 1, shape[1])
    return (batch, math.prod(shape) // batch) if name == "time_ids" else shape


def _without_control(part: Part) -> Part:
    """A UNet made for ControlNets draws without them when their residuals are zeros."""
    residuals = [name for name in part.inputs if name.startswith("additional_residual_")]
    names = {**part.about["names"], "zeros": residuals}
    inputs = {name: spec for name, spec in part.inputs.items() if name not in residuals}
    return replace(part, role="unet", inputs=inputs, about={**part.about, "names": names})


def _vocabulary(place: Path, folder: Path) -> Path | None:
    """Where the tokenizer's files are: in the model's folder, its tokenizer folder, or above it; None is nowhere."""
    above = [place, *(parent for parent in place.parents if parent.is_relative_to(folder))]
    for candidate in (below for parent in above for below in (parent, parent / "tokenizer", parent / "Resources")):
        if all((candidate / name).is_file() for name in VOCABULARY):
            return candidate
    return None


def _spelled(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.shape}" for spec in specs.values())
