"""OpenRaster files, read back with zipfile, ElementTree and Pillow, against what the specification says."""

import io
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from glassine.errors import RequestError
from glassine.runtime.compose import over
from glassine.runtime.openraster import Layer, save_openraster

RNG = np.random.default_rng(7)


def stack(width: int = 300, height: int = 120) -> list[Layer]:
    names = ["background", 'a "cup" & <saucer>', "Dampf, Übermut 茶"]
    return [Layer(name=name, pixels=RNG.integers(0, 256, (height, width, 4), np.uint8)) for name in names]


def picture(archive: zipfile.ZipFile, name: str) -> Image.Image:
    image = Image.open(io.BytesIO(archive.read(name)))
    assert image.format == "PNG"
    assert image.mode == "RGBA"
    assert not image.info.get("interlace")
    return image


def test_what_is_in_the_file(tmp_path):
    layers = stack()
    save_openraster(tmp_path / "tea.ora", layers)
    content = (tmp_path / "tea.ora").read_bytes()
    # "must be the first entry, stored uncompressed and without extra field": what `file` and desktops look at
    assert content[30:54] == b"mimetypeimage/openraster"
    with zipfile.ZipFile(tmp_path / "tea.ora") as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
        assert entries[0].filename == "mimetype"
        assert entries[0].compress_type == zipfile.ZIP_STORED
        root = ElementTree.fromstring(archive.read("stack.xml"))
        assert root.tag == "image"
        assert (root.get("w"), root.get("h")) == ("300", "120")
        assert root.get("version")
        listed = root.findall("stack/layer")
        assert len(root.findall("stack")) == 1
        assert [layer.get("name") for layer in listed] == [layer.name for layer in reversed(layers)]  # the front first
        for shown, layer in zip(listed, reversed(layers), strict=True):
            assert (shown.get("x"), shown.get("y"), shown.get("opacity")) == ("0", "0", "1.0")
            assert (shown.get("composite-op"), shown.get("visibility")) == ("svg:src-over", "visible")
            assert shown.get("src").startswith("data/")
            assert np.array_equal(np.asarray(picture(archive, shown.get("src"))), layer.pixels)
        merged = np.asarray(picture(archive, "mergedimage.png"))
        assert np.array_equal(merged, over([layer.pixels for layer in layers]))
        thumbnail = picture(archive, "Thumbnails/thumbnail.png")
        assert thumbnail.size == (256, 102)
        expected = Image.fromarray(merged).resize(thumbnail.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(thumbnail).astype(int) - np.asarray(expected)).mean() < 12


def test_hidden_layers_stay_out_of_the_composite(tmp_path):
    back, hidden, front = stack(16, 16)
    hidden = Layer(name=hidden.name, pixels=hidden.pixels, visible=False)
    save_openraster(tmp_path / "tea.ora", [back, hidden, front])
    with zipfile.ZipFile(tmp_path / "tea.ora") as archive:
        shown = ElementTree.fromstring(archive.read("stack.xml")).findall("stack/layer")
        assert [layer.get("visibility") for layer in shown] == ["visible", "hidden", "visible"]
        assert np.array_equal(np.asarray(picture(archive, "mergedimage.png")), over([back.pixels, front.pixels]))
        assert picture(archive, "Thumbnails/thumbnail.png").size == (16, 16)


def test_the_same_layers_make_the_same_file(tmp_path):
    layers = stack(16, 16)
    save_openraster(tmp_path / "a.ora", layers)
    save_openraster(tmp_path / "b.ora", layers)
    assert (tmp_path / "a.ora").read_bytes() == (tmp_path / "b.ora").read_bytes()


def test_what_is_refused(tmp_path):
    layers = stack(16, 16)
    save_openraster(tmp_path / "a.ora", layers)
    before = (tmp_path / "a.ora").read_bytes()
    with pytest.raises(RequestError, match="exists"):
        save_openraster(tmp_path / "a.ora", stack(16, 16))
    wrong = Layer(name="small", pixels=np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(RequestError, match="layer 2 is 8x8"):
        save_openraster(tmp_path / "a.ora", [layers[0], wrong], overwrite=True)
    assert (tmp_path / "a.ora").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    for path, words in (("a.png", "ending in .ora"), ("none/a.ora", "there is no folder")):
        with pytest.raises(RequestError, match=words):
            save_openraster(tmp_path / path, layers)
