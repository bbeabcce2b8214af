"""The eight-fold ensemble on the converted decoder, against what LayerDiffuse's own ensemble gave."""

from pathlib import Path

import numpy as np
import pytest

from glassine.convert.package import write_package
from glassine.convert.program import Requests, lower
from glassine.convert.weights import Arrays
from glassine.models.config import TransparentDecoderConfig
from glassine.models.transparency import transparent_decoder
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.engine.portable.program import Constant
from glassine.runtime.transparency import AlphaDecoder


@pytest.mark.slow  # 104 million weights, eight passes
def test_eight_passes_of_the_decoder(layerdiffuse, tmp_path: Path, monkeypatch):
    golden = layerdiffuse.golden()
    pixel, latent, single, expected = (golden[f"dec/dec_64x64_{what}"] for what in ("pixel", "latent", "out", "aug8"))
    weights = Arrays(layerdiffuse.weights(layerdiffuse.released()["vae_transparent_decoder.safetensors"]))
    requests = Requests(weights.shapes)
    config = TransparentDecoderConfig()
    lowered = lower(
        transparent_decoder(config, requests, height=64, width=64, attention="einsum", layout="channels_last")
    )
    package = tmp_path / "TransparentDecoder.mlpackage"
    write_package(package, lowered, weights)

    # Records are fp16; read as the float32 numbers they were made of, nothing but graph and ensemble is compared.
    blob = package / "Data/com.apple.CoreML/weights/weight.bin"
    exact = {
        record.offset: weights.read(weight.name, 0, int(np.prod(record.shape))).astype(np.float32)
        * np.float32(weight.scale)
        for record, weight in lowered.plan.weights()
    }
    own = Constant.array

    def array(self: Constant):
        if self.file is not None and self.file.path == blob and self.offset in exact:
            return exact[self.offset].reshape(self.type.shape)
        return own(self)

    monkeypatch.setattr(Constant, "array", array)
    engine = open_engine(package, EngineOptions(engine="portable"))
    answers = []

    def predict(**arrays):
        answers.append({name: np.array(value) for name, value in engine.predict(**arrays).items()})
        return answers[-1]

    argb = AlphaDecoder(predict, (64, 64))(pixel, latent, 8)
    engine.close()
    assert len(answers) == 8
    assert np.abs(answers[0]["argb"] - single).max() < 1e-4
    assert np.abs(argb - expected[0]).max() < 1e-4
    views = [np.rot90(answer["argb"][0].clip(0, 1), -(i % 4), (1, 2)) for i, answer in enumerate(answers)]
    stack = [view[..., ::-1] if i >= 4 else view for i, view in enumerate(views)]
    assert np.abs(np.median(stack, axis=0) - expected[0]).max() > 0.1  # NumPy's median is the mean of the middle two
