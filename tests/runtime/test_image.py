"""Pictures of every mode, maps with all their bits, sizes, and files that are damaged or in the way."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.transform import resize

from glassine.errors import EngineError, RequestError
from glassine.runtime.image import (
    Map,
    Picture,
    check_output,
    check_size,
    fit_map,
    fit_picture,
    read_map,
    read_picture,
    save_png,
    to_model,
    to_pixels,
)

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = RNG.integers(0, 256, (16, 24), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (16, 24, 4), dtype=np.uint16)


def png_bytes(samples: Array, colour_type: int, interlace: int = 0) -> bytes:
    """A PNG written byte by byte from the specification: rows of big-endian samples, filter Up on every second row."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2" if samples.dtype == np.uint16 else ">u1").reshape(height, -1).view(np.uint8)
    data = b""
    for y, row in enumerate(rows):
        data += b"\2" + (row - rows[y - 1]).tobytes() if y % 2 else b"\0" + row.tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, samples.dtype.itemsize * 8, colour_type, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def over_white(rgb: Array, alpha: Array) -> Array:
    a = alpha[..., None].astype(np.float64) / 255
    return np.floor(rgb * a + 255 * (1 - a) + 0.5).astype(np.uint8)


def to_8_bits(deep: Array) -> Array:
    return np.floor(deep.astype(np.float64) / 257 + 0.5).astype(np.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(image: Image.Image, name: str = "picture.png", **options: Any) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def as_rgb(grey: Array) -> Array:
    return np.stack([grey] * 3, axis=-1)


def test_rgb_keeps_its_bytes(saved: Any) -> None:
    picture = read_picture(saved(Image.fromarray(RGB)))
    assert np.array_equal(picture.pixels, RGB)
    assert (picture.size, picture.alpha, picture.notices) == ((24, 16), None, ())


def test_grey_and_one_bit(saved: Any) -> None:
    assert np.array_equal(read_picture(saved(Image.fromarray(GREY))).pixels, as_rgb(GREY))
    assert np.array_equal(read_picture(saved(Image.fromarray(GREY > 99))).pixels, as_rgb((GREY > 99) * np.uint8(255)))


def test_palette(saved: Any) -> None:
    image = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(read_picture(saved(image)).pixels, np.asarray(image.convert("RGB")))


def test_palette_with_transparency(saved: Any) -> None:
    image = Image.fromarray(GREY % 4, mode=None).convert("L")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    picture = read_picture(saved(image, transparency=bytes([255, 128, 0, 255])))
    colours = np.array([(255, 0, 0), (127, 255, 127), (255, 255, 255), (9, 9, 9)], np.uint8)
    assert np.array_equal(picture.pixels, colours[GREY % 4])
    assert picture.alpha is not None
    assert np.array_equal(picture.alpha, np.array([255, 128, 0, 255])[GREY % 4])


def test_one_transparent_colour(saved: Any) -> None:
    rgb = RGB.copy()
    rgb[::2] = (1, 2, 3)
    picture = read_picture(saved(Image.fromarray(rgb), transparency=(1, 2, 3)))
    assert np.array_equal(picture.pixels[1::2], rgb[1::2])
    assert (picture.pixels[::2] == 255).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_stands_over_white_and_is_kept(saved: Any, mode: str) -> None:
    rgb = as_rgb(GREY) if mode == "LA" else RGB
    image = Image.fromarray(np.dstack([rgb, ALPHA])).convert(mode)
    picture = read_picture(saved(image))
    assert np.array_equal(picture.pixels, over_white(rgb, ALPHA))
    assert picture.alpha is not None
    assert np.array_equal(picture.alpha, ALPHA)
    assert picture.notices == (f"{picture.name}: transparent pixels are drawn over RGB (255, 255, 255)",)


def test_opaque_alpha_is_no_alpha(saved: Any) -> None:
    picture = read_picture(saved(Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)]))))
    assert np.array_equal(picture.pixels, RGB)
    assert (picture.alpha, picture.notices) == (None, ())


@pytest.mark.parametrize(("colour_type", "channels"), [(0, [0]), (2, [0, 1, 2]), (4, [0, 3]), (6, [0, 1, 2, 3])])
def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path, colour_type: int, channels: list[int]) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png_bytes(DEEP[..., channels], colour_type))
    picture = read_picture(path)
    deep = to_8_bits(DEEP[..., channels])
    rgb = deep[..., :3] if deep.shape[-1] >= 3 else as_rgb(deep[..., 0])
    if len(channels) % 2:
        assert np.array_equal(picture.pixels, rgb)
    else:
        assert picture.alpha is not None
        assert np.array_equal(picture.alpha, deep[..., -1])
        assert np.array_equal(picture.pixels, over_white(rgb, deep[..., -1]))


def test_cmyk_jpeg(saved: Any) -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(read_picture(saved(cmyk, "ink.jpg")).pixels.astype(int) - (255, 0, 0)).max() <= 3


def test_jpeg_webp_tiff_bmp_gif_ppm(saved: Any) -> None:
    smooth = np.asarray(Image.fromarray(RGB[:3, :3].copy()).resize((64, 64), Image.Resampling.BICUBIC))
    for name, options, most in [
        ("a.jpg", {"quality": 95}, 9),  # measured 6
        (
            "phone.jpg",
            {"quality": 95, "format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (8, 8))]},
            9,
        ),
        ("a.webp", {"lossless": True}, 0),
        ("a.tiff", {}, 0),
        ("a.bmp", {}, 0),
        ("a.ppm", {}, 0),
    ]:
        pixels = read_picture(saved(Image.fromarray(smooth), name, **options)).pixels
        assert np.abs(pixels.astype(int) - smooth).max() <= most, name
    gif = Image.fromarray(RGB).quantize(256)
    assert np.array_equal(read_picture(saved(gif, "a.gif")).pixels, np.asarray(gif.convert("RGB")))


TURNS: dict[int, Callable[[Array], Array]] = {  # what EXIF says was done to the stored rows, undone
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(saved: Any, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    picture = read_picture(saved(Image.fromarray(RGB), exif=exif))
    upright = TURNS[orientation](RGB)
    assert np.array_equal(picture.pixels, upright)
    assert picture.size == (upright.shape[1], upright.shape[0])


@pytest.mark.parametrize("colour_type", [0, 2])
def test_exif_orientation_of_sixteen_bits(tmp_path: Path, colour_type: int) -> None:
    deep = DEEP[..., :1] if colour_type == 0 else DEEP[..., :3]
    exif = Image.Exif()
    exif[0x112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    data = png_bytes(deep, colour_type)
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    (tmp_path / "deep.png").write_bytes(data[:33] + chunk + data[33:])
    expected = np.rot90(to_8_bits(deep), -1)
    assert np.array_equal(
        read_picture(tmp_path / "deep.png").pixels, expected if colour_type else as_rgb(expected[..., 0])
    )


def test_profiles_of_rgb_stay_with_their_bytes(saved: Any) -> None:
    profile = bytes(16) + b"RGB " + bytes(108)
    assert read_picture(saved(Image.fromarray(RGB), icc_profile=profile)).icc_profile == profile
    assert read_picture(saved(Image.fromarray(GREY), icc_profile=profile)).icc_profile is None
    ink = bytes(16) + b"CMYK" + bytes(108)
    assert read_picture(saved(Image.new("CMYK", (8, 8)), "a.jpg", icc_profile=ink)).icc_profile is None


def test_pictures_from_memory() -> None:
    assert np.array_equal(read_picture(RGB).pixels, RGB)
    assert np.array_equal(read_picture(GREY[..., None]).pixels, as_rgb(GREY))
    assert np.array_equal(read_picture(Image.fromarray(RGB)).pixels, RGB)
    assert np.array_equal(read_picture(np.dstack([RGB, ALPHA])).pixels, over_white(RGB, ALPHA))


@pytest.mark.parametrize("array", [RGB / 255, RGB.astype(np.int64), RGB[None], RGB[..., :2], RGB[:0], DEEP[..., :3]])
def test_arrays_of_another_kind_are_refused(array: Array) -> None:
    with pytest.raises(RequestError, match=r"image: is an array \(.*expected \(H, W\), \(H, W, 3\) or \(H, W, 4\)"):
        read_picture(array)


def test_grey_map_keeps_sixteen_bits(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_bytes(png_bytes(DEEP[..., :1], 0))
    assert np.array_equal(read_map(path).values, (DEEP[..., 0] / 65535).astype(np.float32))
    assert np.array_equal(read_map(DEEP[..., 0]).values, (DEEP[..., 0] / 65535).astype(np.float32))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_white_is_one_and_black_is_zero_in_every_mode(saved: Any, mode: str) -> None:
    half = np.zeros((16, 16), np.uint8)
    half[8:] = 255
    image = Image.fromarray(half.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(half).convert(mode)
    path = saved(image, "map.tiff" if mode == "CMYK" else "map.png")
    assert np.array_equal(read_map(path).values, half / np.float32(255))
    assert np.array_equal(read_map(path, white="keep").values, 1 - half / np.float32(255))


def test_a_coloured_map_counts_by_luminance() -> None:
    colours = np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255)]], np.uint8)
    np.testing.assert_allclose(read_map(colours).values, [[0.299, 0.587, 0.114]], rtol=1e-7)  # measured 4e-8


@pytest.mark.parametrize("white", ["change", "keep"])
def test_transparency_of_a_map_is_keep(saved: Any, white: Any) -> None:
    image = Image.fromarray(np.dstack([as_rgb(GREY), ALPHA]))
    found = read_map(saved(image), white=white)
    grey = GREY / 255 if white == "change" else 1 - GREY / 255
    np.testing.assert_allclose(found.values, grey * (ALPHA / 255), atol=6e-8)  # measured 3e-8
    assert found.notices == (f"{found.name}: transparent pixels count as kept",)


def test_maps_from_memory() -> None:
    floats = RNG.random((5, 7))
    assert np.array_equal(read_map(floats).values, floats.astype(np.float32))
    assert np.array_equal(read_map(floats > 0.5).values, (floats > 0.5).astype(np.float32))
    assert np.array_equal(read_map(Image.fromarray(GREY)).values, (GREY / 255).astype(np.float32))


@pytest.mark.parametrize("bad", [[[2.0]], [[-0.1]], [[np.nan]], [[np.inf]], [1.0], [[]]])
def test_maps_that_are_no_maps(bad: Any) -> None:
    with pytest.raises(RequestError, match=r"change map: floats of shape .* expected \(H, W\) with values 0 to 1"):
        read_map(np.array(bad))


def test_integers_of_32_bits_are_refused(saved: Any) -> None:
    wide = Image.fromarray(np.full((8, 8), 70000, np.int32))
    for read in (read_picture, read_map):
        with pytest.raises(RequestError, match="values from 70000 to 70000 in mode I, expected 0 to 65535"):
            read(saved(wide, "wide.tiff"))


def test_a_picture_of_the_models_size_is_not_touched() -> None:
    picture = read_picture(RGB)
    assert fit_picture(picture, 24, 16) is picture


def picture_of(values: Array) -> Picture:
    return read_picture(as_rgb(np.rint(values * 255).astype(np.uint8)))


def test_crop_scales_to_cover_and_cuts_evenly() -> None:
    ramp = np.tile(np.linspace(0, 1, 300), (100, 1))  # 300 wide, 100 high -> 64 x 64: the middle third
    fitted = fit_picture(picture_of(ramp), 64, 64)
    expected = resize(ramp[:, 100:200], (64, 64), order=1, anti_aliasing=True) * 255
    assert np.abs(fitted.pixels[:, 2:-2, 0] - expected[:, 2:-2]).max() < 1.5  # measured 0.9
    assert fitted.notices == ("image: 300x100 brought to 64x64 (cropped)",)
    assert fitted.size == (300, 100)


def test_fit_shows_everything_and_repeats_the_edge() -> None:
    ramp = np.tile(np.linspace(0, 1, 128), (64, 1))
    fitted = fit_picture(picture_of(ramp), 64, 64, "fit").pixels[..., 0]
    assert (fitted == fitted[16]).all()  # 64x32 in the middle, its rows repeated above and below
    assert fitted[0, 0] <= 2
    assert fitted[0, -1] >= 253


def test_stretch_scales_each_side() -> None:
    ramp = np.tile(np.linspace(0, 1, 128), (32, 1))
    fitted = fit_picture(picture_of(ramp), 64, 64, "stretch").pixels[..., 0]
    expected = np.tile(resize(ramp[:1], (1, 64), order=1, anti_aliasing=True) * 255, (64, 1))
    assert np.abs(fitted[:, 2:-2] - expected[:, 2:-2]).max() < 1.5  # measured 0.7


@pytest.mark.parametrize("fit", ["crop", "fit", "stretch"])
@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), cells=st.tuples(st.integers(1, 6), st.integers(1, 6)))
@settings(max_examples=40, deadline=None)
def test_any_size_becomes_the_models(fit: Any, size: tuple[int, int], cells: tuple[int, int]) -> None:
    rgba = np.full((size[1], size[0], 4), (10, 20, 30, 255), np.uint8)
    rgba[0, 0, 3] = 254
    fitted = fit_picture(read_picture(rgba), cells[0] * 8, cells[1] * 8, fit)
    assert fitted.pixels.shape == (cells[1] * 8, cells[0] * 8, 3)
    assert fitted.alpha is not None
    assert fitted.alpha.shape == fitted.pixels.shape[:2]
    assert np.abs(fitted.pixels.astype(int) - (10, 20, 30)).max() <= 1


@pytest.mark.parametrize("fit", ["crop", "fit", "stretch"])
def test_a_map_goes_where_its_picture_goes(fit: Any) -> None:
    y, x = np.mgrid[0:96, 0:160]
    blob = np.exp(-((x - 60) ** 2 + (y - 40) ** 2) / 800).astype(np.float32)
    picture = fit_picture(picture_of(blob), 64, 64, fit).pixels[..., 0] / 255
    small = np.asarray(Image.fromarray(blob).resize((80, 48), Image.Resampling.BILINEAR))
    inside = slice(13, -13) if fit == "fit" else slice(None)
    for change_map in (blob, small):
        fitted = fit_map(read_map(np.clip(change_map, 0, 1)), (160, 96), 64, 64, fit)
        assert np.abs(fitted.values - picture)[inside].max() < 0.02  # measured 0.012: bilinear beside Lanczos
        assert fitted.values.dtype == np.float32
        if fit == "fit":
            assert (fitted.values[:13] == 1).all()
            assert (fitted.values[-13:] == 1).all()


def test_a_map_of_the_pictures_size_is_not_touched() -> None:
    change_map = read_map(RNG.random((16, 24)))
    assert fit_map(change_map, (24, 16), 24, 16) is change_map


def test_a_map_of_another_size_is_resized_with_a_notice() -> None:
    fitted = fit_map(Map(name="m.png", values=np.ones((33, 50), np.float32)), (24, 16), 24, 16)
    assert (fitted.values == 1).all()
    assert fitted.notices == ("m.png: 50x33 brought to 24x16 as its picture",)


@pytest.mark.parametrize(("width", "height"), [(16, 24), (24, 18), (512, 512), (5, 1)])
def test_a_map_of_another_shape_is_refused(width: int, height: int) -> None:
    change_map = Map(name="m.png", values=np.zeros((height, width), np.float32))
    with pytest.raises(RequestError, match=rf"m.png: is {width}x{height}, but the picture is 24x16"):
        fit_map(change_map, (24, 16), 24, 16)


@pytest.mark.parametrize(
    ("width", "height", "near"), [(513, 512, "512x512"), (8, 0, "8x8"), (-8, 8, "8x8"), (3, 8, "8x8")]
)
def test_sizes_are_multiples_of_8(width: int, height: int, near: str) -> None:
    with pytest.raises(RequestError, match=f"size {width}x{height}: expected multiples of 8, for example {near}"):
        check_size(width, height)


def test_every_byte_survives_the_way_to_the_model_and_back() -> None:
    pixels = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    image = to_model(pixels)
    assert (image.shape, image.dtype) == ((1, 3, 16, 16), np.float32)
    assert (image.min(), image.max()) == (-1, 1)
    assert np.array_equal(image[0, 1], pixels[..., 1].astype(np.float32) / 127.5 - 1)
    assert np.array_equal(to_pixels(image), pixels)


def test_pixels_are_rounded_and_clipped() -> None:
    levels = np.array([-9, -1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.9999, 7], np.float32)
    assert to_pixels(np.tile(levels, (1, 3, 1, 1)))[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(EngineError, match="NaN or infinity"):
        to_pixels(np.full((1, 3, 8, 8), value, np.float32))


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, message in [
        ("none.png", "none.png: no such file"),
        ("text.png", "text.png: not a picture Glassine reads; expected PNG, JPEG"),
        ("page.eps", "page.eps: not a picture Glassine reads"),
        (".", r"cannot be read \(Is a directory\)"),
    ]:
        for read in (read_picture, read_map):
            with pytest.raises(RequestError, match=message):
                read(tmp_path / name)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    huge = bytearray(png_bytes(RGB, 2))
    huge[16:24] = struct.pack(">II", 30000, 30000)
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    (tmp_path / "huge.png").write_bytes(huge)
    with pytest.raises(RequestError, match=r"huge.png: larger than \d+ pixels"):
        read_picture(tmp_path / "huge.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp", "a.gif", "deep.png"])
def test_damaged_files_are_refused_and_never_crash(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "deep.png":
        path.write_bytes(png_bytes(DEEP, 6))
    else:
        Image.fromarray(RGB).resize((64, 48)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    read, refusals = 0, list[str]()
    for trial in range(60):
        broken = bytearray(whole)
        if trial < 20:
            del broken[rng.integers(1, len(whole)) :]
        else:
            for _ in range(3):
                broken[rng.integers(0, len(whole))] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            read_picture(path)
            read += 1  # some changes only change colours
        except RequestError as refusal:
            refusals.append(str(refusal))
    assert all(refusal.startswith(str(path)) for refusal in refusals)
    assert read + len(refusals) == 60
    assert refusals


def test_truncated_pictures_are_refused(tmp_path: Path, saved: Any) -> None:
    path = saved(Image.fromarray(RGB).resize((64, 64)), "cut.jpg")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(
        RequestError, match=r"cut\.jpg: cannot be read, the file is damaged or incomplete \(.*truncated"
    ):
        read_picture(path)


def test_saving_keeps_every_byte_the_texts_and_the_profile(tmp_path: Path) -> None:
    profile = bytes(16) + b"RGB " + bytes(108)
    save_png(tmp_path / "out.png", RGB, text={"parameters": "猫\nSteps: 1"}, icc_profile=profile)
    with Image.open(tmp_path / "out.png") as image:
        assert np.array_equal(np.asarray(image), RGB)
        assert image.info["parameters"] == "猫\nSteps: 1"
        assert image.info["icc_profile"] == profile
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_saving_refuses_what_is_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"precious")
    with pytest.raises(RequestError, match=r"out\.png: exists; choose another name or say --overwrite"):
        save_png(path, RGB)
    assert path.read_bytes() == b"precious"
    save_png(path, RGB, overwrite=True)
    assert np.array_equal(read_picture(path).pixels, RGB)
    (tmp_path / "folder.png").mkdir()
    for bad, message in [
        ("out.jpg", "expected a name ending in .png"),
        ("none/out.png", "there is no folder"),
        ("folder.png", "is a folder"),
    ]:
        with pytest.raises(RequestError, match=message):
            check_output(tmp_path / bad, overwrite=True)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    path = tmp_path / "out.png"
    save_png(path, RGB)
    before = path.read_bytes()

    def save(self: Image.Image, file: Any, **options: Any) -> None:
        file.write(b"half a picture")
        raise failure

    monkeypatch.setattr(Image.Image, "save", save)
    expected = RequestError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is RequestError else None):
        save_png(path, RGB[::-1].copy(), overwrite=True)
    assert path.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.skipif(not Path("/dev/full").exists() or os.name != "posix", reason="needs /dev/full (Linux)")
def test_a_full_disk_is_an_error_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda self, mode: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(RequestError, match=r"out\.png: cannot be written \(No space left on device\)"):
        save_png(tmp_path / "out.png", RGB)
