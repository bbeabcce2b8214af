"""How fast and small is the conversion of a ControlNet? One of v1.1's size (361 M parameters) against `cp` of it.

    python benchmarks/control_convert.py                # stored as fp16 (723 MB) and as fp32 (1.45 GB)
    python benchmarks/control_convert.py --trace        # and jit.trace + coremltools.convert of diffusers' (6 GB)
    python benchmarks/control_convert.py --python PATH  # the `glassine` of another interpreter (one without torch)

"first" also writes the UNet that takes what the net gives, a graph of its own whose weights are a hard link; "further"
is every net after that. The base's weights are zeros: no byte of them is read or written. Needs 7 GB of free disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import measure

SEED = 0


def make(path: Path, dtype: str) -> None:
    """Write the net."""
    checkpoints, controls = measure.support("checkpoints"), measure.support("controls")
    shapes = controls.ldm_control(checkpoints, checkpoints.SD15, controls.HINT)
    measure.write_random(path, {f"control_model.{key}": shape for key, shape in shapes.items()}, dtype, SEED)


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


def question(label: str, source: Path, bases: dict[str, Path], place: Path, asked: Namespace) -> dict[str, Any]:
    """Measure one file: seconds and peak memory, the ratio to cp and the seconds beyond one and a half."""
    out = place / "out"

    def glassine(base: Path) -> tuple[float, float]:
        command = [asked.python, "-m", "glassine", "convert", str(source), "--base", str(linked(base, out / "model"))]
        return measure.child(command, **measure.QUIET)

    contenders: dict[str, measure.Run] = {"cp": lambda: measure.child(["cp", str(source), str(out / "copy")])}
    for name, base in bases.items():
        contenders[name] = lambda base=base: glassine(base)
    print(f"{label}: {source.stat().st_size / 1e9:.2f} GB", flush=True)
    results = measure.rounds(contenders, out, warmup=asked.warmup, repeats=asked.repeats)
    if asked.trace:
        route = [sys.executable, __file__, "--child", "trace", str(source), str(out / "traced.mlpackage")]
        once: dict[str, measure.Run] = {"trace": lambda: measure.child(route, **measure.QUIET)}
        results |= measure.rounds(once, out, warmup=0, repeats=1)
    summary = {"gigabytes": source.stat().st_size / 1e9, **measure.beside_cp(results, 1.5)}
    for key, value in summary.items():
        print(f"  {key}: {value}")
    return {f"{label}_{key}": value for key, value in summary.items()}


def convert_base(python: str, place: Path) -> dict[str, Path]:
    """Convert a UNet of zeros, and a copy of the folder that has a net already."""
    checkpoints, controls = measure.support("checkpoints"), measure.support("controls")
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
    parser = measure.parser(__doc__, 3)
    parser.add_argument("--trace", action="store_true", help="also the trace-and-convert route, once a file")
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
        result["without_torch"] = measure.without_torch(asked.python)
        for label, dtype in (("fp16", "F16"), ("fp32", "F32")):
            source = Path(place) / f"control_{label}.safetensors"
            # A child makes the file: memory that this process ever held would count as its children's.
            subprocess.run([sys.executable, __file__, "--child", "make", dtype, str(source)], check=True)
            result |= question(label, source, bases, Path(place), asked)
            source.unlink()
    measure.record("control_convert", result)


if __name__ == "__main__":
    main()
