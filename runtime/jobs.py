"""A file of jobs: one JSON object a line -> jobs that are checked, each with its place and its digest.

    {"prompt": "a paper boat", "seed": 7, "model": "dreamshaper", "out": "boat.png"}
    {"prompt": "a swan", "image": "boat.png", "change_map": "gradient:left-right", "steps": 30}

The digest stands for everything that decides a picture, and the picture carries it. So a folder of pictures says by
itself which jobs are done; there is no journal that could disagree with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from glassine.errors import GlassineError, RequestError
from glassine.runtime.change_map import is_description
from glassine.runtime.collage import Collage
from glassine.runtime.collage_inputs import columns_of
from glassine.runtime.collage_project import Project, read_project, recorded
from glassine.runtime.control import Control
from glassine.runtime.image import Source
from glassine.runtime.inputs import MapSource
from glassine.runtime.metadata import file_sha256
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import choose_sampler, sigmas_of
from glassine.runtime.token_spans import PromptTokens

KEYWORD = "glassine-job"  # of the text chunk that holds a picture's digest
_PICTURES = ("image", "change_map", "mask", "softness", "map_white")
INPUTS = ("out", "model", "size", "refiner", *_PICTURES, "controls", "collage")
_SETTINGS = tuple(setting.name for setting in dataclasses.fields(Request) if setting.name != "layers")
_CONTROL = tuple(setting.name for setting in dataclasses.fields(Control))
_CONTROL_NUMBERS = ("weight", "start", "stop")
_SHOWN = 20  # faults that are listed
_MESSAGE = 1000  # characters of one that are shown
_LONGEST = 200  # bytes of a picture's name: file systems take 255, a picture that is being written has a longer one
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One picture to draw.

    line: of the file, from 1. out: the picture's path. digest: sha256, hexadecimal, of all that decides the picture.
    model, refiner: folders. size: (width, height) in pixels; None is the model's first.
    """

    line: int
    out: Path
    digest: str
    request: Request
    model: Path
    size: tuple[int, int] | None = None
    refiner: Path | None = None
    image: Path | None = None
    maps: MapSource = field(default_factory=MapSource)
    controls: tuple[Control, ...] = ()
    collage: Collage | None = None

    @property
    def done(self) -> bool:
        """Whether its picture is there."""
        try:
            with Image.open(self.out, formats=("PNG",)) as image:
                return bool(image.info.get(KEYWORD) == self.digest)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return False


def read_jobs(file: Path, out: Path, *, model: Path | None = None) -> list[Job]:
    """Read a file of jobs and check all of it, so that nothing is drawn before every line makes sense.

    Paths in it are taken from the file's own folder.

    Args:
        file: JSON objects, one a line; empty lines are passed over. out: the folder of the pictures.
        model: the folder of jobs that name none.

    Raises:
        RequestError: names every line that is damaged, asks for what cannot be drawn, or for another line's output.
    """
    planner, jobs, faults = _Planner(file.parent, out, model), list[Job](), list[str]()
    for number, line in _lines(file):
        try:
            jobs.append(planner.job(number, _fields(line)))
        except GlassineError as error:
            faults.append(f"{file}:{number}: {_shortened(str(error))}")
    taken: dict[str, Job] = {}
    for job in jobs:
        # What the file systems of a Mac take for the same name.
        first = taken.setdefault(unicodedata.normalize("NFC", job.out.name).casefold(), job)
        if first is not job:
            faults.append(f"{file}:{job.line}: writes {job.out.name}, as line {first.line} does; give it another out")
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise RequestError("\n".join([*faults[:_SHOWN], *more, "nothing was drawn"]))
    if not jobs:
        raise RequestError(f"{file}: has no jobs; expected one JSON object a line")
    return jobs


def _shortened(text: str) -> str:
    """A message without the megabytes that a line may have as a value."""
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]} ... ({len(text)} characters)"


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{file}: cannot be read ({error}); expected text in UTF-8, one JSON object a line"
        ) from None
    # Not splitlines(): U+2028 and its like may stand in a prompt.
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _fields(line: str) -> Json:
    try:
        fields = json.loads(line, object_pairs_hook=_once, parse_constant=_refused_constant)
        json.dumps(fields, ensure_ascii=False).encode()  # half of a character (\\ud800) is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"damaged ({error}); expected one JSON object") from None
    if not isinstance(fields, dict):
        raise RequestError(f"is {type(fields).__name__}, expected one JSON object")
    unknown = sorted(set(fields) - {*INPUTS, *_SETTINGS})
    if "layers" in unknown:
        raise RequestError('"layers" draws several pictures, a job draws one; use glassine layers')
    if unknown:
        raise RequestError(f"unknown fields {unknown}; a job has {', '.join((*INPUTS, *_SETTINGS))}")
    return fields


class _Planner:
    """Turns the fields of one line after the other into jobs; each model's manifest and each file is read once."""

    def __init__(self, folder: Path, out: Path, model: Path | None) -> None:
        self._folder = folder
        self._out = out
        self._model = model
        self._pipes: dict[object, Pipeline] = {}
        self._hashes: dict[Path, str] = {}

    def job(self, line: int, fields: Json) -> Job:
        model, refiner = self._path(fields, "model"), self._path(fields, "refiner")
        project = self._project(fields)
        if model is None:
            model = self._model if project is None or project.model is None else project.model
        if model is None:
            raise RequestError('has no "model"; name its folder, or give one for all jobs (--model)')
        size, image, maps = _size(fields), self._path(fields, "image"), self._maps(fields)
        if maps.source is not None and image is None:
            raise RequestError("a change map says how much of a picture may change; give the picture too (image)")
        controls = tuple(self._control(raw) for raw in _list(fields, "controls"))
        if size is None and project is not None:
            size = project.size
        pipe = self._pipe(model, size, refiner)
        settings = {name: value for name, value in fields.items() if name not in INPUTS}
        if project is not None:
            settings = {**project.settings, **settings}
        request = pipe.request(settings, image_alone=image is not None and maps.source is None)
        choose_sampler(request)
        sigmas_of(pipe.schedule, request)
        content = {
            "request": _said(request),
            "size": pipe.size,
            "model": _model_of(pipe),
            "refiner": None if pipe.refiner is None else _model_of(pipe.refiner),
            "image": self._content(image),
            "map": [self._content(maps.map), self._content(maps.mask), maps.softness, maps.white],
            "controls": [self._control_content(control) for control in controls],
        }
        if project is not None:  # digests of other jobs are as they were before there were collages
            columns_of(PromptTokens.of(pipe.tokenizer, request.prompt, pipe.manifest.tokens), project.collage.layers)
            content["collage"] = recorded(project.collage)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return Job(
            line=line,
            out=self._out / _name(fields, digest),
            digest=digest,
            request=request,
            model=model,
            size=size,
            refiner=refiner,
            image=image,
            maps=maps,
            controls=controls,
            collage=None if project is None else project.collage,
        )

    def _project(self, fields: Json) -> Project | None:
        """The collage that a job draws; its settings count where the job says none."""
        path = self._path(fields, "collage")
        if path is None:
            return None
        both = [name for name in _PICTURES if fields.get(name) is not None]
        if both:
            raise RequestError(f"a collage is the picture and its change map; leave {', '.join(both)} out")
        return read_project(path, _text(fields, "prompt"))

    def _pipe(self, model: Path, size: tuple[int, int] | None, refiner: Path | None) -> Pipeline:
        key = (model, size, refiner)
        if key not in self._pipes:
            self._pipes[key] = Pipeline.load(model, size=size, refiner=refiner)  # reads manifests, loads no package
        return self._pipes[key]

    def _path(self, fields: Json, name: str) -> Path | None:
        text = _text(fields, name)
        return None if text is None else self._folder / text

    def _picture(self, fields: Json, name: str) -> Source | None:
        """A file, or what words such as "gradient:left-right" describe."""
        text = _text(fields, name)
        return text if text is not None and is_description(text) else self._path(fields, name)

    def _maps(self, fields: Json) -> MapSource:
        white = _text(fields, "map_white")
        if white not in (None, "change", "keep"):
            raise RequestError(f'"map_white" is {white!r}, expected "change" or "keep"')
        return MapSource(
            map=self._picture(fields, "change_map"),
            mask=self._path(fields, "mask"),
            softness=_number(fields, "softness", 0.0),
            white="keep" if white == "keep" else "change",
        )

    def _control(self, raw: Any) -> Control:
        if not isinstance(raw, dict) or set(raw) - set(_CONTROL):
            raise RequestError(f"control {raw!r}: expected an object with {', '.join(_CONTROL)}")
        net = _text(raw, "net")
        if net is None:
            raise RequestError(f'control {raw!r}: has no "net"')
        texts = {name: _text(raw, name) for name in ("preprocess", "control_type", "fit", "mode", "interval")}
        given: Json = {name: text for name, text in texts.items() if text is not None}
        given.update({name: _number(raw, name, 0.0) for name in _CONTROL_NUMBERS if raw.get(name) is not None})
        return Control(
            str(self._folder / net) if net.endswith((".mlpackage", ".mlmodelc")) else net,
            self._path(raw, "image"),
            map=self._picture(raw, "map"),
            mask=self._path(raw, "mask"),
            **given,
        )

    def _control_content(self, control: Control) -> Json:
        pictures = {name: self._content(getattr(control, name)) for name in ("image", "map", "mask")}
        return {**_said(control), "net": Path(control.net).name, **pictures}

    def _content(self, source: Source | None) -> str | None:
        """What a file holds, by its hash; words as they are."""
        if not isinstance(source, Path):
            return None if source is None else str(source)
        if source not in self._hashes:
            try:
                self._hashes[source] = file_sha256(source)
            except OSError as error:
                raise RequestError(f"{source}: cannot be read ({error.strerror or error})") from None
        return self._hashes[source]


def _model_of(pipe: Pipeline) -> Json:
    """What tells a model from others; the same model converted anew is the same."""
    manifest, unet = pipe.manifest, pipe.manifest.parts.get("unet")
    return {
        "name": manifest.name,
        "unet": None if unet is None else [unet.source_sha256, unet.palette],
        "loras": [[lora.sha256, lora.unet, lora.text] for lora in manifest.loras],
    }


def _said(settings: Request | Control) -> Json:
    """The fields that are not as they are by default: a field that a later version adds changes no digest."""
    return {
        each.name: getattr(settings, each.name)
        for each in dataclasses.fields(settings)
        if getattr(settings, each.name) != each.default
    }


def _name(fields: Mapping[str, Any], digest: str) -> str:
    name = _text(fields, "out")
    if name is None:
        return f"{digest[:16]}.png"
    if name.startswith(".") or "\\" in name or Path(name).name != name or not name.lower().endswith(".png"):
        raise RequestError(f'"out" is {name!r}, expected the plain name of a .png file')
    if len(name.encode()) > _LONGEST:
        raise RequestError(f'"out" is a name of {len(name.encode())} bytes, expected at most {_LONGEST}')
    return name


def _size(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    size = fields.get("size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
        raise RequestError(f'"size" is {size!r}, expected [width, height] in pixels')
    return size[0], size[1]


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not (isinstance(value, str) and value and "\0" not in value):
        raise RequestError(f'"{name}" is {value!r}, expected a text')
    return value


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f'"{name}" is {value!r}, expected a number')
    return float(value)


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, list):
        raise RequestError(f'"{name}" is {value!r}, expected a list')
    return [] if value is None else value


def _once(pairs: Sequence[tuple[str, Any]]) -> Json:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is given twice")
    return fields


def _refused_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
