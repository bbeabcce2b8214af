"""Networks cut into packages: the same numbers, small files, few bytes across a cut."""

import numpy as np
import pytest

from glassine.convert import chunks
from glassine.convert.chunks import cut
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.package import write_package
from glassine.convert.program import Requests, lower
from glassine.convert.weights import Arrays
from glassine.errors import ConversionError
from glassine.manifest import Manifest
from glassine.models.config import SDXL, UNetConfig
from glassine.models.unet import unet
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.engine.compose import Chain

CONFIG = UNetConfig(
    channels=(32, 64),
    layers=1,
    down_depths=((0,), (1,)),
    up_depths=((1, 1), (0, 0)),
    heads=(1, 2),
    context_dim=48,
    norm_groups=8,
    linear_projection=True,
    time_ids=6,
    pooled_dim=20,
)


@pytest.fixture(scope="module")
def network():
    """A small UNet of SDXL's kind, lowered, and random weights for it."""
    lowered = lower(unet(CONFIG, Requests(), height=8, width=8, tokens=9))
    rng = np.random.default_rng(0)
    arrays = {
        weight.name: (rng.standard_normal(record.shape) * 0.05 + ("norm" in weight.name)).astype(np.float16)
        for record, weight in lowered.plan.weights()
    }
    return lowered, Arrays(arrays)


def run(folder, pieces, weights, inputs):
    engines = []
    for i, piece in enumerate(pieces):
        write_package(folder / f"{len(pieces)}_{i}.mlpackage", piece, weights)
        engines.append(open_engine(folder / f"{len(pieces)}_{i}.mlpackage", EngineOptions(engine="portable")))
    return np.array(Chain(engines).predict(**inputs)["noise_pred"])


@pytest.mark.parametrize("count", [2, 3])
def test_chunks_in_a_row_are_the_network(network, tmp_path, count):
    lowered, weights = network
    rng = np.random.default_rng(1)
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in lowered.inputs.items()}
    inputs["timestep"] = np.array([999, 17.5], np.float32)
    pieces = cut(lowered, count)
    assert len(pieces) == count
    whole = run(tmp_path, [lowered], weights, inputs)
    np.testing.assert_array_equal(run(tmp_path, pieces, weights, inputs), whole)
    assert np.abs(whole).max() > 0.01
    sizes = [piece.plan.file_size for piece in pieces]
    assert max(sizes) < 1.4 * lowered.plan.file_size / count
    assert sum(piece.parameters for piece in pieces) == lowered.parameters


def test_few_bytes_cross_a_cut(network):
    """What has to cross a cut in the way up is what the way down keeps, the time, and one picture."""
    lowered, _ = network
    first, second = cut(lowered, 2)
    passed = {name: spec for name, spec in second.inputs.items() if name not in lowered.inputs}
    assert passed == {name: spec for name, spec in first.outputs.items() if name in passed}
    assert set(first.outputs) == set(passed)
    assert {dtype for _, dtype in passed.values()} == {"float16"}
    graph = chunks._Graph(lowered)
    assert sum(2 * np.prod(shape) for shape, _ in passed.values()) == min(
        graph.crossing[k] for k in graph.cheapest(2, int(1.2 * graph.weight_bytes.sum() / 2))
    )


def test_what_fits_stays_whole_and_what_does_not_is_cut_by_itself(network, monkeypatch):
    lowered, _ = network
    assert cut(lowered) == cut(lowered, 1) == [lowered]
    monkeypatch.setattr(chunks, "LIMIT", lowered.plan.file_size // 2)
    pieces = cut(lowered)
    assert len(pieces) > 2  # halves are never exact
    assert max(piece.plan.file_size for piece in pieces) <= lowered.plan.file_size // 2
    monkeypatch.setattr(chunks, "LIMIT", 20_000)
    with pytest.raises(ConversionError, match="cannot be cut into 8 packages"):
        cut(lowered)


@pytest.mark.slow
def test_sdxl_becomes_three_files_that_the_neural_engine_takes():
    pieces = cut(lower(unet(SDXL.unet, Requests(), height=128, width=128)))
    assert [piece.plan.file_size < 2**31 for piece in pieces] == [True] * 3
    # Between the first and the last: what the way down keeps, at a batch of two.
    assert sum(2 * np.prod(shape) for shape, _ in pieces[0].outputs.values()) < 103e6
    assert sum(piece.parameters for piece in pieces) == 2_567_463_684


def test_a_folder_with_chunks(checkpoints, tmp_path):
    sizes = checkpoints.TINY_SDXL
    tensors = checkpoints.values(checkpoints.ldm_unet(sizes))
    source = checkpoints.write_safetensors(tmp_path / "unet.safetensors", tensors, metadata=sizes.header())
    options = ConvertOptions(sizes=((64, 64), (128, 64)), part="unet", chunks=2, attention="einsum")
    out = tmp_path / "out"
    manifest = convert_checkpoint(source, out, options)
    assert manifest.parts["unet"].about["chunks"] == ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"]
    assert manifest.parts["unet_128x64"].about["chunks"] == [
        "UnetChunk1_128x64.mlpackage",
        "UnetChunk2_128x64.mlpackage",
    ]
    assert manifest.parts["unet"].outputs == {"noise_pred": ((2, 4, 8, 8), "float32")}
    assert Manifest.read(out).sizes == ((64, 64), (128, 64))
    for chunk in ("UnetChunk1", "UnetChunk2"):
        first, second = (
            out / f"{chunk}{size}.mlpackage" / "Data/com.apple.CoreML/weights/weight.bin" for size in ("", "_128x64")
        )
        assert first.samefile(second)
