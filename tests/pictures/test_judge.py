"""How far the judge can be trusted, and the shipped family before it, through nothing of Glassine but its weights."""

from pathlib import Path

import pytest
import torch

from glassine.models.tiny.train import files, measure, networks
from glassine.models.tiny.train.drawings import SHAPES, render, sample
from glassine.models.tiny.train.judge import truth

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture
def family(judge):
    nets = networks.vae(), networks.unet(), networks.text_encoder()
    files.read(TINY / "tiny.safetensors", files.checkpoint(*nets))
    for net in nets:
        net.eval().requires_grad_(False)
    return measure.Family(*nets, judge, networks.SIZE, 12)


def test_the_judge_reads_clean_drawings(judge):
    drawings = sample(150, seed=2026, solid=1.0, single=1.0)
    read = judge.read(render(drawings, 128)[0])
    wrong = {
        question: float((read[question] != answers).float().mean()) for question, answers in truth(drawings).items()
    }
    assert max(wrong.values()) <= 0.02, wrong  # measured: every question below 0.01


def test_the_judge_is_not_fooled_by_the_background_alone(judge):
    """Where nothing is drawn, no shape is read with confidence."""
    drawings = sample(40, seed=2027, solid=1.0, single=1.0)
    empty = drawings._replace(present=torch.zeros_like(drawings.present))
    sure = judge(render(empty, 128)[0])["shape"].softmax(1).amax(1)
    drawn = judge(render(drawings, 128)[0])["shape"].softmax(1).amax(1)
    assert drawn.median() > sure.median()
    assert len(SHAPES) == 10


def test_the_vae_keeps_drawings(family, tmp_path):
    figures = measure.measure_vae(family, tmp_path)
    assert figures["psnr"] >= 31, figures  # 12 pictures; over 300: 33.1 dB
