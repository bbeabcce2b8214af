"""Damaged files: each a clear error or a model, none a crash, a hang or more than a gigabyte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "support" / "fuzz.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize(
    ("count", "dry_runs"), [(200, 0), pytest.param(5000, 100, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_damaged_files(tmp_path, count, dry_runs):
    command = [sys.executable, str(FUZZ), str(tmp_path), "0", str(count), str(dry_runs)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    outcomes = result["outcomes"]
    assert sum(outcomes.values()) == count
    # The damage is not all of one kind: some is in the header, some in the network, some means nothing.
    for kind in ("CheckpointError", "ConversionError", "recognised"):
        assert outcomes[kind] > count // 20, outcomes
