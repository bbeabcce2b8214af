"""Why the Neural Engine's form of GroupNorm is written differently: what fp16 does to each form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassine.convert.package import write_package
from glassine.convert.program import Requests, lower
from glassine.convert.weights import Arrays
from glassine.errors import EngineError
from glassine.models.layers import Scope, build, group_norm
from glassine.runtime.engine import EngineOptions, open_engine

GROUPS, CHANNELS = 4, 40


@pytest.fixture
def normalise(tmp_path: Path) -> Any:
    """normalise(x, form, eps, precision): x through one GroupNorm with gain and offset, and the exact answer."""
    rng = np.random.default_rng(0)
    arrays = {
        "norm.weight": rng.uniform(0.5, 2, CHANNELS).astype(np.float16).astype(np.float32),
        "norm.bias": rng.standard_normal(CHANNELS).astype(np.float16).astype(np.float32),
    }

    def run(x: np.ndarray, form: Any, eps: float, precision: Any) -> tuple[np.ndarray, np.ndarray]:
        def body(x: Any) -> dict[str, Any]:
            requests = Requests({name: array.shape for name, array in arrays.items()})
            return {"y": group_norm(Scope(requests, form, "channels_first") / "norm", x, GROUPS, eps=eps)}

        path = tmp_path / "norm.mlpackage"
        write_package(path, lower(build({"x": (x.shape, np.float16)}, body)), Arrays(arrays), overwrite=True)
        engine = open_engine(path, EngineOptions(engine="portable", precision=precision))
        exact = torch.nn.functional.group_norm(
            *(torch.from_numpy(a).double() for a in (x,)),
            num_groups=GROUPS,
            weight=torch.from_numpy(arrays["norm.weight"]).double(),
            bias=torch.from_numpy(arrays["norm.bias"]).double(),
            eps=eps,
        )
        return engine.predict(x=x)["y"], exact.numpy()

    return run


def picture(deviation: float, mean: float = 0.0) -> np.ndarray:
    x = deviation * np.random.default_rng(1).standard_normal((2, CHANNELS, 24, 20)) + mean
    return x.astype(np.float16).astype(np.float32)


def decibels(actual: np.ndarray, exact: np.ndarray) -> float:
    """Signal to noise."""
    return float(10 * np.log10(np.mean(exact**2) / np.mean((actual - exact) ** 2)))


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("deviation", [1e-3, 1e-2, 1.0, 100.0, 3000.0])
def test_split_keeps_its_precision_at_every_scale(normalise: Any, deviation: float, eps: float) -> None:
    assert decibels(*normalise(picture(deviation), "split", eps, "fp16")) >= 64


@pytest.mark.parametrize("form", ["split", "einsum"])
@pytest.mark.parametrize("deviation", [1e-3, 1.0, 3000.0])
def test_forms_are_the_same_function(normalise: Any, form: str, deviation: float) -> None:
    assert decibels(*normalise(picture(deviation, mean=2 * deviation), form, 1e-5, "fp32")) >= 60


def test_a_constant_picture_is_the_offset(normalise: Any) -> None:
    actual, exact = normalise(np.full((2, CHANNELS, 24, 20), 7.0, np.float32), "split", 1e-6, "fp16")
    assert np.abs(actual - exact).max() <= 1e-3


def test_the_usual_form_overflows_and_loses_small_deviations(normalise: Any) -> None:
    """What the other form is for; the GPU's own kernels keep such sums in fp32."""
    with pytest.raises(EngineError, match="overflows float16"):
        normalise(picture(100.0), "einsum", 1e-6, "fp16")
    assert decibels(*normalise(picture(1e-3), "einsum", 1e-6, "fp16")) <= 50
