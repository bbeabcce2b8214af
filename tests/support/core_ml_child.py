"""A child that is timed, on the stand-in for Core ML: python core_ml_child.py '{"delays": {...}, "faults": {...}}' JOB

delays: "CPU_AND_NE Unet" or "CPU_AND_NE" -> seconds that a prediction takes longer. faults: as `proxy.install` takes
them, but here in the process that is timed; compiling and the first trial go well.
"""

import json
import sys
from pathlib import Path

from glassine.runtime.bench import worker
from glassine.runtime.engine import trial
from glassine.runtime.engine.portable import proxy

said = json.loads(sys.argv[1])
proxy.install()
proxy._MLModelProxy.delays = said.get("delays", {})
proxy._MLModelProxy.faults = said.get("faults", {})
trial.TRIAL = (sys.executable, str(Path(__file__).with_name("light_trial.py")), "{}")
worker.serve(sys.argv[2])
