"""The judge: reads pictures (B, 3, H, W) in [0, 1], answers with indices into judge.ANSWERS."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from glassine.models.tiny.train.judge import Judge


@pytest.fixture(scope="session")
def judge() -> Judge:
    """The trained judge (judge.safetensors beside this file, made by the family's training script)."""
    net = Judge()
    net.load_state_dict(
        {key: value.float() for key, value in load_file(Path(__file__).parent / "judge.safetensors").items()}
    )
    return net.eval().requires_grad_(False)
