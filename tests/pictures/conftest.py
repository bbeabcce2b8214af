"""The judge, and the shipped family as a user has it: converted, drawn with on the portable engine."""

from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from glassine.convert.control import Control, control_networks
from glassine.convert.extras import Extras
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.lora import LoraFile
from glassine.convert.transparency import TransparentFile, transparent_networks
from glassine.models.tiny.train.judge import Judge
from glassine.runtime.pipeline import Pipeline

TINY = Path(__file__).parents[2] / "models" / "tiny"
TRANSPARENT = ("attn", "decoder", "encoder")


@pytest.fixture(scope="session")
def judge() -> Judge:
    """The trained judge: reads pictures (B, 3, H, W) in [0, 1], answers with indices into judge.ANSWERS."""
    net = Judge()
    net.load_state_dict(
        {key: value.float() for key, value in load_file(Path(__file__).parent / "judge.safetensors").items()}
    )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    """The whole family in one folder: the checkpoint, the edge ControlNet and the transparent networks."""
    control = partial(control_networks, [Control(TINY / "tiny_control_canny.safetensors", name="canny")])
    files = [TransparentFile.parse(str(TINY / f"tiny_transparent_{name}.safetensors")) for name in TRANSPARENT]
    folder = tmp_path_factory.mktemp("family") / "tiny"
    convert(folder, further=(control, partial(transparent_networks, files)))
    with Pipeline.load(folder) as pipe:
        yield pipe


@pytest.fixture(scope="session")
def lcm(tmp_path_factory):
    """The checkpoint with its LCM-LoRA merged."""
    folder = tmp_path_factory.mktemp("lcm") / "tiny"
    convert(folder, extras=Extras(loras=(LoraFile(TINY / "tiny_lcm_lora.safetensors"),)))
    with Pipeline.load(folder) as pipe:
        yield pipe


def convert(folder: Path, **options: object) -> None:
    """Convert the family for the portable engine, at the size it was trained at."""
    convert_checkpoint(
        TINY / "tiny.safetensors", folder, ConvertOptions(attention="einsum", layout="channels_last", **options)
    )
