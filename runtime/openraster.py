"""Layers -> one OpenRaster file (.ora), which GIMP, Krita, MyPaint and others open, and layers out of theirs.

A zip file: `mimetype` first and stored, `stack.xml` with the layers from the front to the back, their pictures under
`data/`, the composite `mergedimage.png` and a thumbnail.
Source: OpenRaster 0.0.5, freedesktop.org/specifications/openraster.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.compose import over
from glassine.runtime.image import read_picture, replaced

Bytes = NDArray[np.uint8]

SUFFIX = ".ora"
_MIMETYPE = "image/openraster"
_VERSION = "0.0.5"
_OVER = "svg:src-over"
_LONGEST, _LARGEST = 1 << 22, 1 << 30  # bytes that are read of stack.xml, and of a picture
_THUMBNAIL = 256  # pixels of the longer side
# What the readers of zip, XML and PNG answer a damaged file with.
_DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    SyntaxError,
    RecursionError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)
_DATE = (1980, 1, 1, 0, 0, 0)  # the same layers make the same file


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One picture of a stack.

    pixels: (H, W, 4) uint8, straight alpha. visible: counts in the composite. Read from a file: x, y: where its left
    upper corner lies on the canvas; opacity: 0 to 1.
    """

    name: str
    pixels: Bytes
    visible: bool = True
    x: int = 0
    y: int = 0
    opacity: float = 1.0

    def covers(self, canvas: tuple[int, int]) -> bool:
        """Whether nothing behind it is seen on a canvas of (width, height)."""
        height, width = self.pixels.shape[:2]
        reaches = self.x <= 0 and self.y <= 0 and self.x + width >= canvas[0] and self.y + height >= canvas[1]
        return reaches and self.opacity == 1 and bool((self.pixels[..., 3] == 255).all())


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


def read_openraster(path: Path) -> tuple[list[Layer], tuple[int, int]]:
    """Read the layers of an OpenRaster file, the first at the back, and its canvas (width, height).

    Groups are taken apart: what lies in one has its offset, and is hidden or clear with it.

    Raises:
        RequestError: it cannot be read, is damaged, has no layers, or one that is mixed otherwise than by lying over
            those behind it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            listed = _read(archive, "stack.xml", _LONGEST)
            if b"<!DOCTYPE" in listed:  # whose entities may grow without end
                raise ValueError("stack.xml has a DOCTYPE")
            root = ElementTree.fromstring(listed)
            layers = [
                replace(entry, pixels=_pixels(_read(archive, src, _LARGEST)))
                for stack in root.findall("stack")
                for entry, src in _entries(stack, Layer(name="", pixels=np.empty((0, 0, 4), np.uint8)))
            ]
            canvas = int(root.attrib["w"]), int(root.attrib["h"])
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except _DAMAGED as error:
        raise RequestError(f"{path}: cannot be read ({error}); expected an OpenRaster file") from None
    if not layers:
        raise RequestError(f"{path}: has no layers")
    return layers[::-1], canvas


def _pixels(png: bytes) -> Bytes:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return read_picture(image, keep_alpha=True).pixels


def _read(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """One file of the archive, if it is not larger than that."""
    if archive.getinfo(name).file_size > most:
        raise ValueError(f"{name} has more than {most} bytes")
    return archive.read(name)


def _entries(stack: ElementTree.Element, group: Layer) -> Iterator[tuple[Layer, str]]:
    """What lies in a stack, from the front, and the names of the pictures."""
    for entry in stack:
        if entry.tag not in ("layer", "stack"):
            continue
        mixed = entry.get("composite-op", _OVER)
        if mixed != _OVER:
            raise ValueError(
                f'layer "{entry.get("name", "")}" is mixed by {mixed}; merge it down, only {_OVER} is read'
            )
        own = Layer(
            name=entry.get("name", ""),
            pixels=group.pixels,
            visible=group.visible and entry.get("visibility", "visible") == "visible",
            x=group.x + int(entry.get("x", "0")),
            y=group.y + int(entry.get("y", "0")),
            opacity=group.opacity * min(1.0, max(0.0, float(entry.get("opacity", "1")))),
        )
        if entry.tag == "stack":
            yield from _entries(entry, own)
        elif entry.get("src") is not None:
            yield own, entry.attrib["src"]


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
            "composite-op": _OVER,
        }
        ElementTree.SubElement(stack, "layer", attributes)
    return bytes(ElementTree.tostring(image, encoding="UTF-8", xml_declaration=True))


def _png(pixels: Bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
