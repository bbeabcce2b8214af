"""Children that are timed on a clock of their own, where every delay is known."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from glassine.runtime.bench import timing

STUB = Path(__file__).parents[2] / "support" / "bench_child.py"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], None]:
    """plan({"cpu_and_ne": 0.2, "cpu_and_gpu": "killed"}): what the children do; tests/support/bench_child.py."""

    def plant(planned: dict) -> None:
        monkeypatch.setattr(timing, "CHILD", (sys.executable, str(STUB), json.dumps(planned)))

    return plant


@pytest.fixture(scope="session")
def reports() -> ModuleType:
    """tests/support/bench_reports.py: reports with figures that are made up."""
    spec = importlib.util.spec_from_file_location("glassine_tests_bench_reports", STUB.with_name("bench_reports.py"))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
