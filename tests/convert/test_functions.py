"""Several sizes in one package: each function is what a package of its own would be, the weights are there once."""

import coremltools as ct
import numpy as np
import pytest

from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.manifest import Manifest
from glassine.runtime.engine import EngineOptions, open_engine

SIZES = ((64, 64), (128, 64))
PORTABLE = EngineOptions(engine="portable")


@pytest.fixture(scope="module")
def unet(checkpoints, tmp_path_factory):
    path = tmp_path_factory.mktemp("unet") / "unet.safetensors"
    tensors = checkpoints.values(checkpoints.ldm_unet(checkpoints.TINY))
    return checkpoints.write_safetensors(path, tensors, metadata=checkpoints.TINY.header())


@pytest.mark.parametrize("chunks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_functions_are_the_packages_they_stand_for(unet, tmp_path, chunks):
    common = {"sizes": SIZES, "part": "unet", "attention": "einsum", "chunks": chunks}
    apart = convert_checkpoint(unet, tmp_path / "apart", ConvertOptions(**common))
    together = convert_checkpoint(unet, tmp_path / "together", ConvertOptions(**common, functions=True))
    assert Manifest.read(tmp_path / "together").sizes == SIZES
    stems = ["Unet"] if chunks == 1 else ["UnetChunk1", "UnetChunk2"]
    assert sorted(path.stem for path in (tmp_path / "together").glob("*.mlpackage")) == stems
    for key, part in together.parts.items():
        width, height = {"unet": SIZES[0], "unet_128x64": SIZES[1]}[key]
        assert part.about["function"] == f"size_{width}x{height}"
        assert (part.inputs, part.outputs) == (apart.parts[key].inputs, apart.parts[key].outputs)
    if chunks == 1:
        check_package(tmp_path, apart, together)


def check_package(tmp_path, apart, together):
    package = tmp_path / "together" / "Unet.mlpackage"
    spec = ct.utils.load_spec(str(package))
    assert spec.specificationVersion == ct.target.iOS18
    assert spec.description.defaultFunctionName == "size_64x64"
    rng = np.random.default_rng(0)
    for key, part in together.parts.items():
        inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in part.inputs.items()}
        ours = open_engine(package, PORTABLE, function=part.about["function"]).predict(**inputs)["noise_pred"]
        theirs = open_engine(tmp_path / "apart" / apart.parts[key].file, PORTABLE).predict(**inputs)["noise_pred"]
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    blobs = [
        tmp_path / folder / "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        for folder in ("apart", "together")
    ]
    one, two = (blob.stat().st_size for blob in blobs)
    assert abs(one - two) < 20_000  # literals differ between opsets


def test_one_size_is_no_reason_for_functions(unet, tmp_path):
    options = ConvertOptions(sizes=SIZES[:1], part="unet", attention="einsum", functions=True, dry_run=True)
    assert "function" not in convert_checkpoint(unet, tmp_path / "out", options).parts["unet"].about
