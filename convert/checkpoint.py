"""A weights file or folder -> names, shapes and where the bytes lie. No tensor is read here.

A safetensors file is eight bytes (length of the header), the header (JSON: name -> dtype, shape, data_offsets) and the
tensors. Files come from strangers: nothing in the header is believed before it has been checked.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
_ITEM_SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}
FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")

# Parts of a diffusers folder and the stem of their weights files.
COMPONENTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_COMPONENT_OF_CLASS = {
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
# Networks that steer a UNet, and what their keys begin with here.
CONTROL_CLASSES = {"ControlNetModel": "control", "ControlNetUnionModel": "control", "T2IAdapter": "adapter"}
CONTROL_ADVICE = (
    "it steers a model and is none itself: add it to a converted one with 'glassine convert FILE --base FOLDER', or "
    "convert it beside a checkpoint with --control FILE"
)

_NOT_SAFETENSORS = (
    (b"PK\x03\x04", "a PyTorch pickle in a zip"),
    (b"\x80\x02", "a PyTorch pickle"),
    (b"\x80\x04", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to: run 'git lfs pull'"),
    (b"<", "a web page: the download gave a page instead of the file, probably one that asks to log in"),
)
_PICKLE_ADVICE = (
    "A pickle can run any program when it is opened, so Glassine opens none unasked. Look for the .safetensors version "
    "of {name}; if there is none, --allow-pickle reads it with torch's weights-only loader, which takes tensors and "
    "nothing else"
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: `offset` counts from the file's first byte; -1 where it is only to be had by `read`."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.floating[Any]]:
        """The flat elements [start, stop), exactly: float16 for F16 and the fp8 formats, float32 for BF16, else as is.

        Raises:
            CheckpointError: the tensor does not hold floats, or the file became shorter.
        """
        if self.dtype not in FLOATS:
            raise CheckpointError(
                f'{self.path}: tensor "{self.key}" has dtype {self.dtype}, expected one of {", ".join(FLOATS)}; '
                "quantised files are not supported, use the fp16 version of this model"
            )
        size = _ITEM_SIZES[self.dtype]
        stop = self.nbytes // size if stop is None else stop
        buffer = bytearray((stop - start) * size)
        with open_weights(self.path) as read:
            read(memoryview(buffer), self.offset + start * size)
        return _decode(buffer, self.dtype)


@contextmanager
def open_weights(path: Path) -> Iterator[Callable[[memoryview, int], None]]:
    """Give a function that fills a buffer with the bytes of `path` from an offset on.

    Raises:
        CheckpointError: the file cannot be read, or ends too early.
    """

    def read(buffer: memoryview, offset: int) -> None:
        try:
            file.seek(offset)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{path}: the file became shorter while it was read")
                buffer = buffer[count:]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        yield read


def _decode(buffer: bytearray, dtype: str) -> NDArray[np.floating[Any]]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(buffer, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (np.frombuffer(buffer, np.uint8).astype(np.uint16) << 8).view(np.float16)
    if dtype == "F8_E4M3":
        return _E4M3[np.frombuffer(buffer, np.uint8)]
    return np.frombuffer(buffer, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


def _e4m3_values() -> NDArray[np.float16]:
    """The 256 values of float8_e4m3fn: bias 7, no infinities, NaN at S.1111.111; all are exact in float16."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[(code & 127) == 127] = np.nan
    return np.where(code & 128, -values, values).astype(np.float16)


_E4M3 = _e4m3_values()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a file or a diffusers folder holds.

    tensors: by key; a folder's keys begin with the part, "unet/conv_in.weight". metadata: the header's
    `__metadata__`. configs: the JSON files of a folder by part ("unet", "vae", "text_encoder",
    "text_encoder_2", "scheduler") and "model_index".
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The weights files, each once."""
        return sorted({tensor.path for tensor in self.tensors.values()})


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read the header of a .safetensors file, or the headers of a diffusers folder.

    Args:
        path: the file or folder.
        allow_pickle: a PyTorch pickle is read too, by torch's weights-only loader (`convert/pickles.py`).

    Raises:
        CheckpointError: missing, not safetensors, damaged, or a folder without weights.
    """
    if path.is_dir():
        return _open_folder(path, allow_pickle)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .safetensors file or a diffusers folder")
    if allow_pickle and is_pickle(path):
        from glassine.convert.pickles import open_pickle

        return open_pickle(path)
    tensors, metadata = read_header(path)
    return Checkpoint(path=path, tensors=tensors, metadata=metadata)


def is_pickle(path: Path) -> bool:
    """Whether a file is one of PyTorch's pickles, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return any(start.startswith(magic) for magic, what in _NOT_SAFETENSORS if "pickle" in what)


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of one safetensors file, every claim of its header checked.

    Raises:
        CheckpointError: not a safetensors file, truncated, or its header lies.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if length > min(size - 8, MAX_HEADER) or start[8:9] != b"{":
                _refuse_other_formats(path, start)
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: it should begin with a header of {length} bytes "
                    f"and has {size} bytes in all; download it again"
                )
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    entries = _parse(path, header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: damaged header: __metadata__ is not a map of strings")
    tensors = {key: _tensor(path, key, entry, 8 + length) for key, entry in entries.items()}
    _check_spans(path, list(tensors.values()), 8 + length, size)
    return tensors, metadata


def _refuse_other_formats(path: Path, start: bytes) -> None:
    for magic, what in _NOT_SAFETENSORS:
        if start.startswith(magic):
            advice = f". {_PICKLE_ADVICE.format(name=path.name)}" if "pickle" in what else ""
            raise CheckpointError(f"{path}: expected a safetensors file, this is {what}{advice}")


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f'{path}: damaged header: "{twice}" stands there twice')
        return result

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: not JSON ({error}); download the file again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: damaged header: expected a map of tensors, got a {type(entries).__name__}")
    return entries


def _tensor(path: Path, key: str, entry: object, data: int) -> Tensor:
    def is_sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 60 for size in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f'{path}: damaged header: tensor "{key}" has no dtype, shape and data_offsets')
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise CheckpointError(
            f'{path}: tensor "{key}" has the unknown dtype {dtype!r}; known: {", ".join(_ITEM_SIZES)}'
        )
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f'{path}: damaged header: tensor "{key}" has shape {shape!r}, data_offsets {offsets!r}')
    nbytes = math.prod(shape) * _ITEM_SIZES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f'{path}: damaged header: tensor "{key}" of {dtype} {tuple(shape)} needs {nbytes} bytes, '
            f"its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return Tensor(path, key, dtype, tuple(shape), data + offsets[0], nbytes)


def _check_spans(path: Path, tensors: list[Tensor], data: int, size: int) -> None:
    """The tensors must lie side by side and fill the file to its last byte, as the format demands."""
    end, last = data, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a gap behind"
            raise CheckpointError(f'{path}: damaged header: tensor "{tensor.key}" {what} "{last}"')
        end, last = tensor.offset + tensor.nbytes, tensor.key
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: the header promises {end} bytes, the file has {size} "
            f"({end - size} are missing); download it again"
        )
    if end < size:
        raise CheckpointError(f"{path}: damaged: {size - end} bytes behind the last tensor belong to none")


def _open_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    if (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        pipeline = read_json(folder / "model_index.json").get("_class_name")
        raise CheckpointError(
            f"{folder}: model_index.json says {pipeline}: a diffusion transformer (transformer/), expected Stable "
            "Diffusion 1, 2 or XL, which have a unet/"
        )
    parts = {part: folder / part for part in COMPONENTS if (folder / part).is_dir()}
    if not parts and (folder / "config.json").is_file():
        parts = {_component(folder): folder}
    if not parts:
        raise CheckpointError(
            f"{folder}: no weights here; expected a diffusers folder (with unet/, vae/ and text_encoder/) "
            "or one of its parts with its config.json"
        )
    tensors: dict[str, Tensor] = {}
    configs = {
        part: read_json(place / "config.json") for part, place in parts.items() if (place / "config.json").is_file()
    }
    for name, path in (
        ("scheduler", folder / "scheduler" / "scheduler_config.json"),
        ("", folder / "model_index.json"),
    ):
        if path.is_file():
            configs[name if name else "model_index"] = read_json(path)
    for part, place in parts.items():
        found = _component_tensors(place, COMPONENTS[part], allow_pickle)
        tensors |= {f"{part}/{key}": tensor for key, tensor in found}
    return Checkpoint(path=folder, tensors=tensors, configs=configs)


def open_component(folder: Path, classes: Mapping[str, str]) -> Checkpoint:
    """Read the headers of one diffusers folder that stands alone.

    Args:
        folder: holds config.json and its weights.
        classes: of diffusers, and what to call each: the keys begin with that word, "control/conv_in.weight".

    Raises:
        CheckpointError: config.json describes something else, or the weights are missing or damaged.
    """
    config = read_json(folder / "config.json")
    part = classes.get(str(config.get("_class_name")))
    if part is None:
        said = f"{folder / 'config.json'}: describes {config.get('_class_name')}"
        raise CheckpointError(f"{said}, expected one of {', '.join(classes)}")
    tensors = {f"{part}/{key}": tensor for key, tensor in _component_tensors(folder, "diffusion_pytorch_model")}
    return Checkpoint(path=folder, tensors=tensors, configs={part: config})


def _component(folder: Path) -> str:
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    for name in names:
        if isinstance(name, str) and name in _COMPONENT_OF_CLASS:
            return _COMPONENT_OF_CLASS[name]
    if config.get("_class_name") in CONTROL_CLASSES:
        raise CheckpointError(f"{folder}: this is a {config['_class_name']}; {CONTROL_ADVICE}")
    known = ", ".join(_COMPONENT_OF_CLASS)
    raise CheckpointError(f"{folder / 'config.json'}: describes {names}, expected one of {known}")


def _component_tensors(folder: Path, stem: str, allow_pickle: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one part: one file or an index with shards, in full or as the fp16 variant."""
    for variant in ("", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            yield from read_header(single)[0].items()
            return
        for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
            if (folder / index).is_file():
                yield from _sharded(folder / index)
                return
    pickles = [folder / name for name in (f"{stem}.bin", "pytorch_model.bin") if (folder / name).is_file()]
    if allow_pickle and pickles:
        from glassine.convert.pickles import open_pickle

        yield from open_pickle(pickles[0]).tensors.items()
        return
    present = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".safetensors", ".pt", ".ckpt"})
    expected = f"{folder}: expected {stem}.safetensors, found {', '.join(present) if present else 'no weights'}"
    if any(not name.endswith(".safetensors") for name in present):
        raise CheckpointError(f"{expected}; {_PICKLE_ADVICE.format(name=present[0])}")
    raise CheckpointError(expected)


def _sharded(index: Path) -> Iterator[tuple[str, Tensor]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensor to file")
    found: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        # An index is as untrusted as the weights: a shard lies beside it, nowhere else.
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f'{index}: names the shard "{name}", which is not a file of this folder')
        tensors, _ = read_header(index.parent / name)
        wrong = [key for key in tensors if weight_map.get(key) != name]
        if wrong:
            raise CheckpointError(f"{index}: {name} holds {shorten(wrong)}, the index says otherwise")
        found |= tensors
    missing = sorted(set(weight_map) - set(found))
    if missing:
        raise CheckpointError(f"{index}: promises {shorten(missing)}, no shard holds them; download the folder again")
    yield from found.items()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def shorten(names: list[str], most: int = 6) -> str:
    """A list of names for a message: the first few and how many more."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
