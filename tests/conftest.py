"""Fixtures that every folder of tests may use."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SUPPORT = Path(__file__).parent / "support"

# One thread for each of pytest-xdist's workers, said before PyTorch is imported: threads that wait for a core that
# another worker has make small networks many times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def load_support(name: str) -> ModuleType:
    """Import tests/support/<name>.py (importlib mode keeps tests off sys.path)."""
    qualified = f"glassine_tests_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, SUPPORT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """Compiled models of the tests stay out of the user's cache, and the user's settings out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GLASSINE_CONFIG", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(autouse=True)
def _portable_by_default(request, monkeypatch) -> None:
    """On a Mac, tests that are not about Core ML run on the engine that they run on elsewhere."""
    if sys.platform == "darwin" and request.node.get_closest_marker("coreml") is None:
        monkeypatch.setattr("glassine.runtime.engine.contract.sys", SimpleNamespace(platform="linux"))


@pytest.fixture(scope="session")
def checkpoints() -> ModuleType:
    """tests/support/checkpoints.py: writes random Stable Diffusion 1.x checkpoints."""
    return load_support("checkpoints")


@pytest.fixture(scope="session")
def controls() -> ModuleType:
    """tests/support/controls.py: shapes of random control networks."""
    return load_support("controls")


@pytest.fixture(scope="session")
def layerdiffuse() -> ModuleType:
    """tests/support/layerdiffuse.py: keys and goldens of LayerDiffuse's released files."""
    return load_support("layerdiffuse")


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """tests/support/coremltools_oracle.py: our programs by coremltools' builder and exporter."""
    return load_support("coremltools_oracle")


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoints, tmp_path_factory) -> Path:
    """A whole SD 1.x single file with small networks and random fp16 weights; read only."""
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_diffusers(checkpoints, tmp_path_factory) -> Path:
    """The same networks as a diffusers folder; read only."""
    return checkpoints.write_diffusers(tmp_path_factory.mktemp("diffusers") / "tiny")


@pytest.fixture(scope="session")
def tiny_folder(tiny_checkpoint, tmp_path_factory) -> Path:
    """`tiny_checkpoint` converted at 64x64 pixels; read only."""
    from glassine.convert.folder import ConvertOptions, convert_checkpoint

    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert_checkpoint(tiny_checkpoint, folder, ConvertOptions(sizes=((64, 64),), attention="einsum"))
    return folder


@pytest.fixture(scope="session")
def collage_folder(tiny_checkpoint, checkpoints, controls, tmp_path_factory) -> Path:
    """`tiny_checkpoint` converted at 64x64 pixels, for collages of two layers, with a control net; read only."""
    from functools import partial

    from glassine.convert.collage import collage_networks
    from glassine.convert.control import Control, control_networks
    from glassine.convert.folder import ConvertOptions, convert_checkpoint

    place = tmp_path_factory.mktemp("collage")
    net = checkpoints.write_safetensors(
        place / "canny.safetensors", checkpoints.values(controls.ldm_control(checkpoints, checkpoints.TINY))
    )
    further = (partial(collage_networks, 2), partial(control_networks, [Control(net)]))
    options = ConvertOptions(sizes=((64, 64),), attention="einsum", further=further, name="tiny")
    convert_checkpoint(tiny_checkpoint, place / "model", options)
    return place / "model"
