"""Controlled pictures, with packages that answer at once: which is asked how often, and what leaves no trace."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from glassine.errors import EngineError, PackageError, RequestError
from glassine.manifest import Manifest
from glassine.runtime import fan as fans
from glassine.runtime import pipeline
from glassine.runtime.control import Control
from glassine.runtime.control_pictures import replayed_controls, with_controls
from glassine.runtime.engine import Realised
from glassine.runtime.inputs import MapSource, read_inputs
from glassine.runtime.metadata import read_record
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request

SIDE = 64
RESIDUALS = {"additional_residual_0": (2, 4, 8, 8), "additional_residual_1": (2, 6, 4, 4)}
SPECS = {name: (shape, "float32") for name, shape in RESIDUALS.items()}


class Stub:
    """A package: cheap functions of its inputs, counted by role. Control shifts what the UNet predicts."""

    realised = Realised(engine="stub", device="", precision="", load_seconds=0.0)

    def __init__(self, role, part, calls):
        self.role, self.part, self.calls = role, part, calls
        self.inputs, self.outputs = part.inputs, part.outputs

    def predict(self, **arrays):
        self.calls[self.role] += 1
        assert set(arrays) == set(self.part.inputs)
        assert all(arrays[name].shape == tuple(shape) for name, (shape, _) in self.part.inputs.items())
        if self.role == "text_encoder":
            shape = self.outputs["hidden_states"][0]
            states = np.cos(arrays["input_ids"][0][:, None] * np.arange(1, shape[2] + 1)) * np.ones(shape)
            pooled = np.zeros(self.outputs["pooled_outputs"][0])
            return {"last_hidden_state": states[-1:], "hidden_states": states, "pooled_outputs": pooled}
        if self.role.endswith("unet"):
            shift = arrays["encoder_hidden_states"].mean(axis=(1, 2, 3), keepdims=True)
            for name in RESIDUALS.keys() & arrays.keys():
                residual = arrays[name]
                shift = shift + (residual if name.endswith("0") else residual.mean(axis=(1, 2, 3), keepdims=True))
            return {"noise_pred": np.tanh(arrays["sample"] + shift).astype(np.float32)}
        if self.role == "control":
            seen = arrays["controlnet_cond"].reshape(len(arrays["sample"]), 3, 8, 8, 8, 8).mean(axis=(1, 3, 5))
            first = arrays["sample"] * 0.2 + seen[:, None] + arrays["timestep"][:, None, None, None] / 1000
            first = first.astype(np.float32)
            if self.part.about.get("broken"):
                first[0, 0, 0, 0] = np.inf
            return {
                "additional_residual_0": first,
                "additional_residual_1": np.full((len(seen), 6, 4, 4), 0.1, np.float32),
            }
        if self.role == "vae_encoder":
            cells = arrays["x"].reshape(1, 3, SIDE // 8, 8, SIDE // 8, 8).mean(axis=(3, 5))
            return {"latent": np.concatenate([cells, cells[:, :1], np.zeros((1, 4, 8, 8))], axis=1)}
        return {"image": np.clip(arrays["z"][:, :3], -1, 1).repeat(8, axis=2).repeat(8, axis=3)}

    def close(self):
        pass


@pytest.fixture
def calls():
    return Counter()


def with_parts(manifest, *, rows=2, **about):
    """The manifest of a folder into which the nets `canny` and `inpaint` have been converted."""
    unet = manifest.parts["unet"]
    controlled = dataclasses.replace(
        unet, role="controlled_unet", file="ControlledUnet.mlpackage", inputs={**unet.inputs, **SPECS}
    )
    one = {name: ((rows, *shape[1:]), dtype) for name, (shape, dtype) in unet.inputs.items()}
    one["controlnet_cond"] = ((rows, 3, SIDE, SIDE), "float16")
    outputs = {name: ((rows, *shape[1:]), dtype) for name, (shape, dtype) in SPECS.items()}
    nets = {
        f"control:{name}": dataclasses.replace(
            unet, role="control", file=f"ControlNet_{name}.mlpackage", inputs=one, outputs=outputs,
            about={"kind": "controlnet", **about},
        )
        for name in ("canny", "inpaint")
    }  # fmt: skip
    return dataclasses.replace(manifest, parts={**manifest.parts, "controlled_unet": controlled, **nets})


@pytest.fixture
def make_pipe(tiny_folder, monkeypatch, calls):
    """make_pipe(unet_rows, net_rows, **about): a pipeline of stubs."""

    def make(unet_rows=2, net_rows=2, **about):
        manifest = Manifest.read(tiny_folder)
        unet = manifest.parts["unet"]
        inputs = {name: ((unet_rows, *shape[1:]), dtype) for name, (shape, dtype) in unet.inputs.items()}
        parts = {**manifest.parts, "unet": dataclasses.replace(unet, inputs=inputs)}
        specs = {name: ((unet_rows, *shape[1:]), "float32") for name, shape in RESIDUALS.items()}
        manifest = with_parts(dataclasses.replace(manifest, parts=parts, batch=unet_rows), rows=net_rows, **about)
        controlled = manifest.parts["controlled_unet"]
        manifest.parts["controlled_unet"] = dataclasses.replace(controlled, inputs={**inputs, **specs})
        by_file = {part.file: part for part in manifest.parts.values()}
        monkeypatch.setattr(
            pipeline, "open_engine", lambda package, _: Stub(by_file[package.name].role, by_file[package.name], calls)
        )
        monkeypatch.setattr(pipeline.Manifest, "read", lambda _: manifest)
        return Pipeline.load(tiny_folder)

    return make


@pytest.fixture
def pipe(make_pipe):
    with make_pipe() as pipe:
        yield pipe


@pytest.fixture
def edges():
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[20:44, 20:44] = 255
    return pixels


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


SETTINGS = {"steps": 8, "seed": 3, "output": "latent"}


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"stop": 0.0}, {"map": "flat:0"}])
def test_a_control_without_effect_leaves_no_trace(pipe, calls, edges, settings):
    plain = pipe("a cat", **SETTINGS)
    controlled = pipe("a cat", controls=[Control("canny", edges, **settings)], **SETTINGS)
    assert np.array_equal(controlled, plain)
    assert calls["control"] == calls["controlled_unet"] == 0


def test_steps_in_the_interval_are_drawn_by_the_controlled_unet(pipe, calls, edges):
    pipe("a cat", controls=[Control("canny", edges, start=0.25, stop=0.75)], **SETTINGS)
    assert (calls["control"], calls["controlled_unet"], calls["unet"]) == (4, 4, 4)


def test_invariant_21(pipe, edges):
    """A control map of 0 is no control, of 1 plain control, of k a weight of k."""
    plain = pipe("a cat", **SETTINGS)
    controlled = pipe("a cat", controls=[Control("canny", edges)], **SETTINGS)
    assert np.abs(controlled - plain).max() > 0.1
    for value, expected in ((0.0, plain), (1.0, controlled)):
        mapped = pipe("a cat", controls=[Control("canny", edges, map=np.full((SIDE, SIDE), value))], **SETTINGS)
        assert np.array_equal(mapped, expected)
    grey = pipe("a cat", controls=[Control("canny", edges, map="flat:0.4")], **SETTINGS)
    weighted = pipe("a cat", controls=[Control("canny", edges, weight=0.4)], **SETTINGS)
    assert np.abs(grey - weighted).max() <= 1e-6 * np.abs(weighted).max()


@pytest.mark.parametrize("mode", ["balanced", "prompt", "control"])
@pytest.mark.parametrize(("unet_rows", "net_rows"), [(1, 1), (1, 2), (2, 1), (4, 2)])
def test_batches_are_only_a_matter_of_packing(make_pipe, edges, mode, unet_rows, net_rows):
    control = Control("canny", edges, weight=0.7, mode=mode)
    with make_pipe() as pipe:
        usual = pipe("a cat", controls=[control], **SETTINGS)
    with make_pipe(unet_rows, net_rows) as pipe:
        packed = pipe("a cat", controls=[control], **SETTINGS)
    assert np.array_equal(packed, usual)


def test_the_negative_prompt_costs_no_call_of_a_net_of_one_row(make_pipe, calls, edges):
    with make_pipe(1, 1) as pipe:
        pipe("a cat", controls=[Control("canny", edges, mode="control")], **SETTINGS)
        assert (calls["control"], calls["controlled_unet"]) == (8, 16)
        calls.clear()
        pipe("a cat", controls=[Control("canny", edges)], **SETTINGS)
        assert (calls["control"], calls["controlled_unet"]) == (16, 16)


def test_image_to_image_and_maps_count_their_own_steps(pipe, calls, edges, photo):
    """The interval is a share of the steps that the run makes; a map of one value is image to image, controlled too."""
    control = Control("canny", edges, stop=0.5)
    image = pipe("a cat", image=photo, strength=0.5, controls=[control], **SETTINGS)
    assert (calls["control"], calls["unet"]) == (2, 2)
    mapped = pipe("a cat", image=photo, change_map="flat:0.5", controls=[control], **SETTINGS)
    assert np.array_equal(mapped, image)


def test_protected_pixels_stay_under_control(pipe, edges, photo):
    inputs = read_inputs(photo, MapSource(map="box:50%,0,50%,100%"), SIDE, SIDE)
    inputs = with_controls(inputs, [Control("canny", edges)], (SIDE, SIDE))
    result = pipe.run(Request(prompt="a cat", steps=4), inputs).finish()
    assert np.array_equal(result.pixels[:, :24], photo[:, :24])
    assert not np.array_equal(result.pixels[:, 40:], photo[:, 40:])


def test_exact_fans_are_controlled_runs_of_each_strength(pipe, edges, photo):
    request = Request(prompt="a cat", steps=4, seed=3)
    inputs = with_controls(read_inputs(photo, MapSource(), SIDE, SIDE), [Control("canny", edges)], (SIDE, SIDE))
    *_, (_, run) = fans.exact_fan(pipe, request, inputs, fans.columns(SIDE, 3))
    whole = pipe("a cat", image=photo, strength=1.0, controls=[Control("canny", edges)], **{**SETTINGS, "steps": 4})
    assert np.array_equal(run.finish().latents, whole)


def test_an_inpainting_net_sees_minus_one_where_the_map_changes(pipe, photo):
    inputs = read_inputs(photo, MapSource(map="box:50%,0,50%,100%"), SIDE, SIDE)
    (ready,) = with_controls(inputs, [Control("inpaint", preprocess="inpaint")], (SIDE, SIDE)).controls
    assert np.all(ready.hint[..., SIDE // 2 :] == -1)
    kept = photo[:, : SIDE // 2].astype(np.float32) / 255
    assert np.allclose(ready.hint[0, :, :, : SIDE // 2].transpose(1, 2, 0), kept, atol=1e-7)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:8] = 255
    (given,) = with_controls(inputs, [Control("inpaint", photo, mask=mask)], (SIDE, SIDE)).controls
    assert np.all(given.hint[:, :, :8] == -1)
    assert given.hint[:, :, 8:].min() >= 0


def test_an_inpainting_net_is_told_what_to_draw_anew(make_pipe, photo):
    with make_pipe(preprocessor="inpaint") as pipe:
        with pytest.raises(RequestError, match="wants to know what to draw anew; give it a mask, or say preprocess="):
            pipe("a cat", controls=[Control("inpaint", photo)], **SETTINGS)
        pipe("a cat", controls=[Control("inpaint", photo, preprocess="none")], **SETTINGS)


def test_hints_are_made_by_preprocessors_and_fitted(pipe, photo):
    wide = np.repeat(photo, 2, axis=1)
    (ready,) = with_controls(pipeline.Inputs(), [Control("canny", wide, preprocess="canny")], (SIDE, SIDE)).controls
    assert ready.hint.shape == (1, 3, SIDE, SIDE)
    assert set(np.unique(ready.hint)) == {0.0, 1.0}
    assert any("128x64 brought to 64x64 as a hint (crop)" in notice for notice in ready.notices)


def test_transparent_hints_are_refused(edges):
    rgba = np.dstack([edges, edges[..., 0]])
    with pytest.raises(RequestError, match="hint of canny: has transparent pixels, and a hint is taken as it is"):
        with_controls(pipeline.Inputs(), [Control("canny", rgba)], (SIDE, SIDE))
    opaque = np.dstack([edges, np.full_like(edges[..., 0], 255)])
    (ready,) = with_controls(pipeline.Inputs(), [Control("canny", opaque)], (SIDE, SIDE)).controls
    assert np.array_equal(ready.hint[0, 0] * 255, edges[..., 0])


def test_requests_that_make_no_sense(pipe, edges, make_pipe):
    with pytest.raises(RequestError, match='no control net "cany", only canny, inpaint; convert it first'):
        pipe("a cat", controls=[Control("cany", edges)], **SETTINGS)
    with pytest.raises(RequestError, match="control canny: has no hint"):
        pipe("a cat", controls=[Control("canny")], **SETTINGS)
    with pytest.raises(RequestError, match="inpainting needs to know where"):
        pipe("a cat", image=edges, controls=[Control("inpaint", preprocess="inpaint")], **SETTINGS)
    del pipe.manifest.parts["controlled_unet"]
    with pytest.raises(PackageError, match=r"its unet takes no control \(there is no controlled_unet\)"):
        pipe("a cat", controls=[Control("canny", edges)], **SETTINGS)


def test_a_broken_net_is_named(make_pipe, edges):
    message = r'step 1 \(sigma 14.61\): control net "canny" returned 1 of 512 numbers of additional_residual_0'
    with make_pipe(broken=True) as pipe, pytest.raises(EngineError, match=message):
        pipe("a cat", controls=[Control("canny", edges)], **SETTINGS)


def test_a_picture_remembers_its_controls(pipe, edges, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(edges).save(tmp_path / "edges.png")
    Image.fromarray(edges[..., 0]).save(tmp_path / "where.png")
    controls = [
        Control("canny", tmp_path / "edges.png", weight=0.8, stop=0.6, mode="prompt", map=tmp_path / "where.png"),
        Control("inpaint", tmp_path / "edges.png", mask=tmp_path / "where.png", map="gradient:left-right:from=0.5"),
    ]
    image = pipe("a cat", steps=2, controls=controls)
    request = Request(prompt="a cat", steps=2)
    inputs = with_controls(pipeline.Inputs(), controls, (SIDE, SIDE))
    result = pipe.run(request, inputs).finish()
    assert np.array_equal(np.asarray(image), result.pixels)
    unit = '"Module: none, Model: canny, Weight: 0.8, Guidance Start: 0.0, Guidance End: 0.6, ' \
           'Control Mode: My prompt is more important"'  # fmt: skip
    assert f"ControlNet 0: {unit}" in result.text["parameters"]
    pipeline_png(tmp_path / "drawn.png", result)
    record = read_record(tmp_path / "drawn.png")
    assert replayed_controls(record, tmp_path) == controls
    assert str(tmp_path) not in json.dumps(result.text)


def pipeline_png(path, result):
    from glassine.runtime.image import save_png

    save_png(path, result.pixels, text=result.text, overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": "../canny"}, "a recorded control has the settings"),
        ({"magic": 1}, "a recorded control has the settings"),
        ({"weight": "2"}, "of the wrong type"),
        ({"weight": 3}, "weight is 3"),
        ({"mode": "mine"}, "mode is 'mine'"),
        ({"files": {"image": {"name": "../edges.png", "sha256": "0"}}}, "changed since the picture was drawn"),
        ({"files": {"image": {"name": "", "sha256": "0"}}}, "was an array in Python, not a file"),
    ],
)
def test_forged_records_are_refused(pipe, edges, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(edges).save(tmp_path / "edges.png")
    inputs = with_controls(pipeline.Inputs(), [Control("canny", tmp_path / "edges.png")], (SIDE, SIDE))
    result = pipe.run(Request(prompt="a cat", steps=1), inputs).finish()
    raw = json.loads(result.text["glassine"])
    raw["controls"][0].update(change)
    result.text["glassine"] = json.dumps(raw)
    pipeline_png(tmp_path / "forged.png", result)
    with pytest.raises(RequestError, match=message):
        replayed_controls(read_record(tmp_path / "forged.png"), tmp_path)
