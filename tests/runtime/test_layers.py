"""Transparent pictures and layers: what the packages are asked, row by row, and what comes out of their answers."""

import dataclasses
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from glassine.errors import PackageError, RequestError
from glassine.manifest import Manifest, Part
from glassine.runtime import pipeline
from glassine.runtime.compose import checkerboard, composite_rgba, opaque, over
from glassine.runtime.control import Control, ReadyControl
from glassine.runtime.engine import Realised
from glassine.runtime.image import over_grey, save_png
from glassine.runtime.inputs import Inputs, MapSource, read_inputs
from glassine.runtime.layer_run import _not_behind, stop_step
from glassine.runtime.layers import alpha_of_grey, draw_layers, read_layer, save_stack
from glassine.runtime.noise import randn
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import sigmas_of
from glassine.runtime.schedule import STABLE_DIFFUSION

SIDE, CELLS = 64, 8
STEPS = 4
RNG = np.random.default_rng(8)


def patched(kind: str, frames: list[str], decoded: list[str], *, batch: int = 2, **about) -> tuple[str, Part]:
    rows = batch * len(frames)
    inputs = {"sample": ((rows, 4, CELLS, CELLS), "float16")}
    if about.get("conditions"):
        inputs["condition"] = ((rows, 4 * len(about["conditions"]), CELLS, CELLS), "float16")
    said = {"frames": frames, "decoded": decoded, "conditions": [], "control": None, **about}
    return f"{kind}_unet", part(f"{kind}_unet", inputs, {**said, "patch": f"{kind}.safetensors", "patch_sha256": "ab"})


def part(role: str, inputs: dict | None = None, about: dict | None = None) -> Part:
    return Part(
        file=f"{role}.mlpackage", role=role, inputs=inputs or {}, outputs={}, parameters=0, precision="float16",
        source="", source_sha256="", about=about or {},
    )  # fmt: skip


DECODER = part("transparent_decoder", {"pixel": ((1, 3, SIDE, SIDE), "float16")}, {"family": "sd15"})
ENCODER = part("transparent_encoder", about={"offset_scale": 1.0})
TRANSPARENT = {**dict([patched("transparent", ["fg"], ["fg"])]), "transparent_decoder": DECODER}
EVERYTHING = {**TRANSPARENT, "transparent_encoder": ENCODER}
XL = {
    **dict([
        patched("fg2ble", ["blend"], [], conditions=["fg"]),
        patched("bg2ble", ["blend"], [], conditions=["bg"]),
        patched("fgble2bg", ["bg"], [], conditions=["fg", "blend"]),
        patched("bgble2fg", ["fg"], ["fg"], conditions=["bg", "blend"]),
    ]),
    "transparent_decoder": DECODER,
}  # fmt: skip


def cells_of(picture: np.ndarray) -> np.ndarray:
    return picture.reshape(1, 3, CELLS, 8, CELLS, 8).mean(axis=(3, 5))


class Stub:
    """Answers as a package would, by cheap functions of its inputs, and remembers what it was asked."""

    realised = Realised(engine="stub", device="", precision="", load_seconds=0.0)

    def __init__(self, role: str, calls: list, outputs: dict) -> None:
        self.role, self.calls, self.outputs = role, calls, outputs

    def predict(self, **arrays):
        self.calls.append((self.role, {name: array.copy() for name, array in arrays.items()}))
        return getattr(self, f"_{self.role.split('_')[-1]}")(**arrays)

    def _encoder(self, **arrays):
        if self.role == "transparent_encoder":
            return {"offset": 0.1 * cells_of(arrays["argb"][:, :3]).repeat(2, axis=1)[:, :4]}
        if self.role == "vae_encoder":
            cells = cells_of(arrays["x"])
            return {"latent": np.concatenate([cells, cells[:, :1], np.zeros((1, 4, CELLS, CELLS))], axis=1)}
        shape = self.outputs["hidden_states"][0]
        states = np.cos(arrays["input_ids"][0][:, None] * np.arange(1, shape[2] + 1)) * np.ones(shape)
        pooled = np.zeros(self.outputs["pooled_outputs"][0])
        return {"last_hidden_state": states[-1:], "hidden_states": states, "pooled_outputs": pooled}

    def _unet(self, sample, timestep, encoder_hidden_states, **further):
        """Rows of one sample see each other, and what is given beside them."""
        noise = np.tanh(sample + encoder_hidden_states.mean(axis=(1, 2, 3), keepdims=True))
        if self.role != "unet":
            noise = noise + 0.01 * sample.mean(axis=0)
        for array in further.values():
            noise = noise + 0.1 * array.mean()
        return {"noise_pred": noise.astype(np.float32)}

    def _control(self, image):
        return {"a_control": image[:, :, ::8, ::8], "b_control": 2 * image[:, :, ::16, ::16]}

    def _decoder(self, **arrays):
        if self.role == "vae_decoder":
            return {"image": np.clip(arrays["z"][:, :3], -1, 1).repeat(8, axis=2).repeat(8, axis=3)}
        pixel, alpha = arrays["pixel"], np.abs(arrays["latent"][:, :1]).repeat(8, axis=2).repeat(8, axis=3)
        return {"argb": np.concatenate([np.clip(alpha, 0, 1), pixel], axis=1)}

    def close(self) -> None:
        pass


@pytest.fixture
def model(tiny_folder, monkeypatch):
    """model(further parts) -> (pipe, calls): the tiny folder with more parts, on stubs."""

    def load(further: dict[str, Part]) -> tuple[Pipeline, list]:
        manifest = Manifest.read(tiny_folder)
        parts = {**manifest.parts, **further}
        by_file, calls = {part.file: part for part in parts.values()}, []

        def open_stub(package, *_, **__):
            found = by_file[package.name]
            return Stub(found.role, calls, found.outputs)

        monkeypatch.setattr(pipeline, "open_engine", open_stub)
        pipe = Pipeline.load(tiny_folder)
        pipe.manifest = dataclasses.replace(manifest, parts=parts)
        return pipe, calls

    return load


def asked(calls: list, role: str) -> list[dict]:
    return [arrays for name, arrays in calls if name == role]


def cutout() -> np.ndarray:
    rgba = RNG.integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    rgba[:32, :, 3] = 0
    return rgba


def test_a_transparent_picture(model):
    pipe, calls = model(TRANSPARENT)
    run = pipe.run(Request(prompt="a star", steps=STEPS, transparent=True, passes=1, seed=4))
    result = run.finish()
    assert (len(asked(calls, "transparent_unet")), len(asked(calls, "unet"))) == (STEPS, 0)
    unscaled = result.latents / np.float32(pipe.manifest.latent_scale)
    grey = np.clip(np.clip(unscaled[0, :3], -1, 1) / 2 + 0.5, 0, 1)
    alpha = np.clip(np.abs(unscaled[0, :1]), 0, 1)
    argb = np.concatenate([grey, alpha]).repeat(8, axis=1).repeat(8, axis=2)
    assert np.array_equal(result.pixels, np.moveaxis(np.floor(argb * 255), 0, -1))
    assert np.array_equal(result.grey, result.pixels[..., :3])
    assert result.image.mode == "RGBA"
    assert set(result.layers) == {"fg"}
    record = json.loads(result.text["glassine"])
    assert (record["request"]["transparent"], record["request"]["passes"]) == (True, 1)
    assert (record["model"]["patch"], record["model"]["patch_sha256"]) == ("transparent.safetensors", "ab")
    assert Request.from_dict(record["request"]) == run.request


def test_the_python_interface_returns_rgba(model):
    pipe, _ = model(TRANSPARENT)
    assert pipe("a star", transparent=True, steps=1, output="numpy").shape == (SIDE, SIDE, 4)
    assert pipe("a star", transparent=True, steps=1).mode == "RGBA"
    assert pipe("a star", steps=1).mode == "RGB"


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_joint_layers_share_every_call(model, batch, guidance_scale):
    frames = ["fg", "bg", "blend"]
    pipe, calls = model({**TRANSPARENT, **dict([patched("joint", frames, ["fg"], batch=batch)])})
    words = {"fg_prompt": "a cup", "bg_prompt": "a table"}
    request = Request(prompt="tea", layers="joint", steps=STEPS, seed=3, guidance_scale=guidance_scale, **words)
    result = pipe.run(request).finish()
    assert {name: pixels.shape[-1] for name, pixels in result.layers.items()} == {"fg": 4, "bg": 3, "blend": 3}
    assert np.array_equal(result.pixels, result.layers["fg"])
    first = asked(calls, "joint_unet")[:1] if batch == 2 or guidance_scale == 1 else asked(calls, "joint_unet")[:2]
    rows = {name: np.concatenate([call[name] for call in first]) for name in ("sample", "encoder_hidden_states")}
    sigma = float(sigmas_of(pipe.schedule, request)[0])
    noise = randn(3, (3, 4, CELLS, CELLS)) * np.float32(sigma / np.sqrt(sigma**2 + 1))
    branches = 1 if guidance_scale == 1 else 2
    assert np.allclose(rows["sample"][: 3 * branches], np.tile(noise, (branches, 1, 1, 1)), atol=1e-6)

    def context(text: str) -> np.ndarray:
        return pipe.encode(text, request).context.transpose(0, 2, 1)[0, :, None]

    prompts = ["a cup, tea", "a table, tea", "tea"]
    expected = [*([""] * 3 if branches == 2 else []), *prompts]  # one negative prompt for all, before the others
    for row, text in zip(rows["encoder_hidden_states"], expected, strict=False):
        assert np.array_equal(row, context(text))


def test_layers_see_each_other_and_nothing_of_other_pictures(model):
    """The joint network's rows of one call belong to one picture: its frames, in one branch after the other."""
    pipe, calls = model({**TRANSPARENT, **dict([patched("joint", ["fg", "bg", "blend"], ["fg"])])})
    pipe.run(Request(layers="joint", steps=1)).finish()
    (call,) = asked(calls, "joint_unet")
    assert call["sample"].shape[0] == 6
    assert np.array_equal(call["sample"][:3], call["sample"][3:])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("stop_at", [0.0, 0.4, 1.0])
def test_stop_at_hands_over_to_the_base_network(model, stop_at, sampler):
    parts = {**TRANSPARENT, **dict([patched("transparent", ["fg"], ["fg"], conditions=[])])}
    pipe, calls = model(parts)
    settings = {"prompt": "a star", "steps": 10, "sampler": sampler, "spacing": "linspace"}
    stopped = pipe.run(Request(transparent=True, stop_at=stop_at, passes=1, **settings)).finish()
    times, patched_times = (
        [float(call["timestep"][0]) for call in asked(calls, role)] for role in ("unet", "transparent_unet")
    )
    levels = [pipe.schedule.t_of_sigma(float(sigma)) for sigma in sigmas_of(pipe.schedule, Request(**settings))[:-1]]
    late = [t for t in levels if t < (1 - stop_at) * 999]
    if stop_at == 0:
        assert patched_times == []
        assert np.array_equal(stopped.latents, pipe.run(Request(**settings)).finish().latents)
    elif stop_at == 1:
        assert times == []
    elif sampler == "euler":
        assert 0 < len(late) < len(levels)
        assert np.allclose(times, late, atol=1e-3)
        assert np.allclose(patched_times, levels[: -len(late)], atol=1e-3)
    else:  # both calls of a Heun step are its own network's
        assert len(patched_times) == 2 * (len(levels) - len(late))
        assert len(times) == 2 * len(late) - 1


def test_the_step_at_which_the_base_network_takes_over():
    sigmas = sigmas_of(STABLE_DIFFUSION, Request(steps=10, spacing="linspace"))  # t = 999, 888, ... 111, 0
    assert [stop_step(STABLE_DIFFUSION, sigmas, share) for share in (0, 0.05, 0.5, 0.9, 1)] == [0, 1, 5, 9, 10]


def test_conditions_are_latents_over_grey_for_every_row(model):
    pipe, calls = model(XL)
    fg, blend = cutout(), opaque(RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    stack = draw_layers(pipe, Request(prompt="a table", steps=2), "extract", {"fg": fg, "blend": blend})
    scale = pipe.manifest.latent_scale
    latents = []
    for picture in (fg, blend):
        cells = cells_of(over_grey(picture))
        latents.append(scale * np.concatenate([cells, cells[:, :1]], axis=1))
    for call in asked(calls, "fgble2bg_unet"):
        assert call["condition"].shape == (2, 8, CELLS, CELLS)
        assert np.allclose(call["condition"], np.concatenate(latents, axis=1), atol=1e-6)
    assert stack.layers["fg"] is fg
    assert stack.layers["bg"].shape == fg.shape
    assert np.array_equal(stack.composite, over([stack.layers["bg"], fg]))


@pytest.mark.parametrize(
    ("task", "given", "kinds", "drawn"),
    [("fg2bg", "fg", ["fg2ble", "fgble2bg"], "bg"), ("bg2fg", "bg", ["bg2ble", "bgble2fg"], "fg")],
)
def test_sdxl_draws_the_blend_first_and_the_layer_from_both(model, task, given, kinds, drawn):
    pipe, calls = model(XL)
    request = Request(prompt="tea", steps=4, stop_at=0.5, spacing="linspace")
    stack = draw_layers(pipe, request, task, {given: cutout()})
    order = [role for role, _ in calls if role.endswith("_unet")]
    assert list(dict.fromkeys(order)) == [f"{kind}_unet" for kind in kinds]
    assert order.count(f"{kinds[0]}_unet") == 4  # stop_at is about the last run
    assert order.count(f"{kinds[1]}_unet") == 2
    assert [list(result.layers) for result in stack.results] == [["blend"], [drawn]]
    cells = cells_of(over_grey(opaque(stack.blend)))
    condition = asked(calls, f"{kinds[1]}_unet")[0]["condition"]
    assert np.allclose(condition[0, 4:7], pipe.manifest.latent_scale * cells[0], atol=1e-6)
    assert "condition" not in asked(calls, "unet")[0]


def test_stable_diffusion_15_draws_both_in_one_run_with_signals_made_once(model):
    shared = dict([patched("fg2bg", ["bg", "blend"], [], control="fg")])
    pipe, calls = model({**XL, **shared, "fg2bg_control": part("fg2bg_control")})
    fg = cutout()
    stack = draw_layers(pipe, Request(prompt="a table", steps=3), "fg2bg", {"fg": fg})
    (signal,) = asked(calls, "fg2bg_control")
    assert np.array_equal(signal["image"], over_grey(fg))
    for call in asked(calls, "fg2bg_unet"):
        assert np.array_equal(call["a_control"], over_grey(fg)[:, :, ::8, ::8])
        assert np.array_equal(call["b_control"], 2 * over_grey(fg)[:, :, ::16, ::16])
    assert not asked(calls, "fg2ble_unet")
    assert set(stack.layers) == {"fg", "bg"}
    assert stack.blend.shape == (SIDE, SIDE, 3)


def test_a_map_that_keeps_everything_returns_the_sources_bytes(model, tmp_path):
    pipe, calls = model(EVERYTHING)
    source = cutout()
    Image.fromarray(source).save(tmp_path / "source.png")
    inputs = read_inputs(tmp_path / "source.png", MapSource(map=np.zeros((SIDE, SIDE))), SIDE, SIDE, keep_alpha=True)
    result = pipe.run(Request(transparent=True, steps=STEPS), inputs).finish()
    assert not [role for role, _ in calls if role.endswith("unet")]
    save_png(tmp_path / "again.png", result.pixels)
    again = Image.open(tmp_path / "again.png")
    assert again.mode == "RGBA"
    assert np.array_equal(np.asarray(again), source)  # colours under alpha 0 too


def test_a_map_keeps_bytes_outside_and_transparent_latents_inside(model):
    pipe, _ = model(EVERYTHING)
    source = cutout()
    change = np.zeros((SIDE, SIDE))
    change[:, 40:] = 1
    inputs = read_inputs(source, MapSource(map=change), SIDE, SIDE, keep_alpha=True)
    run = pipe.run(Request(transparent=True, steps=STEPS, passes=1), inputs)
    kept = run.n[0, 0] == 0
    z = None
    for step in run:
        z = step.denoised
    result = run.finish()
    cells = cells_of(over_grey(source))
    offset = 0.1 * cells_of(np.concatenate([source[..., 3:], source[..., :2]], -1).transpose(2, 0, 1)[None] / 255)
    assert np.allclose(z[0, 0][kept], pipe.manifest.latent_scale * (cells + offset)[0, 0][kept], atol=1e-5)
    assert np.array_equal(result.pixels[:, :32], source[:, :32])
    plain = dataclasses.replace(inputs, change_map=np.ones((SIDE, SIDE), np.float32))
    assert not np.array_equal(pipe.run(run.request, plain).finish().pixels[:, :32], source[:, :32])


def test_a_composite_of_bytes_is_used(model, monkeypatch):
    pipe, _ = model(EVERYTHING)
    source = cutout()
    seen = SimpleNamespace()

    def spy(decoded, given, live):
        seen.decoded, seen.given = decoded, given
        return composite_rgba(decoded, given, live)

    monkeypatch.setattr("glassine.runtime.layer_run.composite_rgba", spy)
    inputs = read_inputs(source, MapSource(map="gradient:left-right"), SIDE, SIDE, keep_alpha=True)
    pipe.run(Request(transparent=True, steps=STEPS, passes=1), inputs).finish()
    assert np.array_equal(seen.given, source)
    assert seen.decoded.shape == source.shape


def test_alpha_of_a_picture_on_grey_alone(model):
    pipe, calls = model(TRANSPARENT)
    pixels = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    rgba, figures = alpha_of_grey(pipe, pixels, 1)
    (call,) = asked(calls, "transparent_decoder")
    assert not call["latent"].any()
    assert np.allclose(call["pixel"], pixels.transpose(2, 0, 1)[None] / 255, atol=1e-6)
    assert np.abs(rgba[..., :3].astype(int) - pixels).max() <= 1
    assert any("every pixel is transparent" in notice for notice in figures.notices)


def test_what_looks_wrong_is_a_notice(model, monkeypatch):
    pipe, _ = model(TRANSPARENT)
    monkeypatch.setattr(Stub, "_decoder", lambda self, **a: {"image": np.ones((1, 3, SIDE, SIDE)),
                                                             "argb": np.ones((1, 4, SIDE, SIDE))})  # fmt: skip
    result = pipe.run(Request(transparent=True, steps=1)).finish()
    assert any("no pixel is transparent" in notice for notice in result.notices)
    assert result.health.opaque == 1


def test_a_preview_is_over_a_checkerboard_where_it_is_grey(model):
    pipe, _ = model(TRANSPARENT)
    run = pipe.run(Request(transparent=True, steps=1))
    (step,) = run
    grey = step._replace(denoised=np.zeros_like(step.denoised))  # the stub encodes grey as zeros
    assert np.abs(run.preview(grey).astype(int) - checkerboard(SIDE, SIDE)).max() <= 1
    white = step._replace(denoised=step.denoised * 0 + np.array([3, 3, 3, 0], np.float32)[None, :, None, None])
    far = pipe.run(Request(steps=1)).preview(white)
    assert np.array_equal(run.preview(white), far)


def control(weight: float | tuple[float, ...]) -> ReadyControl:
    return ReadyControl(control=Control("canny", weight=weight), hint=np.zeros((1, 3, SIDE, SIDE), np.float32))


def test_controls_stay_out_of_the_background():
    inputs = Inputs(controls=(control(0.7), control((1.0, 0.5, 0.2))))
    first, second = _not_behind(inputs, ("fg", "bg", "blend")).controls
    assert first.control.weight == (0.7, 0.0, 0.7)
    assert second.control.weight == (1.0, 0.5, 0.2)  # said frame by frame
    assert _not_behind(inputs, ("fg",)) is inputs


@pytest.mark.parametrize(
    ("parts", "settings", "words"),
    [({}, {}, "no transparent_unet for 64x64; add LayerDiffuse's patch .* --base"),
     (dict([patched("transparent", ["fg"], ["fg"])]), {}, "no transparent_decoder for 64x64; add the transparent VAE"),
     (TRANSPARENT, {"image": True}, "no transparent_encoder"),
     ({}, {"layers": "joint"}, "no joint_unet for 64x64; add LayerDiffuse's joint model"),
     ({"transparent_unet": part("transparent_unet")}, {}, "does not say which pictures it draws")],
)  # fmt: skip
def test_what_a_model_lacks_is_said_with_the_command_that_adds_it(model, parts, settings, words):
    pipe, calls = model(parts)
    inputs = Inputs()
    if settings.pop("image", False):
        inputs = read_inputs(cutout(), MapSource(), SIDE, SIDE, keep_alpha=True)
    with pytest.raises(PackageError, match=words):
        pipe.run(Request(transparent=True, steps=1, **settings), inputs)
    assert not calls  # before any work


def test_what_cannot_be_drawn_is_said(model):
    pipe, calls = model({**XL, **EVERYTHING, **dict([patched("joint", ["fg", "bg", "blend"], ["fg"])])})
    source = read_inputs(cutout(), MapSource(), SIDE, SIDE, keep_alpha=True)
    with pytest.raises(RequestError, match="draws fg, bg, blend from noise; leave the image out"):
        pipe.run(Request(layers="joint"), source)
    with pytest.raises(RequestError, match=r"got the layers \[\], expected \['fg'\]"):
        pipe.run(Request(layers="fg2ble"))
    solid, clear = cutout(), cutout()
    solid[..., 3], clear[..., 3] = 255, 0
    for rgba, words in ((solid, "opaque everywhere; expected a cut-out"), (clear, "fully transparent")):
        with pytest.raises(RequestError, match=words):
            draw_layers(pipe, Request(), "fg2bg", {"fg": rgba})
    with pytest.raises(RequestError, match="extract: got the layers bg, expected bg and blend or blend and fg"):
        draw_layers(pipe, Request(), "extract", {"bg": solid})
    clear_source = read_inputs(clear, MapSource(), SIDE, SIDE, keep_alpha=True)
    with pytest.raises(RequestError, match="fully transparent"):
        pipe.run(Request(transparent=True), clear_source)
    pipe.refiner = pipe
    with pytest.raises(RequestError, match="a refiner knows nothing of transparency"):
        pipe.run(Request(transparent=True))
    pipe.refiner = None
    assert not [role for role, _ in calls if role.endswith("unet")]
    for settings, words in (({"passes": 3}, "passes is 3"), ({"stop_at": 1.5}, "stop_at is 1.5"),
                            ({"layers": "both"}, "layers is 'both'")):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            Request(**settings)
    with pytest.raises(PackageError, match="cannot fg2bg at 64x64; add LayerDiffuse's fg2bg or fg2ble and fgble2bg"):
        draw_layers(model(TRANSPARENT)[0], Request(), "fg2bg", {"fg": cutout()})


def test_a_stack_becomes_a_folder(model, tmp_path):
    pipe, _ = model({**TRANSPARENT, **dict([patched("joint", ["fg", "bg", "blend"], ["fg"])])})
    stack = draw_layers(pipe, Request(prompt="tea", steps=2), "joint")
    paths = save_stack(tmp_path / "tea", stack)
    names = {"background.png", "foreground.png", "blend.png", "composite.png", "layers.ora"}
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "tea").iterdir()} == names
    foreground = Image.open(tmp_path / "tea" / "foreground.png")
    assert np.array_equal(np.asarray(foreground), stack.layers["fg"])
    assert json.loads(foreground.info["glassine"])["request"]["layers"] == "joint"
    background = np.asarray(Image.open(tmp_path / "tea" / "background.png"))
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "tea" / "composite.png")), over([background, stack.layers["fg"]])
    )
    with zipfile.ZipFile(tmp_path / "tea" / "layers.ora") as archive:
        assert b"foreground" in archive.read("stack.xml")
    with pytest.raises(RequestError, match=r"holds layers.ora, composite.png, .* already"):
        save_stack(tmp_path / "tea", stack)
    save_stack(tmp_path / "tea", stack, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        save_stack(tmp_path / "file", stack)


def test_a_layer_is_read_with_its_alpha(tmp_path):
    rgba = cutout()
    Image.fromarray(rgba).save(tmp_path / "cup.png")
    assert np.array_equal(read_layer(tmp_path / "cup.png", SIDE, SIDE, name="foreground"), rgba)
    Image.fromarray(rgba[..., :3]).save(tmp_path / "cup.jpg")
    assert (read_layer(tmp_path / "cup.jpg", SIDE, SIDE, name="foreground")[..., 3] == 255).all()
    assert read_layer(tmp_path / "cup.png", 128, 64, name="foreground").shape == (64, 128, 4)
