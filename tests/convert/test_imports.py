"""The quiet import of coremltools: what it hides, for how long, and that nothing else changes."""

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_no_framework_is_loaded_and_all_stay_importable():
    done = run(
        """
import logging, sys
level = logging.getLogger("coremltools").level
from glassine.convert.imports import import_coremltools_quietly_later
finders = list(sys.meta_path)
import_coremltools_quietly_later()
import coremltools.proto
assert not {"torch", "sklearn", "scipy", "transformers", "tensorflow", "xgboost"} & set(sys.modules)
assert sys.meta_path == finders
assert type(sys.modules["coremltools"].__loader__).__name__ == "SourceFileLoader"
assert sys.modules["coremltools"].__spec__.loader is sys.modules["coremltools"].__loader__
assert logging.getLogger("coremltools").level == level
import coremltools as ct
assert ct.target.iOS16
import torch
assert torch.ones(2).sum() == 2
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == done.stdout == ""


@pytest.mark.parametrize("first", ["coremltools", "torch"])
def test_what_is_loaded_already_is_left_alone(first):
    done = run(
        f"""
import logging, sys
logging.getLogger("coremltools").setLevel(logging.ERROR)
import {first}
before = set(sys.modules)
from glassine.convert.imports import import_coremltools_quietly_later
import_coremltools_quietly_later()
import coremltools
assert coremltools._deps._HAS_TORCH
assert {first!r} in before
"""
    )
    assert done.returncode == 0, done.stderr


def test_an_import_that_fails_leaves_no_trace():
    done = run(
        """
import importlib.machinery, sys
from glassine.convert.imports import import_coremltools_quietly_later
before = list(sys.meta_path)
import_coremltools_quietly_later()
importlib.machinery.SourceFileLoader.exec_module = lambda self, module: 1 / 0
try:
    import coremltools
except ZeroDivisionError:
    assert sys.meta_path == before
    print("ok")
"""
    )
    assert done.stdout == "ok\n", done.stderr
