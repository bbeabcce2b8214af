"""Write samplers.json: what every sampler draws through the whole path, schedule, noise, map and loop.

    python tests/golden/make_samplers.py

Run it only for a change that is meant to change pictures, and say so in the changelog: seeds are a promise.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from glassine.runtime.change_map import n_table
from glassine.runtime.loop import denoising_steps
from glassine.runtime.noise import StepNoise, randn
from glassine.runtime.samplers import SAMPLERS
from glassine.runtime.schedule import STABLE_DIFFUSION, make_sigmas

TARGET = Path(__file__).with_name("samplers.json")
STEPS = 8
SHAPE = (1, 4, 4, 5)


def model(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
    """A curved denoiser in which neighbours see each other."""
    wide = x + np.roll(x, 1, 2) - 0.5 * np.roll(x, -2, 3) + 0.25 * x[:, ::-1]
    return 0.8 * np.tanh(wide / np.sqrt(1 + sigma**2)) + 0.2 / (1 + sigma**2) * x


def drawn(name: str) -> np.ndarray:
    """The result of a sampler at its own spacing under a gradient map, in float64."""
    sampler = SAMPLERS[name].on(STABLE_DIFFUSION)
    sigmas = make_sigmas(STABLE_DIFFUSION, STEPS, sampler.spacing)
    n = n_table(np.linspace(0, 1, SHAPE[2] * SHAPE[3]).reshape(SHAPE[2:]), sigmas)
    noise, source = (randn(seed, SHAPE).astype(np.float64) for seed in (0, 1))
    steps = denoising_steps(model, sampler, sigmas, noise, source=source, n=n, step_noise=StepNoise(0))
    return list(steps)[-1].x


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(drawn(name).ravel().tolist())}" for name in SAMPLERS]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
