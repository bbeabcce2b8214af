"""glassine.json: what a converted folder holds. Written by the converter, read by the runtime."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from glassine.errors import PackageError

FORMAT_VERSION = 1
FILE_NAME = "glassine.json"
STORE = ".glassine"  # of a model folder: what Glassine keeps for itself
WEIGHT_FILE = "Data/com.apple.CoreML/weights/weight.bin"  # of a package
TUNED = "tuned_"  # of the role of a part that is another form of the network of the role behind it

Prediction = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One package of the folder.

    inputs, outputs: name -> [shape, dtype]. source, source_sha256: the weights file it was made of. config: the
    network's description (`models.config`), from which its graph can be written again without the source. about: what
    only this kind of part has to say.
    """

    file: str
    role: str
    inputs: dict[str, tuple[tuple[int, ...], str]]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    parameters: int
    precision: str
    source: str
    source_sha256: str
    attention: str | None = None
    layout: str | None = None
    palette: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """The training noise schedule (all of Stable Diffusion 1 and 2 and SDXL: the defaults)."""

    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    zero_terminal_snr: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLora:
    """A LoRA in the weights: its strengths for the UNet and the text encoders.

    removable: `glassine lora` merged it and can take it out again; else it was merged at conversion.
    """

    name: str
    sha256: str
    unet: float
    text: float
    removable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A textual inversion in the text encoders: `word` in a prompt becomes the tokens [first, first + count)."""

    word: str
    first: int
    count: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A converted model: sizes in pixels, `batch` rows and `tokens` per UNet call.

    parts: by role ("text_encoder", "unet", "vae_decoder", "vae_encoder"), and for every size beyond the first by role
    and size ("unet_768x512"). defaults: settings of a picture (`runtime.request`) that this model is made for.
    decided: what was decided at conversion -> by which tensor or word.
    """

    name: str
    family: str
    prediction_type: Prediction
    width: int
    height: int
    batch: int
    tokens: int
    latent_scale: float
    clip_skip: int
    parts: dict[str, Part]
    scheduler: Scheduler = field(default_factory=Scheduler)
    defaults: dict[str, Any] = field(default_factory=dict)
    decided: dict[str, str] = field(default_factory=dict)
    loras: tuple[MergedLora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of every size there is a UNet for, the model's own first."""
        further = (key.partition("_")[2].split("x") for key in self.parts if key.startswith("unet_"))
        return ((self.width, self.height), *((int(width), int(height)) for width, height in further))

    def part(self, role: str, size: tuple[int, int]) -> Part | None:
        """Return the part that plays `role` at `size`, or None; text encoders serve all sizes."""
        if size == (self.width, self.height) or role.startswith("text_encoder"):
            return self.parts.get(role)
        return self.parts.get(f"{role}_{size[0]}x{size[1]}")

    def write(self, folder: Path) -> None:
        """Write glassine.json into `folder`."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (folder / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read glassine.json from `folder`.

        Raises:
            PackageError: no such file, not JSON, unknown or missing fields, or written by a newer Glassine.
        """
        finish_swap(folder)
        path = folder / FILE_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise PackageError(
                f"{folder}: no {FILE_NAME} here; expected a folder made by 'glassine convert CHECKPOINT FOLDER'"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise PackageError(f"{path}: cannot be read ({error}); convert the model again") from None
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise PackageError(
                f"{path}: format_version {version}, this Glassine reads {FORMAT_VERSION}; "
                "update Glassine or convert the model again"
            )
        try:
            parts = {role: _part(part) for role, part in raw.pop("parts").items()}
            loras = tuple(MergedLora(**lora) for lora in raw.pop("loras", ()))
            embeddings = tuple(Embedding(**embedding) for embedding in raw.pop("embeddings", ()))
            scheduler = Scheduler(**raw.pop("scheduler"))
            manifest = cls(parts=parts, scheduler=scheduler, loras=loras, embeddings=embeddings, **raw)
            numbers = (manifest.width, manifest.height, manifest.batch, manifest.tokens, manifest.clip_skip)
            if not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError(f"width, height, batch, tokens and clip_skip are {numbers}, not positive integers")
            if manifest.prediction_type not in get_args(Prediction):
                raise ValueError(f"prediction_type is {manifest.prediction_type!r}")
            if not isinstance(manifest.defaults, dict):
                raise ValueError(f"defaults is {manifest.defaults!r}, not an object")
            if not manifest.sizes or type(manifest.latent_scale) is not float:
                raise ValueError(f"latent_scale is {manifest.latent_scale!r}")
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackageError(f"{path}: not a valid manifest ({error}); convert the model again") from None


def finish_swap(folder: Path) -> None:
    """Finish a change of weights that was interrupted after it had been decided: rename what waits into place.

    `convert/swap.py` puts every new weight.bin as PACKAGE.bin, whatever else is new (whole packages too), an empty
    X.gone for every X that is to go, and the new manifest, into one folder and gives that its name when all is there.
    Renaming a file that another process has renamed already is no error.

    Raises:
        PackageError: the folder cannot be written, so its parts do not fit one another.
    """
    waiting = folder / STORE / "swap"
    if not waiting.is_dir():
        return
    try:
        # The manifest is the last: as long as it is the old one, the change may be taken up again.
        for file in sorted(waiting.iterdir(), key=lambda file: (file.name == FILE_NAME, file.name)):
            target = folder / file.stem / WEIGHT_FILE if file.suffix == ".bin" else folder / file.name
            with suppress(FileNotFoundError):
                if file.suffix == ".gone" and Path(file.stem).suffix in (".mlpackage", ".json"):  # not of ".."
                    target = folder / file.stem
                    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
                    file.unlink()
                    continue
                if file.is_dir():  # a package takes the place of an old one
                    shutil.rmtree(target, ignore_errors=True)
                file.rename(target)
                file.unlink(missing_ok=True)  # POSIX: a link renamed to another link of the same file stays
        with suppress(FileNotFoundError):
            waiting.rmdir()
    except OSError as error:
        raise PackageError(
            f"{folder}: a change of its LoRAs was interrupted and cannot be finished ({error}); make it writable"
        ) from None


def _part(raw: dict[str, Any]) -> Part:
    def specs(side: str) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in raw.pop(side).items()}

    # A manifest is untrusted: a part lives directly in its folder, nowhere else.
    if Path(raw["file"]).name != raw["file"]:
        raise ValueError(f"part file {raw['file']!r} is not a plain file name")
    return Part(inputs=specs("inputs"), outputs=specs("outputs"), **raw)
