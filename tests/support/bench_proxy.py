"""A child that is timed on Core ML's stand-in: python bench_proxy.py '{"load CPU_AND_NE": "killed"}' JOB

The faults are those of the children in which packages are tried (light_trial.py).
"""

import logging
import sys
from pathlib import Path

from glassine.runtime.bench import worker
from glassine.runtime.engine import trial
from glassine.runtime.engine.portable import proxy

logging.getLogger("coremltools").setLevel(logging.ERROR)
proxy.install()
trial.TRIAL = (sys.executable, str(Path(__file__).with_name("light_trial.py")), sys.argv[1])
worker.serve(sys.argv[2])
