"""A picture's record: written, read back, read from A1111's text, and refused when it is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from glassine.errors import RequestError
from glassine.runtime.image import save_png
from glassine.runtime.metadata import (
    SAMPLER_NAMES,
    SPACING_NAMES,
    Record,
    file_sha256,
    parameters_text,
    parse_parameters,
    read_record,
    text_chunks,
)
from glassine.runtime.request import Request
from glassine.runtime.samplers import SAMPLERS
from glassine.runtime.schedule import SPACINGS

PIXELS = np.zeros((8, 8, 3), np.uint8)
MODEL = {"name": "dream, shaper: 8", "sha256": "0123456789abcdef" * 4}
INPUTS = {"image": {"name": "boat.png", "sha256": "f" * 64}, "change_map": {"name": "map.png", "sha256": "e" * 64}}


def as_dict(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__slots__}


def parameters(request: Request, *, has_image: bool = False) -> str:
    return parameters_text(as_dict(request), version="0.1.0", size=(512, 768), model=MODEL, has_image=has_image)


def test_the_parameters_text_is_a1111s() -> None:
    request = Request(
        prompt="a (red:1.2) boat,\nat dawn", negative_prompt="ugly", seed=7, spacing="karras", clip_skip=2
    )
    assert parameters(request) == (
        "a (red:1.2) boat,\nat dawn\n"
        "Negative prompt: ugly\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 512x768, "
        'Model hash: 0123456789, Model: "dream, shaper: 8", Clip skip: 2, RNG: CPU, Version: Glassine 0.1.0'
    )
    full = Request(
        guidance_scale=7.0,
        strength=0.5,
        noise="philox",
        emphasis="no_norm",
        eta=0.0,
        guidance_rescale=0.7,
        sampler="ddim",
    )
    assert parameters(full, has_image=True) == (
        "\nSteps: 20, Sampler: DDIM, Schedule type: Automatic, CFG scale: 7, Seed: 0, Size: 512x768, "
        'Model hash: 0123456789, Model: "dream, shaper: 8", Denoising strength: 0.5, Eta: 0, CFG Rescale: 0.7, '
        "RNG: NV, Emphasis: No norm, Version: Glassine 0.1.0"
    )


def test_every_sampler_has_a_name_others_know_and_every_name_is_one_samplers() -> None:
    assert set(SAMPLERS) == set(SAMPLER_NAMES)
    assert len(set(SAMPLER_NAMES.values())) == len(SAMPLER_NAMES)
    assert set(SPACING_NAMES) <= set(SPACINGS)


SETTINGS = st.builds(
    Request,
    steps=st.integers(1, 1000),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    spacing=st.none() | st.sampled_from(sorted(set(SPACING_NAMES) - {"ays_xl"})),
    guidance_scale=st.floats(0, 30),
    guidance_rescale=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    noise=st.sampled_from(["torch", "philox"]),
    clip_skip=st.none() | st.integers(1, 12),
    emphasis=st.sampled_from(["original", "no_norm"]),
    strength=st.floats(0, 1),
    eta=st.none() | st.floats(0, 2),
    prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60),
    negative_prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60),
)


@given(request=SETTINGS)
@settings(max_examples=200, deadline=None)
@example(request=Request(prompt='"quoted", Steps: 20, Seed: 1, Size: 8x8', negative_prompt="a: b, c: d, e: f"))
def test_what_is_written_as_parameters_is_read_back(request: Request) -> None:
    found = parse_parameters(parameters(request, has_image=True))
    expected = as_dict(request)
    expected |= {"prompt": request.prompt.strip(), "negative_prompt": request.negative_prompt.strip()}
    for name in ("rule", "fit"):
        expected.pop(name)
    read = {name: found.request.get(name, getattr(Request(), name)) for name in expected}
    if not expected["prompt"].startswith("Negative prompt:"):
        assert read == expected
    assert found.size == (512, 768)
    assert found.model == {"name": MODEL["name"], "sha256": MODEL["sha256"][:10]}
    assert [notice for notice in found.notices if "schedule" not in notice] == []


@given(request=SETTINGS, kept=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_png_is_read_back_completely(tmp_path_factory: pytest.TempPathFactory, request: Request, kept: bool) -> None:
    path = tmp_path_factory.mktemp("record") / "out.png"
    chunks = text_chunks(as_dict(request), version="0.1.0", size=(8, 16), model=MODEL, inputs=INPUTS if kept else {})
    save_png(path, PIXELS, text=chunks)
    record = read_record(path)
    settings = json.loads(json.dumps(as_dict(request)))  # JSON has no tuples
    assert record == Record(
        written_by="glassine", request=settings, size=(8, 16), model=MODEL, inputs=INPUTS if kept else {}
    )
    assert Request.from_dict(record.request) == request


A1111 = """masterpiece, (best quality:1.2), a boat <lora:film:0.8>
second line
Negative prompt: (worst quality:1.4), blurry
and more
Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: Exponential, CFG scale: 6, Seed: 4294967295, Size: 640x448, \
Model hash: e1441589a6, Model: v1-5-pruned, VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000-ema-pruned.safetensors, \
Denoising strength: 0.4, Clip skip: 2, RNG: NV, ControlNet 0: "Module: canny, Weight: 1.0", \
Lora hashes: "film: 0123456789ab", Emphasis: No norm, Version: v1.9.4"""


def test_a1111s_text_is_read() -> None:
    record = parse_parameters(A1111, name="boat.png")
    assert record.request == {
        "prompt": "masterpiece, (best quality:1.2), a boat <lora:film:0.8>\nsecond line",
        "negative_prompt": "(worst quality:1.4), blurry\nand more",
        "steps": 28,
        "sampler": "dpmpp_2m_sde",
        "spacing": "exponential",
        "guidance_scale": 6.0,
        "seed": 4294967295,
        "strength": 0.4,
        "clip_skip": 2,
        "noise": "philox",
        "emphasis": "no_norm",
    }
    assert record.size == (640, 448)
    assert record.model == {"name": "v1-5-pruned", "sha256": "e1441589a6"}
    assert (record.written_by, record.inputs) == ("a1111", {})
    assert record.notices == (
        "boat.png: setting 'VAE' (vae-ft-mse-840000-ema-pruned.safetensors) is not Glassine's; left out",
        "boat.png: setting 'ControlNet 0' (Module: canny, Weight: 1.0) is not Glassine's; left out",
        "boat.png: setting 'Lora hashes' (film: 0123456789ab) is not Glassine's; left out",
    )
    assert Request.from_dict(record.request).seed == 4294967295


@pytest.mark.parametrize(
    ("line", "sampler", "spacing"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde_heun", "karras"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_a", None),
        ("Sampler: DPM++ 2M, Schedule type: Align Your Steps", "dpmpp_2m", "ays"),
        ("Sampler: PLMS, Schedule type: Uniform", "pndm", "linspace"),
    ],
)
def test_samplers_of_all_ages(line: str, sampler: str, spacing: str | None) -> None:
    record = parse_parameters(f"a\nSteps: 2, {line}, CFG scale: 7, RNG: CPU")
    assert record.request["sampler"] == sampler
    assert record.request.get("spacing") == spacing
    assert record.notices == ()


def test_what_cannot_be_taken_over_is_said() -> None:
    record = parse_parameters("a\nSteps: 2, Sampler: Restart, Schedule type: Turbo, CFG scale: 7, Emphasis: Ignore")
    assert "sampler" not in record.request
    assert [notice.split(";")[0] for notice in record.notices] == [
        "sampler 'Restart' is not known",
        "schedule 'Turbo' is not known or not said",
        "the text does not say where the noise came from",
        "emphasis 'Ignore' is not known",
    ]


def test_texts_without_settings() -> None:
    assert parse_parameters("a boat\nNegative prompt: ugly").request == {"prompt": "a boat", "negative_prompt": "ugly"}
    assert parse_parameters("").request == {"prompt": "", "negative_prompt": ""}
    assert parse_parameters("ratio: wide, size: big").request["prompt"] == "ratio: wide, size: big"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("Steps: many", "Steps is 'many', expected a number"),
        ("Seed: 1.5", "Seed is '1.5', expected a number"),
        ("CFG scale: x", "CFG scale is 'x', expected a number"),
        ("Size: 512", "Size is '512', expected WIDTHxHEIGHT"),
    ],
)
def test_numbers_that_are_none(field: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_parameters(f"a\n{field}, Sampler: Euler, Version: v1")


@given(text=st.text(max_size=300))
@settings(max_examples=200, deadline=None)
@example(text="a" * 60000)
@example(text="a, " * 10000 + " " * 30000)
@example(text='xy: "' * 12000)
@example(text='xy: "' + "\\" * 60000)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        record = parse_parameters(text)
    except RequestError:
        return
    assert isinstance(record.request["prompt"], str)


def write(path: Path, keyword: str, text: str, *, compressed: bool = False) -> Path:
    info = PngInfo()
    info.add_itxt(keyword, text, zip=compressed)
    Image.fromarray(PIXELS).save(path, pnginfo=info)
    return path


def own(**changes: Any) -> str:
    chunks = text_chunks(as_dict(Request()), version="0.1.0", size=(8, 8), model=MODEL, inputs=INPUTS)
    return json.dumps(json.loads(chunks["glassine"]) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its glassine text is damaged"),
        ("[" * 50000, "its glassine text is damaged"),
        (own(collage=[]), "its glassine text is damaged"),
        (own(collage={"layers": 3}), "its glassine text is damaged"),
        ("[]", "format_version None, this Glassine reads 1"),
        (own(format_version=2), "format_version 2, this Glassine reads 1; update Glassine"),
        (own().replace('"strength": 1.0', '"strength": NaN'), "NaN is not a number"),
        (own(request=[]), r"damaged \(request, size, model, inputs, controls or collage\)"),
        (own(size=[8]), "damaged"),
        (own(size=[8, -8]), "damaged"),
        (own(size=[8, True]), "damaged"),
        (own(model={"name": 3}), "damaged"),
        (own(inputs={"image": {"name": "x"}}), "damaged"),
        (own(inputs={"image": "x.png"}), "damaged"),
        (own(inputs=None), "damaged"),
    ],
)
def test_records_that_are_damaged_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_record(write(tmp_path / "x.png", "glassine", text))


def test_settings_that_are_not_known_are_refused(tmp_path: Path) -> None:
    record = read_record(write(tmp_path / "x.png", "glassine", own(request={"steps": "20"})))
    with pytest.raises(RequestError, match="setting 'steps' is '20', expected int"):
        Request.from_dict(record.request)


def test_files_that_hold_no_record(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    Image.fromarray(PIXELS).save(tmp_path / "photo.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:20])
    for name, message in [
        ("plain.png", "holds no settings"),
        ("photo.jpg", "expected a PNG drawn by Glassine or A1111"),
        ("cut.png", "cannot be read"),
        ("none.png", "no such file"),
    ]:
        with pytest.raises(RequestError, match=message):
            read_record(tmp_path / name)


def test_texts_that_unpack_to_more_than_a_text_are_refused(tmp_path: Path) -> None:
    for size in (2_000_000, 200_000_000):
        path = write(tmp_path / "bomb.png", "parameters", "a" * size, compressed=True)
        with pytest.raises(RequestError, match=r"bomb\.png: (its parameters text has 2000000|cannot be read)"):
            read_record(path)


def test_a1111s_png_is_read(tmp_path: Path) -> None:
    record = read_record(write(tmp_path / "a.png", "parameters", A1111))
    assert record.request["steps"] == 28


def test_hashes_of_files(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
