"""How long, and how much memory, from process start to the first denoising step, the models' own loading apart?

Ours: a fresh process opens a converted folder (its packages answered by a stub), encodes the prompt and makes one step.
Reference: a fresh process imports diffusers' pipeline and builds tokenizer and scheduler, and stops there: less work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import measure

OURS = """
import sys, numpy as np
from pathlib import Path
from glassine.runtime import pipeline
from glassine.runtime.engine import Realised
from glassine.runtime.request import Request

class Stub:
    realised = Realised(engine="stub", device="", precision="", load_seconds=0.0)
    def __init__(self, outputs):
        self.arrays = {name: np.zeros(shape, np.float32) for name, (shape, _) in outputs.items()}
    def predict(self, **_): return self.arrays
    def close(self): pass

folder = Path(sys.argv[1])
parts = pipeline.Manifest.read(folder).parts
pipeline.open_engine = lambda package, _: Stub(next(p for p in parts.values() if p.file == package.name).outputs)
pipe = pipeline.Pipeline.load(folder)
next(iter(pipe.run(Request(prompt="a paper boat on a lake", seed=1))))
assert "torch" not in sys.modules and "coremltools" not in sys.modules
"""
THEIRS = """
import sys
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer
CLIPTokenizer(f"{sys.argv[1]}/vocab.json", f"{sys.argv[1]}/merges.txt")("a paper boat on a lake")
EulerDiscreteScheduler().set_timesteps(20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder made by glassine convert, of any size")
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    seconds: dict[str, list[float]] = {"glassine": [], "diffusers": []}
    memory: dict[str, list[float]] = {"glassine": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as scratch:
        for name, code in {"glassine": OURS, "diffusers": THEIRS}.items():
            (Path(scratch) / f"run_{name}.py").write_text(code, encoding="utf-8")
        for round_ in range(asked.repeats + 1):
            for name in ("glassine", "diffusers"):
                wall, peak = measure.child([sys.executable, f"{scratch}/run_{name}.py", str(asked.model)])
                if round_:  # the first fills the page cache
                    seconds[name].append(wall)
                    memory[name].append(peak)
    result = {f"{name}_seconds": measure.Sample.of(values, "s") for name, values in seconds.items()}
    result |= {f"{name}_peak": measure.Sample.of(values, "MB") for name, values in memory.items()}
    result["ratio"] = measure.ratio(seconds["glassine"], seconds["diffusers"])
    for name, sample in result.items():
        print(f"{name:20} {sample}")
    measure.record("start", result)


if __name__ == "__main__":
    main()
