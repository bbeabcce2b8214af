"""How fast and small is the conversion of a ControlNet? One of v1.1's size (361 M parameters) against `cp` of it.

    python benchmarks/control_convert.py                # stored as fp16 (723 MB) and as fp32 (1.45 GB)
    python benchmarks/control_convert.py --trace        # and jit.trace + coremltools.convert of diffusers' (6 GB)
    python benchmarks/control_convert.py --python PATH  # the `glassine` of another interpreter (one without torch)

"first" also writes the UNet that takes what the net gives, a graph of its own whose weights are a hard link; "further"
is every net after that. The base's weights are zeros: no byte of them is read or written. Needs 7 GB of free disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import measure

SEED = 0
Run = Callable[[], tuple[float, float]]  # wall seconds, peak MB


def support(name: str) -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from importlib import import_module

    return import_module(f"support.{name}")


def make(path: Path, dtype: str) -> None:
    """Write the net: every tensor different, every value finite and exact in fp16, |w| < 2."""
    import numpy as np

    checkpoints, controls = support("checkpoints"), support("controls")
    shapes = controls.ldm_control(checkpoints, checkpoints.SD15, controls.HINT)
    size = {"F16": 2, "F32": 4}[dtype]
    header, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + size * math.prod(shape)
        header[f"control_model.{key}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(SEED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, 1 << 24):
            count = min(1 << 24, offset - start) // size
            bits = np.frombuffer(rng.bytes(2 * count), "<u2") & 0xBFFF  # without the highest bit of the exponent
            halves = bits.view("<f2")
            file.write((halves if dtype == "F16" else halves.astype("<f4")).tobytes())


def trace(source: Path, out: Path) -> None:
    """The usual route: load into diffusers, trace, convert, save."""
    import coremltools as ct
    import numpy as np
    import torch
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
    from safetensors.torch import load_file

    class Plain(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            down, middle = self.net(*inputs, return_dict=False)
            return (*down, middle)

    net = ControlNetModel(cross_attention_dim=768, attention_head_dim=8).eval()
    net.load_state_dict(convert_controlnet_checkpoint(load_file(source), config={"layers_per_block": 2}))
    shapes = {
        "sample": (2, 4, 64, 64),
        "timestep": (2,),
        "encoder_hidden_states": (2, 77, 768),
        "controlnet_cond": (2, 3, 512, 512),
    }
    with torch.no_grad():
        traced = torch.jit.trace(Plain(net), tuple(torch.ones(shape) for shape in shapes.values()), check_trace=False)
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name, shape, dtype=np.float16) for name, shape in shapes.items()],
        minimum_deployment_target=ct.target.macOS14,
        skip_model_load=True,
    )
    model.save(str(out))


def linked(base: Path, place: Path) -> Path:
    """The base folder once more, by hard links."""
    shutil.copytree(base, place, copy_function=os.link)
    return place


def question(label: str, source: Path, bases: dict[str, Path], out: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Measure one file: seconds and peak memory, the ratio to cp and the seconds beyond it."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def glassine(base: Path) -> tuple[float, float]:
        folder = linked(base, out / "model")
        return measure.child([asked.python, "-m", "glassine", "convert", str(source), "--base", str(folder)], **quiet)

    contenders: dict[str, Run] = {"cp": lambda: measure.child(["cp", str(source), str(out / "copy")])}
    for name, base in bases.items():
        contenders[name] = lambda base=base: glassine(base)
    print(f"{label}: {source.stat().st_size / 1e9:.2f} GB", flush=True)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_ in range(asked.warmup + asked.repeats):
        for name, run in contenders.items():
            results[name] += [fresh(name, run, out)][round_ < asked.warmup :]
    if asked.trace:
        route = [sys.executable, __file__, "--child", "trace", str(source), str(out / "traced.mlpackage")]
        results["trace"] = [fresh("trace", lambda: measure.child(route, **quiet), out)]
    walls = {name: [wall for wall, _ in runs] for name, runs in results.items()}
    summary: dict[str, Any] = {"gigabytes": source.stat().st_size / 1e9}
    for name, runs in results.items():
        summary[f"{name}_seconds"] = measure.Sample.of(walls[name], "s")
        if name != "cp":
            summary[f"{name}_peak_megabytes"] = measure.Sample.of([peak for _, peak in runs], "MB")
        if name in bases:
            summary[f"{name}_ratio_to_cp"] = measure.ratio(walls[name], walls["cp"])
            beyond = [ours - 1.5 * theirs for ours, theirs in zip(walls[name], walls["cp"], strict=True)]
            summary[f"{name}_seconds_beyond_one_and_a_half_cp"] = measure.Sample.of(beyond, "s")
    for key, value in summary.items():
        print(f"  {key}: {value}")
    return {f"{label}_{key}": value for key, value in summary.items()}


def fresh(name: str, run: Run, out: Path) -> tuple[float, float]:
    """Run into an empty place, with no writes pending."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()
    wall, peak = run()
    print(f"  {name:10} {wall:7.2f} s {peak:7.0f} MB", flush=True)
    return wall, peak


def convert_base(python: str, place: Path) -> dict[str, Path]:
    """Convert a UNet of zeros, and a copy of the folder that has a net already."""
    checkpoints, controls = support("checkpoints"), support("controls")
    unet = {f"model.diffusion_model.{key}": shape for key, shape in checkpoints.ldm_unet(checkpoints.SD15).items()}
    source = checkpoints.write_sparse(place / "base.safetensors", unet)
    net = controls.ldm_control(checkpoints, checkpoints.SD15, controls.HINT)
    other = checkpoints.write_sparse(place / "other.safetensors", net)
    first, further = place / "first", place / "further"
    glassine = [python, "-m", "glassine", "convert"]
    subprocess.run([*glassine, str(source), str(first), "--part", "unet"], check=True, capture_output=True)
    linked(first, further)
    subprocess.run([*glassine, str(other), "--base", str(further)], check=True, capture_output=True)
    return {"first": first, "further": further}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="also the trace-and-convert route, once a file")
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose glassine is measured")
    parser.add_argument("--folder", type=Path, help="where the files go while this runs")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "IN", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        what, first, second = asked.child
        if what == "trace":
            trace(Path(first), Path(second))
        else:
            make(Path(second), first)
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        bases = convert_base(asked.python, Path(place))
        result: dict[str, Any] = {"seed": SEED}
        without = "import importlib.util as u; print(u.find_spec('torch') is None)"
        done = subprocess.run([asked.python, "-c", without], check=True, capture_output=True, text=True)
        result["without_torch"] = done.stdout.strip() == "True"
        for label, dtype in (("fp16", "F16"), ("fp32", "F32")):
            source = Path(place) / f"control_{label}.safetensors"
            # A child makes the file: memory that this process ever held would count as its children's.
            subprocess.run([sys.executable, __file__, "--child", "make", dtype, str(source)], check=True)
            result |= question(label, source, bases, Path(place) / "out", asked)
            source.unlink()
    measure.record("control_convert", result)


if __name__ == "__main__":
    main()
