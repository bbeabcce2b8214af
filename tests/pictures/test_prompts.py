"""Pictures show what the prompt says: in twenty steps, and in four with the LCM-LoRA. The judge reads them."""

import numpy as np
import pytest
import torch

from glassine.models.tiny.train.captions import captions
from glassine.models.tiny.train.drawings import Drawings, sample
from glassine.models.tiny.train.judge import truth

TWENTY = {"steps": 20, "guidance_scale": 5.0}
FOUR = {"steps": 4, "guidance_scale": 1.0, "sampler": "lcm"}
SEED = 616_000  # of prompts that training never saw


def accuracies(pipe, judge, count: int, settings: dict[str, object]) -> dict[str, float]:
    """Share of pictures with the right shape, colour and background (its pattern and its colour)."""
    drawings: Drawings = sample(count, seed=SEED, solid=1.0, single=1.0)
    prompts = [row[0] for row in captions(drawings, 1, SEED, omit=0.0)]
    pictures = [pipe(prompt, seed=seed, output="numpy", **settings) for seed, prompt in enumerate(prompts)]
    read = judge.read(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255)
    right = {question: read[question] == wanted for question, wanted in truth(drawings).items()}
    shares = {"shape": right["shape"], "colour": right["colour"], "background": right["kind"] & right["ground"]}
    return {name: float(share.float().mean()) for name, share in shares.items()}


def test_twenty_steps_draw_what_the_prompt_says(pipe, judge):
    assert min(accuracies(pipe, judge, 5, TWENTY).values()) >= 0.75  # of 5 pictures; over 100: below


def test_four_lcm_steps_draw_what_the_prompt_says(lcm, judge):
    assert min(accuracies(lcm, judge, 10, FOUR).values()) >= 0.8  # of 10 pictures; over 100: below


@pytest.mark.slow
def test_a_hundred_prompts(pipe, lcm, judge):
    twenty = accuracies(pipe, judge, 100, TWENTY)
    assert twenty["shape"] >= 0.95  # measured 1.00
    assert twenty["colour"] >= 0.95  # 1.00
    assert twenty["background"] >= 0.90  # 0.99
    four = accuracies(lcm, judge, 100, FOUR)
    assert all(four[name] >= twenty[name] - 0.05 for name in twenty), (twenty, four)  # 1.00, 1.00, 0.98
