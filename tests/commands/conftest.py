"""The command as a user runs it, in this process: exit code, stdout and stderr."""

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from glassine.cli import main


@pytest.fixture
def glassine(tmp_path, monkeypatch):
    """Call `glassine(*arguments)` from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def photo(tmp_path):
    """A 64x64 picture of colour ramps in the working folder."""
    ramp = np.linspace(0, 255, 64)
    pixels = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], 128.0), axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"
