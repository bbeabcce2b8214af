"""How fast is a change of LoRAs in a finished model? SD 1.5, a rank-32 LoRA over both networks, against `cp`.

    python benchmarks/lora.py                        # glassine lora MODEL add FILE=STRENGTH, and remove
    python benchmarks/lora.py --folder /big/disk     # where the model goes (needs 8 GB)

The reference is `cp` of the two weight.bin that change: on a disk that cannot share extents between files (ext4) a
change writes them whole, and that is the disk's share. On APFS, Btrfs and XFS the unchanged part costs nothing.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

RANK = 32
CONVERSION = Path(__file__).with_name("convert.py")  # makes the checkpoint
BLOB = "Data/com.apple.CoreML/weights/weight.bin"
ATTENTION = ("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def make_lora(path: Path, folder: Path) -> int:
    """Write a kohya LoRA over every linear layer of the transformers in both networks; return how many there are."""
    import numpy as np

    from glassine.convert.index import read_indices

    rng, tensors = np.random.default_rng(0), {}
    prefixes = {"unet": ("lora_unet_", ATTENTION), "text_encoder": ("lora_te_", TEXT)}
    for index in read_indices(folder):
        prefix, layers = prefixes[index.part]
        for place in index.places:
            module = place.name.removesuffix(".weight")
            if place.name.endswith(".weight") and module.endswith(tuple(f".{layer}" for layer in layers)):
                out, wide = place.shape[:2]
                name = prefix + module.replace(".", "_")
                tensors[f"{name}.lora_down.weight"] = rng.standard_normal((RANK, wide)) / wide**0.5
                tensors[f"{name}.lora_up.weight"] = 0.01 * rng.standard_normal((out, RANK))
                tensors[f"{name}.alpha"] = np.float32(RANK / 2)
    measure.support("checkpoints").write_safetensors(
        path, {key: np.asarray(value, np.float32) for key, value in tensors.items()}
    )
    return len(tensors) // 3


def main() -> None:
    asked = measure.parser(__doc__, 2).parse_args()
    if asked.child:
        print(make_lora(Path(asked.child[1]), Path(asked.child[0])))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        source, model, lora = Path(place) / "base.safetensors", Path(place) / "model", Path(place) / "style.safetensors"
        subprocess.run([sys.executable, str(CONVERSION), "--child", "make", "whole", str(source)], check=True)
        subprocess.run(
            [asked.python, "-m", "glassine", "convert", str(source), str(model)], check=True, **measure.QUIET
        )
        source.unlink()
        made = [sys.executable, __file__, "--child", str(model), str(lora)]
        modules = int(subprocess.run(made, check=True, capture_output=True, text=True).stdout)
        changed = [model / package / BLOB for package in ("Unet.mlpackage", "TextEncoder.mlpackage")]
        strengths = itertools.cycle((0.8, 0.5))
        base = [asked.python, "-m", "glassine", "lora", str(model)]
        samples: dict[str, list[tuple[float, float]]] = {"cp": [], "change": [], "remove": []}
        for round_ in range(asked.warmup + asked.repeats):
            copies = [str(Path(place) / f"copy{i}") for i in range(len(changed))]
            both = [str(path) for pair in zip(changed, copies, strict=True) for path in pair]
            steps = {
                "cp": ["sh", "-c", "cp $0 $1 && cp $2 $3", *both],
                "change": [*base, "add", f"{lora}={next(strengths)}"],
                "remove": [*base, "remove", "style"],
            }
            subprocess.run([*base, "add", f"{lora}={next(strengths)}"], check=True, **measure.QUIET)
            for name, command in steps.items():
                os.sync()
                wall, peak = measure.child(command, **measure.QUIET)
                print(f"  {name:10} {wall:7.2f} s {peak:7.0f} MB", flush=True)
                if round_ >= asked.warmup:
                    samples[name].append((wall, peak))
            for copy in copies:
                Path(copy).unlink()
        result: dict[str, Any] = {"modules": modules, "rank": RANK}
        result["changed_gigabytes"] = sum(path.stat().st_size for path in changed) / 1e9
    result |= measure.beside_cp(samples)
    for key, value in result.items():
        print(f"  {key}: {value}")
    measure.record("lora", result)


if __name__ == "__main__":
    main()
