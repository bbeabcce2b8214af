"""Layers from converted packages: whole runs against Euler's method written out with the packages' own answers."""

import itertools
import shutil
from functools import partial

import numpy as np
import pytest

from glassine.convert.addition import add_networks
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.transparency import TransparentFile, transparent_networks
from glassine.models.sharing import attention_units
from glassine.runtime.image import over_grey
from glassine.runtime.layers import draw_layers
from glassine.runtime.noise import randn
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.request import Request
from glassine.runtime.run import sigmas_of

KINDS = {"joint": 3, "fg2bg": 2}
SETTINGS = {"prompt": "tea", "steps": 3, "sampler": "euler", "guidance_scale": 4.0, "seed": 5}


@pytest.fixture(scope="module")
def pipe(checkpoints, layerdiffuse, tiny_checkpoint, tiny_folder, tmp_path_factory):
    """The random tiny model with random layer models for Stable Diffusion 1.5."""
    place = tmp_path_factory.mktemp("layers")
    unet = detect(open_checkpoint(tiny_checkpoint)).family.unet
    files = []
    for seed, (kind, frames) in enumerate(KINDS.items()):
        shapes = layerdiffuse.sharing_shapes(attention_units(unet), unet.context_dim, frames, control=kind == "fg2bg")
        path = place / f"layer_sd15_{kind}.safetensors"
        checkpoints.write_safetensors(path, checkpoints.values(shapes, seed), dtype="F16")
        files.append(TransparentFile(path=path))
    folder = place / "model"
    shutil.copytree(tiny_folder, folder)
    add_networks(folder, [partial(transparent_networks, files)], lambda _: None)
    with Pipeline.load(folder) as pipe:
        yield pipe


def by_euler(pipe, kind: str, request: Request, **given: np.ndarray) -> np.ndarray:
    """The latents of a run: rows are [without guidance, with it] x frames; what is given is the same at every call."""
    frames = KINDS[kind]
    sigmas = sigmas_of(pipe.schedule, request)
    x = randn(request.seed, (frames, 4, 8, 8)) * np.float32(sigmas[0])
    texts = [request.negative_prompt] * frames + [request.prompt] * frames
    context = np.concatenate([pipe.encode(text, request).context for text in texts]).transpose(0, 2, 1)[:, :, None]
    for sigma, after in itertools.pairwise(sigmas):
        scaled = np.tile(x, (2, 1, 1, 1)) / np.sqrt(sigma**2 + 1)
        eps = pipe.engine(f"{kind}_unet").predict(
            sample=scaled.astype(np.float32),
            timestep=np.full(2 * frames, pipe.schedule.t_of_sigma(float(sigma)), np.float32),
            encoder_hidden_states=context,
            **given,
        )["noise_pred"]
        uncond, cond = eps[:frames], eps[frames:]
        x = x + (after - sigma) * (uncond + request.guidance_scale * (cond - uncond))
    return x


def test_a_background_behind_a_foreground(pipe):
    rgba = np.random.default_rng(3).integers(0, 256, (64, 64, 4), np.uint8)
    request = Request(**SETTINGS)
    stack = draw_layers(pipe, request, "fg2bg", {"fg": rgba})
    signals = {name: np.array(x) for name, x in pipe.engine("fg2bg_control").predict(image=over_grey(rgba)).items()}
    (result,) = stack.results
    expected = by_euler(pipe, "fg2bg", request, **signals)
    assert np.abs(result.latents - expected).max() < 1e-4 * np.abs(expected).max()  # measured 3e-6
    assert list(result.layers) == ["bg", "blend"]
    other = by_euler(pipe, "fg2bg", request, **{name: np.zeros_like(x) for name, x in signals.items()})
    assert np.abs(result.latents - other).max() > 0.01 * np.abs(expected).max()  # the foreground is seen


def test_joint_layers(pipe, monkeypatch):
    monkeypatch.setattr("glassine.runtime.layer_run.LayerRun._decode", lambda self, frame, latents: latents)
    monkeypatch.setattr("glassine.runtime.layer_run._check", lambda *_: None)  # no decoder at 64 pixels is needed
    request = Request(**SETTINGS, layers="joint")
    result = pipe.run(request).finish()
    expected = by_euler(pipe, "joint", request)
    assert np.abs(result.latents - expected).max() < 1e-4 * np.abs(expected).max()
    alone = by_euler(pipe, "joint", Request(**{**SETTINGS, "seed": 6}))
    assert np.abs(expected - alone).max() > 0.1
