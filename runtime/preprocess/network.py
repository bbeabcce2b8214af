"""A network the user brings: an .mlpackage on our engines, or an .onnx on onnxruntime; a picture in, an array out.

pixels -> the size the network takes -> its normalisation -> run -> the part of the output that the picture covers
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine.errors import EngineError, MissingDependency, RequestError
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.engine.portable.program import Feature, read_package
from glassine.runtime.image import Bytes

Float = NDArray[np.float32]

_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
# What networks want RGB of 0..255 to be; each takes and returns (H, W, 3) float32.
NORMALISATIONS: dict[str, Callable[[Float], Float]] = {
    "imagenet": lambda rgb: np.asarray((rgb / np.float32(255) - _MEAN) / _STD, np.float32),
    "signed": lambda rgb: rgb / np.float32(127.5) - 1,
    "unit": lambda rgb: rgb / np.float32(255),
    "bytes": lambda rgb: rgb,
}


@dataclass(frozen=True, slots=True)
class Network:
    """A network with one picture as its input.

    run: an array of `shape` -> the output. shape: of the input; None where the network takes any size.
    normal: how it wants colours to be, where the file itself says so; None leaves it to the caller.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    run: Callable[[NDArray[Any]], NDArray[Any]]
    normal: str | None = None

    def __call__(self, pixels: Bytes, *, normal: str, multiple: int = 1) -> Float:
        """Run on (H, W, 3) uint8 RGB.

        A network of one size sees the picture stretched to it; one of any size sees it with its edges repeated up to
        multiples of `multiple`, and the margin is cut from what comes out.

        Returns:
            (C, h, w) float32: the output over the picture, at the network's own resolution.

        Raises:
            EngineError: the network fails, or its output is no picture or holds NaN.
        """
        height, width = pixels.shape[:2]
        channels_last = self.shape[3] == 3 and self.shape[1] != 3
        sides = self.shape[1:3] if channels_last else self.shape[2:4]
        fixed = (sides[0] or height, sides[1] or width)
        margins = tuple(0 if side else -length % multiple for side, length in zip(sides, fixed, strict=True))
        seen = np.pad(_stretched(pixels, fixed), ((0, margins[0]), (0, margins[1]), (0, 0)), mode="edge")
        values = NORMALISATIONS[self.normal or normal](seen.astype(np.float32)).astype(self.dtype)
        batch = values[None] if channels_last else np.moveaxis(values, -1, 0)[None]
        output = self._picture(self.run(np.ascontiguousarray(batch)), channels_last)
        h, w = (
            max(1, round(out * side / (side + margin)))
            for out, side, margin in zip(output.shape[1:], fixed, margins, strict=True)
        )
        return output[:, :h, :w]

    def _picture(self, output: NDArray[Any], channels_last: bool) -> Float:
        values = np.asarray(output)
        if values.ndim == 4:
            values = (np.moveaxis(values, -1, 1) if channels_last else values)[0]
        if values.ndim == 2:
            values = values[None]
        if values.ndim != 3 or not values.size:
            raise EngineError(f"{self.name}: its output has shape {output.shape}, expected (1, C, h, w) or (1, h, w)")
        if not np.isfinite(values).all():
            raise EngineError(
                f"{self.name}: its output holds NaN or infinity; run it in fp32, or say what input it wants (input=...)"
            )
        return np.asarray(values, np.float32)


def open_network(path: Path, engine: EngineOptions | None = None) -> Network:
    """Open a network: FILE.onnx or FILE.mlpackage.

    Raises:
        RequestError: neither of the two, or no such file.
        MissingDependency: onnxruntime or PyTorch is needed and not installed.
        EngineError: the network cannot be loaded, or does not take one picture.
    """
    if path.suffix not in (".onnx", ".mlpackage"):
        raise RequestError(f"{path}: expected a network as FILE.onnx or FILE.mlpackage; convert others to ONNX first")
    if not path.exists():
        raise RequestError(f"{path}: no such file")
    return _onnx(path) if path.suffix == ".onnx" else _package(path, engine)


def _package(path: Path, options: EngineOptions | None) -> Network:
    features = read_package(path).function().inputs
    if [feature.kind for feature in features] == ["image"]:
        return _image_package(path, features[0])
    engine = open_engine(path, options)
    ((name, spec),) = _one(path, list(engine.inputs.items()))
    _check_shape(path, spec.shape)

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        outputs = engine.predict(**{name: batch})
        return list(outputs.values())[-1]

    return Network(str(path), spec.shape, "float32", run)


def _image_package(path: Path, feature: Feature) -> Network:
    """Open a package that takes an image, as Apple's own do; it knows how it wants the colours to be."""
    if sys.platform != "darwin":
        raise EngineError(
            f'{path}: input "{feature.name}" is an image, which only Core ML on a Mac takes; this is {sys.platform}: '
            "bring the network as .onnx"
        )
    from coremltools.models import MLModel

    model = MLModel(str(path))

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        try:
            outputs = model.predict({feature.name: Image.fromarray(batch[0].astype(np.uint8))})
        except RuntimeError as error:
            raise EngineError(f"{path}: Core ML failed to run it ({error})") from error
        output = list(outputs.values())[-1]
        values = np.asarray(output, np.float32)
        if isinstance(output, Image.Image):
            return values.reshape(1, *values.shape[:2], -1)
        return np.moveaxis(values, 1, -1) if values.ndim == 4 else values

    return Network(str(path), (1, *feature.shape, 3), "float32", run, normal="bytes")


def _onnx(path: Path) -> Network:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency(
            f"{path}: .onnx files are run by onnxruntime, which is not installed; "
            "install it with: pip install 'glassine[onnx]'"
        ) from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen classes of its own, all plain Exceptions
        raise EngineError(f"{path}: onnxruntime cannot load it ({_line(error)}); export the model again") from error
    (image,) = _one(path, list(session.get_inputs()))
    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
    if image.type not in dtypes:
        raise EngineError(f'{path}: input "{image.name}" is a {image.type}, expected one of {", ".join(dtypes)}')
    shape = tuple(side if isinstance(side, int) and side > 0 else None for side in image.shape)
    _check_shape(path, shape)

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        try:
            return np.asarray(session.run(None, {image.name: batch})[-1])
        except Exception as error:
            raise EngineError(
                f"{path}: onnxruntime failed on a picture of shape {batch.shape} ({_line(error)}); "
                "if it wants sides of some multiple, say which: multiple=14, multiple=32"
            ) from error

    return Network(str(path), shape, dtypes[image.type], run)


def _one(path: Path, inputs: list[Any]) -> list[Any]:
    if len(inputs) != 1:
        raise EngineError(f"{path}: has {len(inputs)} inputs, expected one: a picture")
    return inputs


def _check_shape(path: Path, shape: tuple[int | None, ...]) -> None:
    colours = len(shape) == 4 and shape[0] in (1, None) and (shape[1] in (3, None) or shape[3] == 3)
    if not colours:
        raise EngineError(f"{path}: its input has shape {shape}, expected a picture: (1, 3, H, W) or (1, H, W, 3)")


def _stretched(pixels: Bytes, size: tuple[int, int]) -> Bytes:
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    smaller = height * width < pixels.shape[0] * pixels.shape[1]
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=interpolation), np.uint8)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
