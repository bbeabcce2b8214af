"""Edges steer: the edges of the picture are those of the hint, and elsewhere without it."""

import numpy as np
import pytest
import torch

from glassine.models.tiny.train.captions import captions
from glassine.models.tiny.train.drawings import edges, render, sample
from glassine.models.tiny.train.measure import edge_f1
from glassine.runtime.control import Control

SETTINGS = {"steps": 20, "guidance_scale": 5.0, "output": "numpy"}
SEED = 717_000  # of drawings that training never saw


def faithful(pipe, count: int) -> tuple[float, float, float]:
    """Mean edge F1 (2 pixels' tolerance) of pictures with the hint, without it, and of the drawings themselves.

    The last is what can be had: the drawings through the VAE. Where object and background are of one brightness there
    are no edges to find.
    """
    drawings = sample(count, seed=SEED, solid=1.0, single=1.0)
    rendered = render(drawings, 256)[0]
    hints = edges(rendered)
    prompts = [row[0] for row in captions(drawings, 1, SEED, omit=0.0)]
    made: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for seed, (prompt, hint) in enumerate(zip(prompts, hints, strict=True)):
        picture = (hint[0] * 255).byte()[..., None].expand(-1, -1, 3).numpy()
        for steered, pictures in made.items():
            controls = [Control("canny", picture)] if steered else []
            pictures.append(pipe(prompt, controls=controls, seed=seed, **SETTINGS))
    drawn = [torch.from_numpy(np.stack(made[steered])).permute(0, 3, 1, 2) / 255 for steered in (True, False)]
    steered, free, best = [float(edge_f1(edges(each), hints).mean()) for each in (*drawn, through_vae(pipe, rendered))]
    return steered, free, best


def through_vae(pipe, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1], encoded and decoded."""
    decode = pipe.engine("vae_decoder").predict
    latents = [pipe.posterior_mean(picture[None].numpy() * 2 - 1) for picture in pictures]
    return torch.cat([torch.from_numpy(decode(z=z)["image"] / 2 + 0.5) for z in latents]).clamp(0, 1)


def test_the_shape_goes_where_its_edges_are(pipe):
    steered, free, best = faithful(pipe, 3)
    assert steered >= 0.6 * best
    assert steered >= free + 0.3


@pytest.mark.slow
def test_forty_hints(pipe):
    steered, free, best = faithful(pipe, 40)
    assert steered >= 0.8 * best  # measured 0.855; 0.93 over 300
    assert free <= 0.3
