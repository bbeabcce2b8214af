"""LayerDiffuse's networks against what the official modules gave, through converted packages on the portable engine.

Weights in packages are fp16. Where a tolerance is that of float32, the package's records are read as the float32
numbers that they were made of, so that nothing but the graph is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.layer_patches import SharedFrames
from glassine.convert.names import Source
from glassine.convert.package import write_package
from glassine.convert.program import Requests, lower
from glassine.convert.weights import Arrays, FileWeights, Patched, WeightSource
from glassine.models import mil as mb
from glassine.models import transparency
from glassine.models.config import FrameControlConfig, TransparentDecoderConfig, TransparentEncoderConfig, UNetConfig
from glassine.models.layers import Scope, build
from glassine.models.sharing import Frames, attention_units, control_name, shared_attention
from glassine.models.transparency import frame_control, transparent_decoder, transparent_encoder
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.engine.portable.program import Constant

TINY = Path(__file__).parents[2] / "models/tiny/tiny_transparent_decoder.safetensors"
LAYOUTS = {"split": "channels_first", "einsum": "channels_last", "sdpa": "channels_last"}
FP16 = 2e-2  # the tolerance for fp16 weights; outputs have a deviation of 0.56 (decoder) to 1.3 (attention)


class Packaged:
    """A program with weights in a package. `predict(exact=True)` reads its records as float32."""

    def __init__(self, path: Path, program: Any, requests: Requests, weights: WeightSource) -> None:
        requests.check("test")
        assert set(requests.asked) == set(weights.shapes)
        lowered = lower(program)
        write_package(path, lowered, weights)
        self.path = path
        self.records = {record.offset: (record, weight) for record, weight in lowered.plan.weights()}
        self.weights = weights

    @contextmanager
    def opened(self, *, exact: bool = False) -> Iterator[Callable[..., dict[str, np.ndarray]]]:
        with pytest.MonkeyPatch.context() as patch:
            if exact:
                patch.setattr(Constant, "array", self._array(Constant.array))
            engine = open_engine(self.path, EngineOptions(engine="portable"))
            try:
                yield lambda **inputs: {name: np.array(value) for name, value in engine.predict(**inputs).items()}
            finally:
                engine.close()

    def predict(self, *, exact: bool = False, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        with self.opened(exact=exact) as predict:
            return predict(**inputs)

    def _array(self, stored: Callable[[Constant], Any]) -> Callable[[Constant], Any]:
        def array(constant: Constant) -> Any:
            if constant.file is None or constant.offset not in self.records:
                return stored(constant)
            record, weight = self.records[constant.offset]
            values = self.weights.read(weight.name, 0, int(np.prod(record.shape))).astype(np.float32)
            return (values * np.float32(weight.scale)).reshape(constant.type.shape)

        return array


@pytest.fixture(scope="module")
def decoder_weights(layerdiffuse: ModuleType) -> Arrays:
    """The decoder's weights, 104 million."""
    return Arrays(layerdiffuse.weights(layerdiffuse.released()["vae_transparent_decoder.safetensors"]))


def packaged_decoder(
    path: Path,
    weights: WeightSource,
    form: str,
    config: TransparentDecoderConfig | None = None,
    size: tuple[int, int] = (64, 64),
) -> Packaged:
    config, requests = TransparentDecoderConfig() if config is None else config, Requests(weights.shapes)
    how: Any = {"attention": form, "layout": LAYOUTS[form]}
    program = transparent_decoder(config, requests, height=size[0], width=size[1], **how)
    return Packaged(path, program, requests, weights)


@pytest.fixture(scope="module", params=list(LAYOUTS))
def decoder(request, decoder_weights, tmp_path_factory) -> Packaged:
    """The decoder at 64x64 in every form."""
    return packaged_decoder(tmp_path_factory.mktemp(request.param) / "d.mlpackage", decoder_weights, request.param)


@pytest.fixture(scope="module")
def example(layerdiffuse) -> dict[str, np.ndarray]:
    """Inputs and output of the decoder at 64x64."""
    return {what: layerdiffuse.golden()[f"dec/dec_64x64_{what}"] for what in ("pixel", "latent", "out")}


def off(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


def test_decoder(decoder, example):
    inputs = {"pixel": example["pixel"], "latent": example["latent"]}
    assert off(decoder.predict(exact=True, **inputs)["argb"], example["out"]) < 1e-4  # measured 3e-6
    assert off(decoder.predict(**inputs)["argb"], example["out"]) < FP16  # measured 2.9e-3


def test_inputs_that_the_decoder_was_not_trained_on_give_something_else(decoder, example):
    pixel, latent, out = example["pixel"], example["latent"], example["out"]
    mistakes = {
        "scaled latent": (pixel, latent * 0.18215),
        "pixels from -1": (pixel * 2 - 1, latent),
        "BGR": (np.ascontiguousarray(pixel[:, ::-1]), latent),
        "no latent": (pixel, latent * 0),
    }
    if "einsum" not in str(decoder.path):
        pytest.skip("the mistakes are those of a caller: one form is enough")
    with decoder.opened() as predict:
        right = predict(pixel=pixel, latent=latent)["argb"]
        assert off(right, out) < FP16
        assert off(right[:, [1, 2, 3, 0]], out) > 10 * FP16  # alpha comes first
        for mistake, (pixel, latent) in mistakes.items():
            assert off(predict(pixel=pixel, latent=latent)["argb"], out) > 10 * FP16, mistake  # measured 0.5 and more


@pytest.mark.slow
def test_decoder_on_a_wide_picture(decoder_weights, layerdiffuse, tmp_path):
    pixel, latent, out = (layerdiffuse.golden()[f"dec/dec_128x192_{what}"] for what in ("pixel", "latent", "out"))
    network = packaged_decoder(tmp_path / "d.mlpackage", decoder_weights, "split", size=(128, 192))
    assert off(network.predict(exact=True, pixel=pixel, latent=latent)["argb"], out) < 1e-4  # measured 3e-6
    assert off(network.predict(pixel=pixel, latent=latent)["argb"], out) < FP16  # measured 3.8e-3


@pytest.mark.parametrize("form", ["split", pytest.param("einsum", marks=pytest.mark.slow)])
def test_decoder_in_chunks_of_queries(decoder_weights, example, tmp_path, monkeypatch, form):
    """Nine queries at a time of the sixteen at the fifth level, so that a rest remains."""
    monkeypatch.setattr(transparency, "SCORES", 9 * 32 * 16)
    network = packaged_decoder(tmp_path / "d.mlpackage", decoder_weights, form)
    argb = network.predict(exact=True, pixel=example["pixel"], latent=example["latent"])["argb"]
    assert off(argb, example["out"]) < 1e-4  # measured 3e-6


def latent_in_the_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that what is kept of the step before the latent holds it too."""
    own_add, own_down, sums = mb.add, transparency._Decoder._down, []

    def add(**inputs: Any) -> Any:
        result = own_add(**inputs)
        if inputs.get("name") == "with_latent":
            sums.append(result)
        return result

    def down(self: Any, x: Any, latent: Any) -> list[Any]:
        kept = own_down(self, x, latent)
        kept[transparency.LATENT_LEVEL * (self.config.layers + 1)] = sums[0]
        return kept

    monkeypatch.setattr(mb, "add", add)
    monkeypatch.setattr(transparency._Decoder, "_down", down)


@pytest.mark.parametrize(
    "mistake",
    [
        latent_in_the_skip,
        pytest.param(TransparentDecoderConfig(norm_groups=32), marks=pytest.mark.slow),
        pytest.param(TransparentDecoderConfig(head_dim=64), marks=pytest.mark.slow),
    ],
    ids=["latent in the skip", "32 groups", "8 heads"],
)
def test_another_network_gives_something_else(decoder_weights, example, tmp_path, monkeypatch, mistake):
    config = mistake if isinstance(mistake, TransparentDecoderConfig) else None
    if config is None:
        mistake(monkeypatch)
    network = packaged_decoder(tmp_path / "d.mlpackage", decoder_weights, "einsum", config)
    argb = network.predict(pixel=example["pixel"], latent=example["latent"])["argb"]
    assert off(argb, example["out"]) > 5 * FP16


def test_offset_encoder(layerdiffuse, tmp_path):
    shapes = layerdiffuse.released()["vae_transparent_encoder.safetensors"]
    weights = Arrays(layerdiffuse.weights(shapes, "enc."))
    argb, out = (layerdiffuse.golden()[f"dec/enc_64x128_{what}"] for what in ("in", "out"))
    requests = Requests(weights.shapes)
    program = transparent_encoder(TransparentEncoderConfig(), requests, height=64, width=128)
    network = Packaged(tmp_path / "e.mlpackage", program, requests, weights)
    assert off(network.predict(exact=True, argb=argb)["offset"], out) < 1e-5  # measured 2e-7
    assert off(network.predict(argb=argb)["offset"], out) < FP16  # measured 1e-4
    swapped = np.ascontiguousarray(argb[:, [1, 2, 3, 0]])
    assert off(network.predict(exact=True, argb=swapped)["offset"], out) > 100 * 1e-5  # measured 4e-3


# A UNet of one transformer block: its two attentions have the sizes of the goldens'.
ONE_BLOCK = UNetConfig(
    channels=(320,), layers=1, down_depths=((1,),), mid_depth=None, up_depths=((0, 0),), heads=(8,), context_dim=768
)
OWN, CROSS = (name for name, _, _ in attention_units(ONE_BLOCK))
SHARING = {  # golden -> attention, frames, whether a picture is given
    "self_f1": (OWN, 1, False),
    "self_f3": (OWN, 3, False),
    "cross_f3_ow": (CROSS, 3, False),
    "cross_f2_ctl": (CROSS, 2, True),
}


def sharing_patch(checkpoints: ModuleType, layerdiffuse: ModuleType, path: Path, frames: int) -> Patched:
    """Both attentions, patched by a file of so many frames; each has the weights of the goldens' one."""
    base, tensors = {}, {}
    for index, (unit, context) in enumerate(((OWN, None), (CROSS, 768))):
        for key, shape in layerdiffuse.projection_shapes(context=context).items():
            base[f"{unit}.{key}"] = layerdiffuse.weight(f"org.{key}", shape)
        for key, shape in layerdiffuse.unit_shapes(frames, context=context).items():
            tensors[f"hookers.layers.{index}.{key}"] = layerdiffuse.weight(f"unit.{key}", shape)
    checkpoints.write_safetensors(path, tensors, dtype="F32")
    patch = SharedFrames(open_checkpoint(path), ONE_BLOCK, {name: array.shape for name, array in base.items()})
    return Patched(Arrays(base), [patch])


class Only:
    """The weights under one name."""

    def __init__(self, weights: WeightSource, prefix: str) -> None:
        self.shapes = {name: shape for name, shape in weights.shapes.items() if name.startswith(prefix)}
        self.span, self.read, self.key, self.origin = weights.span, weights.read, weights.key, weights.origin


def contexts(golden: Mapping[str, np.ndarray], name: str, frames: int) -> np.ndarray | None:
    """The text of every row: a frame's own prompt where it has one, but for unconditional rows."""
    if f"share/{name}_ctx" not in golden:
        return None
    rows = golden[f"share/{name}_ctx"].copy()
    for row, unconditional in enumerate(golden[f"share/{name}_mark"]):
        own = golden.get(f"share/{name}_overwrite{row % frames}")
        if own is not None and not unconditional:
            rows[row] = own[0]
    return rows


def tokens(x: np.ndarray, layout: str) -> np.ndarray:
    return x if layout == "channels_last" else np.ascontiguousarray(x.transpose(0, 2, 1)[:, :, None])


def control_of(layerdiffuse: ModuleType, signal: np.ndarray, frames: int) -> np.ndarray:
    """What two convolutions a frame make of the signal."""
    import torch
    import torch.nn.functional as F

    results = []
    for frame in range(frames):
        shapes = {"0.weight": (256, 256, 3, 3), "0.bias": (256,), "2.weight": (320, 256, 1, 1), "2.bias": (320,)}
        w = {
            key: torch.from_numpy(layerdiffuse.weight(f"unit.control_convs.{frame}.{key}", shape))
            for key, shape in shapes.items()
        }
        x = F.silu(F.conv2d(torch.from_numpy(signal), w["0.weight"], w["0.bias"], padding=1))
        results.append(F.conv2d(x, w["2.weight"], w["2.bias"]))
    return torch.cat(results).numpy()


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        *LAYOUTS.items(),
        pytest.param("einsum", "channels_first", marks=pytest.mark.slow),
        pytest.param("split", "channels_last", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", SHARING)
def test_attention_sharing(checkpoints, layerdiffuse, tmp_path, name, form, layout):
    unit, frames, controlled = SHARING[name]
    golden = layerdiffuse.golden()
    out = golden[f"share/{name}_out"]
    given = {"x": tokens(golden[f"share/{name}_h"], layout)}
    context = contexts(golden, name, frames)
    if context is not None:
        given["context"] = tokens(context, layout)
    inputs: Any = {key: (array.shape, np.float16) for key, array in given.items()}
    if controlled:
        given["control"] = control_of(layerdiffuse, golden[f"share/{name}_control256"], frames)
        inputs["control"] = (given["control"].shape, np.float32)
    weights = Only(sharing_patch(checkpoints, layerdiffuse, tmp_path / "layers.safetensors", frames), f"{unit}.")
    requests = Requests(weights.shapes)
    place = Scope(requests, form, layout, unit)

    def body(x: Any, context: Any = None, control: Any = None) -> dict[str, Any]:
        known = {} if control is None else {control_name(unit): control}
        attended = shared_attention(place, x, x if context is None else context, heads=8, frames=Frames(frames, known))
        return {"out": attended}

    network = Packaged(tmp_path / "unit.mlpackage", build(inputs, body, attention=form), requests, weights)
    for exact, tolerance in ((True, 1e-4), (False, FP16)):  # measured 7e-6, 4.2e-3
        result = network.predict(exact=exact, **given)["out"]
        result = result if layout == "channels_last" else result[:, :, 0].transpose(0, 2, 1)
        assert off(result, out) < tolerance
    if frames > 1:  # rows are (sample, frame), not (frame, sample)
        order = np.arange(len(out)).reshape(-1, frames).T.ravel()
        turned = {key: array[order] if len(array) == len(order) else array for key, array in given.items()}
        result = network.predict(**turned)["out"]
        result = result if layout == "channels_last" else result[:, :, 0].transpose(0, 2, 1)
        assert off(result, out[order]) > 10 * FP16


def test_control_encoder(layerdiffuse, tmp_path):
    """Its four signals, let through by convolutions that are the identity where SiLU is."""
    golden = layerdiffuse.golden()
    image = golden["share/ce_in"]
    signals = [golden[f"share/ce_out_{tokens}"] for tokens in (128, 32, 8, 2)]
    shapes = {
        key.removeprefix("kwargs_encoder."): shape
        for key, shape in layerdiffuse.released()["layer_sd15_fg2bg.safetensors"].items()
        if key.startswith("kwargs_encoder.")
    }
    arrays = layerdiffuse.weights(shapes, "ce.")
    far = np.full(256, 32, np.float32)  # SiLU(x + 32) is x + 32
    spot = np.zeros((256, 256, 3, 3), np.float32)
    spot[np.arange(256), np.arange(256), 1, 1] = 1
    for unit in "abcd":
        arrays |= {f"{unit}.control_convs.0.0.weight": spot, f"{unit}.control_convs.0.0.bias": far}
        arrays |= {f"{unit}.control_convs.0.2.weight": spot[:, :, 1:2, 1:2], f"{unit}.control_convs.0.2.bias": -far}
    config = FrameControlConfig(frames=1, units=tuple((unit, 256, level) for level, unit in enumerate("abcd")))
    weights = Arrays({key: np.ascontiguousarray(array) for key, array in arrays.items()})
    requests = Requests(weights.shapes)
    program = frame_control(config, requests, height=image.shape[2], width=image.shape[3])
    network = Packaged(tmp_path / "control.mlpackage", program, requests, weights)
    results = network.predict(exact=True, image=image)
    for unit, signal in zip("abcd", signals, strict=True):
        assert off(results[control_name(unit)], signal) < 1e-5  # measured 4e-6, of which 2e-6 is x + 32 - 32
    rounded = network.predict(image=image)
    assert max(off(rounded[control_name(unit)], signal) for unit, signal in zip("abcd", signals, strict=True)) < FP16


def over_grey(size: int) -> dict[str, np.ndarray]:
    """A disc on the flat grey that transparent pictures are drawn on: large regions that are constant."""
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    disc = (rows**2 + columns**2 < 0.04)[None, None]
    colour = np.array([0.9, 0.2, 0.1], np.float32)[None, :, None, None]
    latent = 0.3 * np.random.default_rng(0).standard_normal((1, 4, size // 8, size // 8))
    return {"pixel": np.where(disc, colour, 0.5).astype(np.float32), "latent": latent.astype(np.float32)}


def decibels_lost(network: Packaged, inputs: dict[str, np.ndarray]) -> float:
    """PSNR of a run that rounds after every operation, against one that does not."""
    results = []
    for precision in ("fp32", "fp16"):
        engine = open_engine(network.path, EngineOptions(engine="portable", precision=precision))
        results.append(np.array(engine.predict(**inputs)["argb"], np.float64))
        engine.close()
    exact, rounded = results
    assert np.isfinite(rounded).all()
    return float(20 * np.log10(np.abs(exact).max() / np.sqrt(np.mean((rounded - exact) ** 2))))


@pytest.mark.slow
def test_the_tiny_decoder_survives_fp16(tmp_path):
    checkpoint = open_checkpoint(TINY)
    weights = FileWeights(checkpoint, {key: Source(key) for key in checkpoint.tensors})
    config = TransparentDecoderConfig(channels=(12, 12, 16, 16, 24, 16, 16))
    for form in ("split", "einsum"):
        network = packaged_decoder(tmp_path / f"{form}.mlpackage", weights, form, config, (256, 256))
        assert decibels_lost(network, over_grey(256)) > 40  # measured 71


@pytest.mark.full
def test_the_decoder_at_512_survives_fp16(decoder_weights, tmp_path):
    network = packaged_decoder(tmp_path / "d.mlpackage", decoder_weights, "split", size=(512, 512))
    assert decibels_lost(network, over_grey(512)) > 40  # measured 70
