"""Does loading ahead bring the first picture sooner?

Every round draws one picture in two fresh processes, in turn: one that loads every part when it is first needed, and
one that loads what comes next in a thread while the part before it works. With the portable engine the thread shares
the processors with the drawing; the stub waits instead, as a caller of Core ML does, for known times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import measure

TINY = Path(__file__).parents[1] / "models" / "tiny" / "tiny.safetensors"
DRAW = """
import sys, time, types
import numpy as np
from glassine.runtime import pipeline
from glassine.runtime.engine import Realised
from glassine.runtime.request import Request

folder, how, engine = sys.argv[1:]
LOADS = {"TextEncoder": 0.4, "Unet": 1.6, "VAEDecoder": 0.4}  # seconds, as a stub takes them
CALLS = {"TextEncoder": 0.1, "Unet": 0.1, "VAEDecoder": 0.3}

class Stub:
    def __init__(self, package, options):
        time.sleep(LOADS[package.stem])
        self.seconds = CALLS[package.stem]
        part = next(part for part in parts.values() if part.file == package.name)
        self.arrays = {name: np.zeros(shape, np.float32) for name, (shape, _) in part.outputs.items()}
        self.realised = Realised(engine="stub", device="", precision="", load_seconds=0.0)
    def predict(self, **_):
        time.sleep(self.seconds)
        return self.arrays
    def close(self): pass

parts = pipeline.Manifest.read(pipeline.Path(folder)).parts
if engine == "stub":
    pipeline.open_engine = Stub
pipeline.engine_name = lambda options: "coreml"  # or nothing would be loaded ahead for the portable engine
if how == "on_demand":
    pipeline.Pipeline.load_ahead = lambda self, needed: None
with pipeline.Pipeline.load(folder, pipeline.EngineOptions(engine="portable")) as pipe:
    pipe.run(Request(prompt="a red circle", steps=10, seed=1)).finish()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, nargs="?", help="a folder made by glassine convert; the tiny family if none"
    )
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "draw.py"
        script.write_text(DRAW, encoding="utf-8")
        model = asked.model
        if model is None:
            from glassine.convert.folder import convert_checkpoint

            model = Path(scratch) / "tiny"
            convert_checkpoint(TINY, model)
        result = {"model": model.name}
        for engine in ("portable", "stub"):
            seconds: dict[str, list[float]] = {"ahead": [], "on_demand": []}
            for round_ in range(asked.repeats + 1):
                for how, walls in seconds.items():
                    wall, _ = measure.child([sys.executable, str(script), str(model), how, engine])
                    if round_:  # the first fills the page cache
                        walls.append(wall)
            result |= {f"{engine}_{how}": measure.Sample.of(values, "s") for how, values in seconds.items()}
            result[f"{engine}_ratio"] = measure.ratio(seconds["ahead"], seconds["on_demand"])
    for name, value in result.items():
        print(f"{name:20} {value}")
    measure.record(f"ahead-{model.name}", result)


if __name__ == "__main__":
    main()
