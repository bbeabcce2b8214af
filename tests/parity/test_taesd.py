"""TAESD's decoder against diffusers', from files of both spellings, and the previews that it draws."""

import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.previews import preview_networks
from glassine.errors import CheckpointError
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16), decoder_block_out_channels=(16, 16, 16, 16), latent_channels=4
    ).eval()
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.copy_(parameter.half().float())
    return tiny


def original(key: str) -> str:
    """diffusers' name -> TAESD's own, which counts the clamp as a layer."""
    index, rest = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", key).groups()
    return f"{int(index) + 1}.{rest}"


@pytest.mark.parametrize("spelling", ["diffusers", "original"])
def test_previews(spelling, theirs, tiny_checkpoint, checkpoints, tmp_path):
    arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
    if spelling == "original":
        arrays = {original(key): value for key, value in arrays.items() if key.startswith("decoder.")}
    path = checkpoints.write_safetensors(tmp_path / "taesd_decoder.safetensors", arrays)
    options = ConvertOptions(
        sizes=((64, 64),), attention="einsum", further=(lambda base: preview_networks(path, base),)
    )
    manifest = convert_checkpoint(tiny_checkpoint, tmp_path / "model", options)
    assert manifest.parts["preview_decoder"].file == "PreviewDecoder.mlpackage"
    with Pipeline.load(tmp_path / "model") as pipe:
        z = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32) * 2
        z = z.astype(np.float16).astype(np.float32)
        image = pipe.engine("preview_decoder").predict(z=z)["image"]
        with torch.no_grad():
            expected = theirs.decoder(torch.from_numpy(z)).numpy()
        # measured 2e-4: 1/3 in fp16
        np.testing.assert_allclose(image, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        run = pipe.run(Request(prompt="a", steps=1))
        (step,) = list(run)
        with torch.no_grad():
            drawn = theirs.decoder(torch.from_numpy(step.denoised.astype(np.float32))).numpy()
        pixels = np.clip((drawn[0].transpose(1, 2, 0) + 1) * 127.5, 0, 255)
        assert np.abs(run.preview(step).astype(np.float64) - pixels).max() <= 2  # measured 1.1


def test_what_is_no_taesd_is_refused(tiny_checkpoint, tmp_path):
    options = ConvertOptions(sizes=((64, 64),), further=(lambda base: preview_networks(tiny_checkpoint, base),))
    with pytest.raises(CheckpointError, match="no TAESD decoder"):
        convert_checkpoint(tiny_checkpoint, tmp_path / "model", options)
