"""Pictures and change maps, from files people have to arrays of the model's size, and back into a PNG.

Whatever a file's mode (1-bit, grey, palette, 16-bit, CMYK, with alpha, rotated by EXIF), a picture becomes (H, W, 3)
uint8 RGB and a map (H, W) float32 in [0, 1]. A picture that has the model's size already is not touched: its bytes are
what a change map protects.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from glassine.errors import EngineError, RequestError

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Fit = Literal["crop", "fit", "stretch"]
White = Literal["change", "keep"]
Source = Path | str | Image.Image | NDArray[Any]
Box = tuple[float, float, float, float]
Floats = TypeVar("Floats", bound=NDArray[np.floating[Any]])

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # no format that runs another program
BACKGROUND = (255, 255, 255)  # what shows through a transparent picture; A1111's default
# Pillow's decoders answer a damaged file with any of these.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture that has been read.

    pixels: (H, W, 3) uint8 RGB; a transparent picture stands over `BACKGROUND`. alpha: (H, W) uint8 or None if opaque.
        Read with `keep_alpha`, pixels are (H, W, 4), straight alpha, and alpha is None.
    icc_profile: of an RGB file; the bytes keep their meaning only together with it.
    size: (width, height) the file had, behind its EXIF rotation. notices: what was done to it, for the user.
    """

    name: str
    pixels: Bytes
    size: tuple[int, int]
    alpha: Bytes | None = None
    icc_profile: bytes | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A change map. values: (H, W) float32, 0 = keep, 1 = may change completely."""

    name: str
    values: Float
    notices: tuple[str, ...] = ()


def read_picture(source: Source, *, name: str = "image", keep_alpha: bool = False) -> Picture:
    """Read a picture from a file, a PIL image or an array (H, W), (H, W, 3) or (H, W, 4) of uint8.

    16-bit channels are rounded to 8 bits: round(v / 257).

    Raises:
        RequestError: no such file, not a picture, damaged, too large, or of a mode without a meaning as colour.
    """
    image, name = _open(source, name)
    if image.mode.startswith(("I", "F")):
        grey = _scaled(_grey(image, name), 255)
        image = Image.fromarray(grey)
    rgba = np.asarray(_rgba(image, name))
    icc = image.info.get("icc_profile")
    keeps_profile = isinstance(icc, bytes) and icc[16:20] == b"RGB " and image.mode in {"RGB", "RGBA", "P"}
    picture = Picture(
        name=name, pixels=rgba[..., :3].copy(), size=image.size, icc_profile=icc if keeps_profile else None
    )
    if keep_alpha:
        return replace(picture, pixels=rgba.copy())
    if rgba[..., 3].min() == 255:
        return picture
    alpha = rgba[..., 3].copy()
    note = f"{name}: transparent pixels are drawn over RGB {BACKGROUND}"
    return replace(picture, pixels=_over(picture.pixels, alpha), alpha=alpha, notices=(note,))


def read_map(source: Source, *, white: White = "change", name: str = "change map") -> Map:
    """Read a change map from a file, a PIL image or an array (H, W).

    Colours count by their luminance (0.299, 0.587, 0.114), 16-bit greys with their 16 bits, transparency as "keep".
    Arrays are bool, uint8, uint16, or floats in [0, 1].

    Args:
        white: what white means in the file; "keep" is how some other tools paint their masks.

    Raises:
        RequestError: as `read_picture`, or values outside 0..1 or not finite.
    """
    if isinstance(source, np.ndarray) and source.dtype.kind == "f":
        grey, alpha, notices = _Luminance(_checked_floats(source, name))
    else:
        image, name = _open(source, name)
        grey, alpha, notices = _luminance(image, name)
    values = grey if white == "change" else 1 - grey
    if alpha is not None:
        values = values * alpha
    return Map(name=name, values=values.astype(np.float32), notices=notices)


def fit_picture(picture: Picture, width: int, height: int, fit: Fit = "crop") -> Picture:
    """Bring a picture to the model's size.

    Args:
        fit: for another aspect: "crop" scales to cover and cuts evenly, "fit" scales to lie inside and repeats the
            edge pixels around it, "stretch" scales each side by itself.

    Raises:
        RequestError: width or height is not a positive multiple of 8.
    """
    check_size(width, height)
    if picture.size == (width, height):
        return picture
    box, inner = _placement(picture.size, (width, height), fit)
    pixels = _resized(Image.fromarray(picture.pixels), inner, box)
    alpha = None if picture.alpha is None else _resized(Image.fromarray(picture.alpha), inner, box)
    margins = _margins(inner, (width, height))
    note = f"{picture.name}: {_x(picture.size)} brought to {_x((width, height))} ({_SAYS[fit]})"
    return replace(
        picture,
        pixels=np.pad(pixels, (*margins, (0, 0)), mode="edge"),
        alpha=None if alpha is None else np.pad(alpha, margins, mode="edge"),
        notices=(*picture.notices, note),
    )


def fit_map(change_map: Map, picture_size: tuple[int, int], width: int, height: int, fit: Fit = "crop") -> Map:
    """Bring a map to the model's size in the way its picture was brought there.

    The margins that "fit" adds to the picture may change completely.

    Args:
        picture_size: `Picture.size`, the (width, height) of the picture as it was read.

    Raises:
        RequestError: the map's aspect is not the picture's (by more than a pixel), or the size is not a multiple of 8.
    """
    check_size(width, height)
    map_size = (change_map.values.shape[1], change_map.values.shape[0])
    if map_size == picture_size == (width, height):
        return change_map
    if abs(map_size[0] * picture_size[1] - map_size[1] * picture_size[0]) > max(*map_size, *picture_size):
        raise RequestError(
            f"{change_map.name}: is {_x(map_size)}, but the picture is {_x(picture_size)}; "
            "expected the picture's size, or another size of the same shape"
        )
    box, inner = _placement(picture_size, (width, height), fit)
    across, down = map_size[0] / picture_size[0], map_size[1] / picture_size[1]
    scaled = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    values = np.clip(_resized(Image.fromarray(change_map.values), inner, scaled, Image.Resampling.BILINEAR), 0, 1)
    values = np.pad(values, _margins(inner, (width, height)), constant_values=1)
    note = f"{change_map.name}: {_x(map_size)} brought to {_x((width, height))} as its picture"
    return replace(change_map, values=values, notices=(*change_map.notices, note))


def check_size(width: int, height: int) -> None:
    """Raise RequestError unless both sides are positive multiples of 8: one latent cell is 8x8 pixels."""
    if width <= 0 or height <= 0 or width % 8 or height % 8:
        nearest = (max(8, round(width / 8) * 8), max(8, round(height / 8) * 8))
        raise RequestError(f"size {_x((width, height))}: expected multiples of 8, for example {_x(nearest)}")


def to_model(pixels: Bytes) -> Float:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [-1, 1]."""
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)[None].astype(np.float32) / 127.5 - 1)


def over_grey(rgba: Bytes) -> Float:
    """(H, W, 4) uint8, straight alpha -> (1, 3, H, W) float32 in [-1, 1], over mid-grey: (2 rgb - 1) * alpha."""
    colours, alpha = rgba[..., :3].astype(np.float32) / 255, rgba[..., 3:].astype(np.float32) / 255
    return np.ascontiguousarray(np.moveaxis((2 * colours - 1) * alpha, -1, 0)[None])


def to_pixels(image: NDArray[np.floating[Any]]) -> Bytes:
    """(1, 3, H, W) floats -> (H, W, 3) uint8: round(127.5 * (x + 1)), halves to even, clipped to 0..255.

    Raises:
        EngineError: the picture holds NaN or infinity.
    """
    check_finite(image)
    scaled = np.rint(np.clip((image[0].astype(np.float32) + 1) * 127.5, 0, 255))
    return np.ascontiguousarray(np.moveaxis(scaled, 0, -1).astype(np.uint8))


def check_finite(image: Floats) -> Floats:
    """Return a decoded picture; raise EngineError if it holds NaN or infinity."""
    if not np.isfinite(image).all():
        raise EngineError(
            "decoded picture: holds NaN or infinity, expected numbers around -1 to 1; the VAE overflows in fp16: "
            "run it in fp32, or convert a VAE made for fp16"
        )
    return image


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Raise RequestError if a picture cannot be saved as `path`: call it before drawing, not after.

    Only PNG keeps every byte and the settings, so the name ends in .png.
    """
    if path.suffix.lower() != ".png":
        raise RequestError(
            f"{path}: expected a name ending in .png, the format that keeps every pixel and the settings"
        )
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise RequestError(f"{path}: is a folder, expected a file name")
    if path.exists() and not overwrite:
        raise RequestError(f"{path}: exists; choose another name or say --overwrite")


def save_png(
    path: Path,
    pixels: Bytes,
    *,
    text: Mapping[str, str] | None = None,
    icc_profile: bytes | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PNG under a temporary name and rename it: `path` is either the whole picture or what it was before.

    Args:
        pixels: (H, W, 3) or (H, W, 4) uint8. text: text chunks by keyword, see `metadata.py`.

    Raises:
        RequestError: `check_output` refuses the path, or it cannot be written (no space, no permission).
    """
    from PIL.PngImagePlugin import PngInfo

    check_output(path, overwrite=overwrite)
    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_text(keyword, value)  # tEXt, which every tool reads; iTXt if Latin-1 cannot hold it
    with replaced(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info, icc_profile=icc_profile)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name that becomes `path` when all of it is there; raises RequestError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was changed there"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _open(source: Source, name: str) -> tuple[Image.Image, str]:
    """Return a fully read image, turned upright, and the name to call it by."""
    if isinstance(source, np.ndarray):
        return _from_array(source, name), name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # tags that mean nothing here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return ImageOps.exif_transpose(source), name
            name = str(source)
            with Image.open(source, formats=FORMATS) as image:
                deep = _sixteen_bit_png(image)
                image.load()
                return ImageOps.exif_transpose(image if deep is None else deep), name
    except FileNotFoundError:
        raise RequestError(f"{name}: no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise RequestError(f"{name}: cannot be read ({error.strerror})") from None
    except UnidentifiedImageError:
        raise RequestError(
            f"{name}: not a picture Glassine reads; expected {', '.join(FORMATS)} (export others, such as HEIC, as PNG)"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"{name}: larger than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller first") from None
    except _DAMAGED as error:
        raise RequestError(f"{name}: cannot be read, the file is damaged or incomplete ({error})") from None


def _from_array(array: NDArray[Any], name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    good = array.ndim in {2, 3} and channels in {1, 3, 4} and array.size
    if not good or not (array.dtype in (np.uint8, np.bool_) or (array.dtype == np.uint16 and channels == 1)):
        raise RequestError(
            f"{name}: is an array {array.shape} of {array.dtype}; expected (H, W), (H, W, 3) or (H, W, 4) of uint8"
        )
    flat = array[..., 0] if array.ndim == 3 and channels == 1 else array
    return Image.fromarray(flat.astype(np.uint8) * np.uint8(255) if flat.dtype == np.bool_ else flat)


def _sixteen_bit_png(image: ImageFile.ImageFile) -> Image.Image | None:
    """Return a 16-bit PNG with colours or alpha, rounded to 8 bits; None for every other picture.

    Pillow keeps the high byte of each channel, which is half a level too dark. PNG's rows are decoded before they are
    unpacked, so asking for another layout of equally wide pixels yields the low bytes.
    """
    layouts = {"RGB;16B": ("RGB;16B", "RGB;16L"), "RGBA;16B": ("RGBA;16B", "RGBA;16L"), "LA;16B": ("RGBA",)}
    if image.format != "PNG" or not image.tile or image.tile[0][3] not in layouts:
        return None
    wanted = layouts[str(image.tile[0][3])]
    layers = [_unpacked(image.filename, layout) for layout in wanted]
    if len(wanted) == 1:  # (L high, L low, A high, A low)
        high, low = layers[0][..., [0, 0, 0, 2]], layers[0][..., [1, 1, 1, 3]]
    else:
        high, low = layers
    deep = Image.fromarray(_scaled((high.astype(np.float64) * 256 + low) / 65535, 255))
    deep.info = image.info
    return deep


def _unpacked(path: Any, layout: str) -> Bytes:
    with Image.open(path, formats=("PNG",)) as image:
        codec, extents, offset, _ = image.tile[0]
        image.tile = [type(image.tile[0])(codec, extents, offset, layout)]
        return np.asarray(image)


def _grey(image: Image.Image, name: str) -> NDArray[np.float64]:
    """Return a one-channel picture of more than 8 bits as (H, W) in [0, 1]."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise RequestError(
            f"{name}: values from {values.min()} to {values.max()} in mode {image.mode}, expected 0 to {top:g}; "
            "save it as an 8-bit or 16-bit PNG"
        )
    return values / top


class _Luminance(NamedTuple):
    """Grey values and, where not everything is opaque, alpha: both (H, W) in [0, 1]."""

    grey: NDArray[np.float64]
    alpha: NDArray[np.float64] | None = None
    notices: tuple[str, ...] = ()


def _luminance(image: Image.Image, name: str) -> _Luminance:
    if image.mode.startswith(("I", "F")):
        return _Luminance(_grey(image, name))
    rgba = np.asarray(_rgba(image, name))
    grey = (rgba[..., :3].astype(np.int64) @ (299, 587, 114)) / 255000  # whole numbers: white is 1, not nearly 1
    if rgba[..., 3].min() == 255:
        return _Luminance(grey)
    return _Luminance(grey, rgba[..., 3] / 255, (f"{name}: transparent pixels count as kept",))


def _rgba(image: Image.Image, name: str) -> Image.Image:
    try:
        return image.convert("RGBA")
    except ValueError:
        raise RequestError(f"{name}: colours in mode {image.mode}, expected RGB or grey; save it as PNG") from None


def _checked_floats(values: NDArray[Any], name: str) -> NDArray[np.float64]:
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise RequestError(f"{name}: floats of shape {values.shape}, expected (H, W) with values 0 to 1")
    return values.astype(np.float64)


def _over(pixels: Bytes, alpha: Bytes) -> Bytes:
    """Straight-alpha `pixels` over BACKGROUND, rounded to nearest; opaque pixels keep their bytes."""
    a = alpha[..., None].astype(np.uint32)
    return ((pixels * a + np.array(BACKGROUND, np.uint32) * (255 - a) + 127) // 255).astype(np.uint8)


def _scaled(values: NDArray[np.float64], top: int) -> Bytes:
    return np.rint(values * top).astype(np.uint8)


_SAYS = {"crop": "cropped", "fit": "margins added", "stretch": "stretched"}


def _placement(size: tuple[int, int], target: tuple[int, int], fit: Fit) -> tuple[Box, tuple[int, int]]:
    """Return the part of the source that is used, and the (width, height) it gets inside the target."""
    (width, height), whole = size, (0.0, 0.0, float(size[0]), float(size[1]))
    scales = (target[0] / width, target[1] / height)
    if fit == "stretch":
        return whole, target
    if fit == "fit":
        scale = min(scales)
        return whole, (max(1, round(width * scale)), max(1, round(height * scale)))
    used = (target[0] / max(scales), target[1] / max(scales))
    left, top = (width - used[0]) / 2, (height - used[1]) / 2
    return (max(left, 0.0), max(top, 0.0), min(left + used[0], width), min(top + used[1], height)), target


def _resized(
    image: Image.Image, size: tuple[int, int], box: Box, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> NDArray[Any]:
    return np.asarray(image.resize(size, resample, box=box))


def _margins(inner: tuple[int, int], outer: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return ((top, bottom), (left, right)) that centre `inner` in `outer`, both (width, height)."""
    across, down = outer[0] - inner[0], outer[1] - inner[1]
    return (down // 2, down - down // 2), (across // 2, across - across // 2)


def _x(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
