"""What a picture says about itself: A1111's `parameters` text for other tools, and a complete record for Glassine.

A PNG carries two text chunks. `parameters` is the text every Stable Diffusion tool reads:

    prompt, over as many lines as it has
    Negative prompt: likewise
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1, Size: 512x512, ...

`glassine` is JSON: `format_version`, the `request` (settings by their names in `request.py`), and what else decided the
picture: `size`, `model`, `inputs` (names and sha256 of the files). From it the picture is drawn again, byte for byte.
Both are read back as untrusted text: what is too large, of another type or unknown is refused, never used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from PIL import Image

from glassine.errors import RequestError

FORMAT_VERSION = 1
KEYWORD = "glassine"
PARAMETERS = "parameters"
_LONGEST = {KEYWORD: 1 << 20, PARAMETERS: 1 << 16}  # characters that are read

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "lms": "LMS",
    "pndm": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
SPACING_NAMES = {
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "kl_optimal": "KL Optimal",
    "beta": "Beta",
    "ays_xl": "Align Your Steps",  # A1111 has one name for both; read back, it is the last of them
    "ays": "Align Your Steps",
}
CONTROL_MODES = {
    "balanced": "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
    "guess": "ControlNet is more important",  # A1111 has no name for diffusers' weights
}
AUTOMATIC = "Automatic"  # the sampler's own schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was read from a picture.

    written_by: "glassine" = complete; "a1111" = the settings its text has.
    request: settings by Glassine's names; the caller validates their values. size: (width, height) or None.
    model: "name", "sha256" (A1111: its first 10 digits) and "refiner" where known. inputs: role -> {"name", "sha256"}.
    controls: the settings of each, and "files" as `inputs`. collage: its layers, and what is behind them.
    notices: what could not be taken over.
    """

    written_by: Literal["glassine", "a1111"]
    request: dict[str, Any]
    size: tuple[int, int] | None
    model: dict[str, str]
    inputs: dict[str, dict[str, str]]
    controls: tuple[dict[str, Any], ...] = ()
    collage: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()


def text_chunks(
    request: Mapping[str, Any],
    *,
    version: str,
    size: tuple[int, int],
    model: Mapping[str, str],
    inputs: Mapping[str, Mapping[str, str]],
    controls: Sequence[Mapping[str, Any]] = (),
    collage: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return the text chunks of a picture, keyword -> text.

    Args:
        request: every setting, as plain JSON values.
        version: Glassine's own. size: (width, height). model: "name" and the "sha256" of its checkpoint.
        inputs: role ("image", "change_map", ...) -> {"name": file name, "sha256": `file_sha256`}.
        controls: each with its settings, and "files" as `inputs`. collage: see `collage_project.recorded`.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "version": version,
        "request": dict(request),
        "size": list(size),
        "model": dict(model),
        "inputs": {role: dict(file) for role, file in inputs.items()},
        **({"controls": [dict(control) for control in controls]} if controls else {}),
        **({"collage": dict(collage)} if collage is not None else {}),
    }
    return {
        PARAMETERS: parameters_text(
            request, version=version, size=size, model=model, has_image="image" in inputs, controls=controls
        ),
        KEYWORD: json.dumps(record, ensure_ascii=False, allow_nan=False),
    }


def parameters_text(
    request: Mapping[str, Any],
    *,
    version: str,
    size: tuple[int, int],
    model: Mapping[str, str],
    has_image: bool,
    controls: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return A1111's `parameters` text of a request."""
    spacing = request.get("spacing")
    fields = {
        "Steps": request["steps"],
        "Sampler": SAMPLER_NAMES.get(request["sampler"], request["sampler"]),
        "Schedule type": AUTOMATIC if spacing is None else SPACING_NAMES.get(spacing, spacing),
        "CFG scale": request["guidance_scale"],
        "Seed": request["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": model["sha256"][:10] if "sha256" in model else None,
        "Model": model.get("name"),
        "Denoising strength": request["strength"] if has_image else None,
        "Clip skip": request.get("clip_skip"),
        "Eta": request.get("eta"),
        "CFG Rescale": request["guidance_rescale"] if request.get("guidance_rescale") else None,
        "RNG": {"torch": "CPU", "philox": "NV"}.get(request["noise"]),
        "Refiner": model.get("refiner"),
        "Refiner switch at": request.get("refine_at") if "refiner" in model else None,
        "Emphasis": "No norm" if request.get("emphasis") == "no_norm" else None,
        **{f"ControlNet {index}": _control_text(control) for index, control in enumerate(controls)},
        "Version": f"Glassine {version}",
    }
    settings = ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None)
    negative = request["negative_prompt"]
    return "\n".join([request["prompt"], *([f"Negative prompt: {negative}"] if negative else []), settings])


def read_record(path: Path) -> Record:
    """Read what a PNG says about itself.

    Raises:
        RequestError: not a readable PNG, without settings, or with settings that make no sense or are too new.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = {key: str(image.info[key]) for key in _LONGEST if key in image.info}
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: cannot be read ({error}); expected a PNG drawn by Glassine or A1111") from None
    for key, value in text.items():
        if len(value) > _LONGEST[key]:
            raise RequestError(f"{path}: its {key} text has {len(value)} characters, expected at most {_LONGEST[key]}")
    if KEYWORD in text:
        return _parse_own(path, text[KEYWORD])
    if PARAMETERS in text:
        return parse_parameters(text[PARAMETERS], name=str(path))
    raise RequestError(
        f"{path}: holds no settings (no {KEYWORD} or {PARAMETERS} text); expected a PNG as Glassine or A1111 saved it"
    )


def parse_parameters(text: str, *, name: str = "parameters") -> Record:
    """Read A1111's `parameters` text.

    The last line holds the settings if it has three or more "Key: value"; a value is quoted as JSON where it contains
    a comma, colon or line break. Older texts name the schedule in the sampler: "DPM++ 2M Karras".

    Raises:
        RequestError: a number is not one.
    """
    *lines, last = text.strip().split("\n")
    fields = {match[1]: _unquoted(match[2]) for match in _FIELD.finditer(last)}
    if len(fields) < 3:
        lines, fields = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).strip().removeprefix(_NEGATIVE)
    request: dict[str, Any] = {"prompt": "\n".join(lines[:start]).strip(), "negative_prompt": negative.strip()}
    notices: list[str] = []
    for key, convert in _NUMBERS.items():
        if key in fields:
            request[convert[0]] = _number(name, key, fields.pop(key), convert[1])
    request.update(_sampler(fields, notices))
    request.update(_choices(fields, notices))
    size = _size(name, fields.pop("Size", None))
    hashes = {"name": fields.pop("Model", None), "sha256": fields.pop("Model hash", None)}
    hashes["refiner"] = fields.pop("Refiner", None)
    for key in ("Version", *(key for key in fields if key.endswith(" hash"))):
        fields.pop(key, None)
    notices += [f"{name}: setting {key!r} ({value}) is not Glassine's; left out" for key, value in fields.items()]
    return Record(
        written_by="a1111",
        request=request,
        size=size,
        model={key: value for key, value in hashes.items() if value is not None},
        inputs={},
        notices=tuple(notices),
    )


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_NEGATIVE = "Negative prompt:"
# Bounded, so that hostile text takes no more than seconds.
_FIELD = re.compile(r'(\w[\w \-/]{1,80}): *("(?:\\.|[^\\"]){1,8000}"|[^,]*)(?:,|$)')
_NUMBERS: dict[str, tuple[str, type[int] | type[float]]] = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
    "Clip skip": ("clip_skip", int),
    "Eta": ("eta", float),
    "CFG Rescale": ("guidance_rescale", float),
    "Image CFG scale": ("image_guidance", float),
    "Refiner switch at": ("refine_at", float),
}


def _quoted(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip()
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _number(name: str, key: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise RequestError(f"{name}: {key} is {text[:60]!r}, expected a number") from None


def _control_text(control: Mapping[str, Any]) -> str:
    """What A1111's ControlNet extension says of one of its units."""
    said = {
        "Module": control["preprocess"] if control["preprocess"] is not None else "none",
        "Model": control["net"],
        "Weight": control["weight"],
        "Guidance Start": control["start"],
        "Guidance End": control["stop"],
        "Control Mode": CONTROL_MODES[control["mode"]],
    }
    return ", ".join(f"{key}: {value}" for key, value in said.items())


def _sampler(fields: dict[str, str], notices: list[str]) -> dict[str, str]:
    """Take the sampler and its schedule out of `fields`."""
    found: dict[str, str] = {}
    sampler, spacing = fields.pop("Sampler", None), fields.pop("Schedule type", None)
    if sampler is None:
        return found
    for label in SPACING_NAMES.values():
        if spacing is None and sampler.endswith(f" {label}"):
            sampler, spacing = sampler.removesuffix(f" {label}"), label
    keys = {label: key for key, label in SAMPLER_NAMES.items()}
    if sampler in keys or sampler in SAMPLER_NAMES:
        found["sampler"] = keys.get(sampler, sampler)
    else:
        notices.append(f"sampler {sampler!r} is not known; the default is used")
    labels = {label: key for key, label in SPACING_NAMES.items()}
    if spacing in labels:
        found["spacing"] = labels[spacing]
    elif spacing != AUTOMATIC:
        notices.append(f"schedule {spacing!r} is not known or not said; the sampler's own is used")
    return found


def _choices(fields: dict[str, str], notices: list[str]) -> dict[str, str]:
    """Take the source of random numbers and the emphasis out of `fields`."""
    found: dict[str, str] = {}
    rng, emphasis = fields.pop("RNG", None), fields.pop("Emphasis", None)
    noise = {"CPU": "torch", "NV": "philox"}.get(rng or "")
    if noise is not None:
        found["noise"] = noise
    else:
        notices.append("the text does not say where the noise came from; if an NVIDIA card drew it, use --noise philox")
    if emphasis == "No norm":
        found["emphasis"] = "no_norm"
    elif emphasis not in (None, "Original"):
        notices.append(f"emphasis {emphasis!r} is not known; the original rule is used")
    return found


def _size(name: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise RequestError(f"{name}: Size is {text[:60]!r}, expected WIDTHxHEIGHT")
    return int(match[1]), int(match[2])


def _parse_own(path: Path, text: str) -> Record:
    try:
        raw = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: its {KEYWORD} text is damaged ({error})") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise RequestError(
            f"{path}: settings of format_version {version!r}, this Glassine reads {FORMAT_VERSION}; update Glassine"
        )
    size, inputs, controls = raw.get("size"), raw.get("inputs"), raw.get("controls", [])
    good = (
        _are(raw.get("model"), str)
        and isinstance(raw.get("request"), dict)
        and isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and 0 < side <= 1 << 20 for side in size)
        and _are_files(inputs)
        and isinstance(controls, list)
        and all(isinstance(control, dict) and _are_files(control.get("files")) for control in controls)
        and isinstance(raw.get("collage", {}), dict)
        and isinstance(raw.get("collage", {}).get("layers", []), list)
    )
    if not good:
        raise RequestError(
            f"{path}: its {KEYWORD} text is damaged (request, size, model, inputs, controls or collage); draw it anew"
        )
    return Record(
        written_by="glassine",
        request=raw["request"],
        size=(size[0], size[1]),
        model=raw["model"],
        inputs=inputs,
        controls=tuple(controls),
        collage=raw.get("collage"),
    )


def _are_files(raw: Any) -> bool:
    return isinstance(raw, dict) and all(_are(file, str) and {"name", "sha256"} <= set(file) for file in raw.values())


def _are(raw: Any, kind: type) -> bool:
    return isinstance(raw, dict) and all(isinstance(value, kind) for value in raw.values())


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
