"""Layers -> one OpenRaster file (.ora), which GIMP, Krita, MyPaint and others open.

A zip file: `mimetype` first and stored, `stack.xml` with the layers from the front to the back, their pictures under
`data/`, the composite `mergedimage.png` and a thumbnail.
Source: OpenRaster 0.0.5, freedesktop.org/specifications/openraster.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.compose import over
from glassine.runtime.image import replaced

Bytes = NDArray[np.uint8]

SUFFIX = ".ora"
_MIMETYPE = "image/openraster"
_VERSION = "0.0.5"
_THUMBNAIL = 256  # pixels of the longer side
_DATE = (1980, 1, 1, 0, 0, 0)  # the same layers make the same file


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One picture of a stack. pixels: (H, W, 4) uint8, straight alpha. visible: counts in the composite."""

    name: str
    pixels: Bytes
    visible: bool = True


def save_openraster(path: Path, layers: Sequence[Layer], *, overwrite: bool = False) -> None:
    """Write layers, the first at the back, as an OpenRaster file: whole, or not at all.

    Raises:
        RequestError: the path is refused or cannot be written, there is no visible layer, or sizes differ.
    """
    check_openraster(path, overwrite=overwrite)
    merged = over([layer.pixels for layer in layers if layer.visible])
    height, width = merged.shape[:2]
    thumbnail = Image.fromarray(merged)
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    files = {f"data/layer{index}.png": _png(layer.pixels) for index, layer in enumerate(layers)}
    entries = {
        "stack.xml": _stack(layers, width, height),
        **files,
        "mergedimage.png": _png(merged),
        "Thumbnails/thumbnail.png": _png(np.asarray(thumbnail)),
    }
    with replaced(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("mimetype", _DATE), _MIMETYPE, zipfile.ZIP_STORED)
        for name, content in entries.items():
            # PNG is compressed already
            kind = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name, _DATE), content, kind)


def check_openraster(path: Path, *, overwrite: bool = False) -> None:
    """Raise RequestError if no OpenRaster file can be saved as `path`."""
    if path.suffix.lower() != SUFFIX:
        raise RequestError(f"{path}: expected a name ending in {SUFFIX}")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise RequestError(f"{path}: is a folder, expected a file name")
    if path.exists() and not overwrite:
        raise RequestError(f"{path}: exists; choose another name or say --overwrite")


def _stack(layers: Sequence[Layer], width: int, height: int) -> bytes:
    image = ElementTree.Element("image", version=_VERSION, w=str(width), h=str(height), xres="72", yres="72")
    stack = ElementTree.SubElement(image, "stack")
    for index, layer in reversed(list(enumerate(layers))):  # the first in the file is the front
        attributes = {
            "name": layer.name,
            "src": f"data/layer{index}.png",
            "x": "0",
            "y": "0",
            "opacity": "1.0",
            "visibility": "visible" if layer.visible else "hidden",
            "composite-op": "svg:src-over",
        }
        ElementTree.SubElement(stack, "layer", attributes)
    return bytes(ElementTree.tostring(image, encoding="UTF-8", xml_declaration=True))


def _png(pixels: Bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
