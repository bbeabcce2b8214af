"""How fast and small is conversion? A family at its full size with random fp16 weights, against `cp` of the same bytes.

    python benchmarks/convert.py                     # the UNet (860 M parameters, 1.72 GB), then the whole checkpoint
    python benchmarks/convert.py --trace             # and jit.trace + coremltools.convert of diffusers' UNet (7 GB)
    python benchmarks/convert.py --family sdxl --only whole    # 3.5 G parameters, 6.9 GB; also sd2 and sdxl_refiner
    python benchmarks/convert.py --python PATH       # measure the `glassine` of another interpreter (one without torch)

Needs three times the checkpoint of free disk (SD 1.5: 7 GB, SDXL: 21 GB). Before every run the disk is left alone until
all earlier writes have reached it; writing itself goes through the page cache on both sides, as neither cp nor glassine
waits for the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

SEED = 0
Run = Callable[[], tuple[float, float]]  # wall seconds, peak MB


def make(path: Path, family: str, whole: bool) -> None:
    """Write the checkpoint: every tensor different, every value finite, |w| < 2."""
    import json
    import math
    import struct

    import numpy as np

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support import checkpoints

    sizes = checkpoints.FULL_SIZE[family]
    unet = {f"model.diffusion_model.{key}": shape for key, shape in checkpoints.ldm_unet(sizes).items()}
    shapes = checkpoints.ldm_checkpoint(sizes) if whole else unet
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(SEED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, 1 << 24):
            bits = np.frombuffer(rng.bytes(min(1 << 24, offset - start)), "<u2")
            file.write((bits & 0xBFFF).tobytes())  # without the highest bit of the exponent


def trace(source: Path, out: Path) -> None:
    """The usual route: load into diffusers, trace, convert, save."""
    import coremltools as ct
    import numpy as np
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from safetensors.torch import load_file

    class Plain(torch.nn.Module):
        def __init__(self, unet: torch.nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.unet(sample, timestep, context, return_dict=False)[0]

    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).eval()
    unet.load_state_dict(convert_ldm_unet_checkpoint(load_file(source), config={"layers_per_block": 2}))
    example = (torch.randn(2, 4, 64, 64), torch.tensor([1.0, 1.0]), torch.randn(2, 77, 768))
    with torch.no_grad():
        traced = torch.jit.trace(Plain(unet), example, check_trace=False)
    model = ct.convert(
        traced,
        inputs=[
            ct.TensorType("sample", (2, 4, 64, 64), dtype=np.float16),
            ct.TensorType("timestep", (2,), dtype=np.float16),
            ct.TensorType("encoder_hidden_states", (2, 77, 768), dtype=np.float16),
        ],
        minimum_deployment_target=ct.target.macOS14,
        skip_model_load=True,
    )
    model.save(str(out))


def rounds(contenders: dict[str, Run], out: Path, *, warmup: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Run the contenders in turn, each into an empty place and with no writes pending."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_ in range(warmup + repeats):
        for name, run in contenders.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()
            wall, peak = run()
            print(f"  {name:10} {wall:7.2f} s {peak:7.0f} MB", flush=True)
            if round_ >= warmup:
                results[name].append((wall, peak))
    return results


def question(label: str, source: Path, out: Path, asked: argparse.Namespace, *part: str) -> dict[str, Any]:
    """Measure one source: seconds, peak memory, the ratio to cp and the seconds beyond it."""
    command = [asked.python, "-m", "glassine", "convert", str(source), str(out / "model"), *part]
    command += ["--attention", asked.attention]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    contenders: dict[str, Run] = {
        "cp": lambda: measure.child(["cp", str(source), str(out / "copy")]),
        "glassine": lambda: measure.child(command, **quiet),
    }
    print(f"{label}: {source.stat().st_size / 1e9:.2f} GB")
    results = rounds(contenders, out, warmup=asked.warmup, repeats=asked.repeats)
    if asked.trace and asked.family == "sd15" and "--part" in part:
        route = [sys.executable, __file__, "--child", "trace", str(source), str(out / "traced.mlpackage")]
        results |= rounds({"trace": lambda: measure.child(route, **quiet)}, out, warmup=0, repeats=1)
    walls = {name: [wall for wall, _ in runs] for name, runs in results.items()}
    summary: dict[str, Any] = {"gigabytes": source.stat().st_size / 1e9}
    for name, runs in results.items():
        summary[f"{name}_seconds"] = measure.Sample.of(walls[name], "s")
        if name != "cp":
            summary[f"{name}_peak_megabytes"] = measure.Sample.of([peak for _, peak in runs], "MB")
    summary["ratio_to_cp"] = measure.ratio(walls["glassine"], walls["cp"])
    beyond = [ours - theirs for ours, theirs in zip(walls["glassine"], walls["cp"], strict=True)]
    summary["seconds_beyond_cp"] = measure.Sample.of(beyond, "s")
    for key, value in summary.items():
        print(f"  {key}: {value}")
    return {f"{label}_{key}": value for key, value in summary.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--family", default="sd15", choices=["sd15", "sd2", "sdxl", "sdxl_refiner"])
    parser.add_argument("--only", choices=["unet", "whole"], help="one of the two questions")
    parser.add_argument("--trace", action="store_true", help="also the trace-and-convert route of SD 1.5, once")
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose glassine is measured")
    parser.add_argument("--attention", default="split")
    parser.add_argument("--folder", type=Path, help="where the files go while this runs")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "IN", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        what, first, second = asked.child
        if what == "trace":
            trace(Path(first), Path(second))
        else:
            make(Path(second), asked.family, first == "whole")
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        out = Path(place) / "out"
        result: dict[str, Any] = {"seed": SEED, "attention": asked.attention, "family": asked.family}
        without = "import importlib.util as u; print(u.find_spec('torch') is None)"
        done = subprocess.run([asked.python, "-c", without], check=True, capture_output=True, text=True)
        result["without_torch"] = done.stdout.strip() == "True"
        for label, part in (("unet", ("--part", "unet")), ("whole", ())):
            if asked.only not in {None, label}:
                continue
            source = Path(place) / f"{label}.safetensors"
            # A child makes the file: memory that this process ever held would count as its children's.
            make_it = [sys.executable, __file__, "--family", asked.family, "--child", "make", label, str(source)]
            subprocess.run(make_it, check=True)
            result |= question(label, source, out, asked, *part)
            source.unlink()
    measure.record("convert" if asked.family == "sd15" else f"convert_{asked.family}", result)


if __name__ == "__main__":
    main()
