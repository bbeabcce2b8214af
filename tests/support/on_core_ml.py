"""Runs packages on Core ML, or on its stand-in, beside the portable engine; prints what came of it, one JSON a line.

    python on_core_ml.py stand-in '{"trials": true}' JOBS

trials: whether a package may be compiled and tried; else only what the cache has can be loaded. A job: {"package",
"function", "units"}, or {"folder"} for a whole picture on all units.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np

from glassine.runtime.engine import EngineOptions, open_engine, trial
from glassine.runtime.engine.placement import placement
from glassine.runtime.engine.portable import proxy
from glassine.runtime.engine.psnr import psnr
from glassine.runtime.pipeline import Pipeline


def arrays(inputs):
    """Numbers as networks read them: tokens are whole, and a timestep is one of a thousand."""
    rng = np.random.default_rng(0)
    made = {}
    for name, spec in inputs.items():
        if spec.dtype.startswith("int") or name == "input_ids":
            made[name] = rng.integers(1, 400, spec.shape).astype(
                np.int32 if spec.dtype.startswith("int") else np.float32
            )
        elif name == "timestep":
            made[name] = np.full(spec.shape, 500, np.float32)
        else:
            made[name] = rng.standard_normal(spec.shape).astype(np.float16).astype(np.float32)
    return made


def run(package, function, units):
    """Predict twice on Core ML, and in float32 on the portable engine."""
    path, further = Path(package), {} if function is None else {"function": function}
    theirs = open_engine(path, EngineOptions(engine="coreml", compute_units=units), **further)
    ours = open_engine(path, EngineOptions(engine="portable"), **further)
    given = arrays(ours.inputs)
    first = {name: array.copy() for name, array in theirs.predict(**given).items()}
    again, expected = theirs.predict(**given), ours.predict(**given)
    bridge = theirs._model._proxy
    plan = placement(path, theirs.realised.device, function)
    return {
        "units": units,
        "realised": theirs.realised.device,
        "notices": theirs.realised.notices,
        "shapes": {name: list(array.shape) for name, array in first.items()},
        "psnr": min(psnr(first[name], expected[name]) for name in expected),
        "steady": min(psnr(again[name], first[name]) for name in first),
        "load": bridge.get_load_duration_in_nano_seconds(),
        "predict": bridge.get_last_predict_duration_in_nano_seconds(),
        "plan": {"source": plan.source, "operations": len(plan.operations), "share": sum(map(plan.share, SHARES))},
    }


def draw(folder):
    """The same picture on both engines."""
    made = []
    for engine in ("coreml", "portable"):
        with Pipeline.load(folder, EngineOptions(engine=engine)) as pipe:
            made.append(pipe("a big red star", steps=4, seed=2, guidance_scale=5.0, output="latent"))
    return {"psnr": psnr(made[0], made[1])}


SHARES = ("neural_engine", "gpu", "cpu")
where, how, jobs = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
logging.getLogger("coremltools").setLevel(logging.ERROR)
if where == "stand-in":
    proxy.install(precision="fp16")  # rounds as the hardware does
    trial.TRIAL = (sys.executable, str(Path(__file__).with_name("light_trial.py")), "{}")
if not how["trials"]:
    trial.TRIAL = ("/usr/bin/false",)
for job in jobs:
    print(json.dumps(run(**job) if "package" in job else draw(**job)), flush=True)
