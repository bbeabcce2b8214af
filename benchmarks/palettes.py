"""How fast are palettes, how small, how much is lost? SD 1.5's UNet at full size with weights as training leaves them.

    python benchmarks/palettes.py                          # 6 bits, then int8, 8 and 4 bits
    python benchmarks/palettes.py --forms 6 4/16 --recipe  # these, and a recipe of 4 and 6 bits
    python benchmarks/palettes.py --forms 6 --coremltools  # and coremltools' own palettize_weights (minutes, 4 GB)

Weights are Student's t with 6 degrees of freedom, as heavy-tailed as a trained network's, scaled by 1 / sqrt(inputs).
Needs 6 GB of free disk. The error is compared with the exact optimum on tensors of every size.
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
from pathlib import Path
from typing import Any

import measure

SEED = 0
SIZES = (
    4_000,
    16_000,
    102_400,
    1_638_400,
    14_745_600,
)  # elements: from a narrow layer's to the largest kernels of SD 1.5


def make(path: Path) -> None:
    """Write the UNet of a Stable Diffusion 1.5 checkpoint."""
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support import checkpoints

    unet = checkpoints.ldm_unet(checkpoints.FULL_SIZE["sd15"])
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in unet.items()}
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(SEED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            scale = 1 / math.sqrt(math.prod(shape[1:]) or 1) if len(shape) > 1 else 1.0
            for start in range(0, math.prod(shape), 1 << 20):
                count = min(1 << 20, math.prod(shape) - start)
                normal = rng.standard_normal(count, np.float32)
                chi = rng.standard_gamma(3.0, count, np.float32) / 3  # of 6 degrees of freedom, over 6
                file.write((scale * normal / np.sqrt(chi)).astype(np.float16).tobytes())


def beyond_optimum(bits: int) -> dict[str, float]:
    """The squared error of a palette over that of the exact optimum, by the size of the weight; small ones have it."""
    import numpy as np

    from glassine.convert.histogram import Histograms
    from glassine.convert.kmeans import good_palettes, optimal_palette
    from glassine.convert.palettize import EXACT

    rng = np.random.default_rng(SEED)
    found = {}
    for size in SIZES:
        weight = (0.03 * rng.standard_t(6, size)).astype(np.float16)
        counted = Histograms.of_one(weight.view(np.uint16))
        best = optimal_palette(counted.values, counted.counts, 1 << bits)[None]
        ours = best if size <= EXACT else good_palettes(counted, 1 << bits)
        found[str(size)] = counted.error(ours) / counted.error(best) - 1
    return found


def with_coremltools(package: Path, out: Path, bits: int) -> None:
    """The usual route: load a package, palettize, save."""
    import coremltools as ct
    from coremltools.optimize.coreml import OpPalettizerConfig, OptimizationConfig, palettize_weights

    model = ct.models.MLModel(str(package), skip_model_load=True)
    config = OptimizationConfig(global_config=OpPalettizerConfig(mode="kmeans", nbits=bits))
    palettize_weights(model, config).save(str(out))


def form(words: str, source: Path, out: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Convert in one form: seconds, peak memory, bytes, and what was lost."""
    command = [sys.executable, "-m", "glassine", "convert", str(source), str(out), "--part", "unet", "--palette", words]
    runs = []
    for _ in range(asked.repeats):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        runs.append(measure.child(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    part = json.loads((out / "glassine.json").read_text())["parts"]["unet"]
    blob = out / part["file"] / "Data/com.apple.CoreML/weights/weight.bin"
    return {
        "seconds": measure.Sample.of([wall for wall, _ in runs], "s"),
        "peak_megabytes": measure.Sample.of([peak for _, peak in runs], "MB"),
        "megabytes": blob.stat().st_size / 1e6,
        "snr_db": part["about"]["palette"]["snr_db"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["6", "int8", "8", "4"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--coremltools", action="store_true", help="also coremltools' own route, once")
    parser.add_argument("--recipe", action="store_true", help="also glassine recipe, once (4 GB)")
    parser.add_argument("--folder", type=Path, help="where the files go while this runs")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "IN", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        what, first, second = asked.child
        make(Path(second)) if what == "make" else with_coremltools(Path(first), Path(second), int(what))
        return
    result: dict[str, Any] = {"seed": SEED}
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        source, out = Path(place) / "unet.safetensors", Path(place) / "out"
        subprocess.run([sys.executable, __file__, "--child", "make", "-", str(source)], check=True)
        for words in asked.forms:
            for key, value in form(words, source, out, asked).items():
                result[f"{words}_{key}"] = value
                print(f"{words:5} {key}: {value}", flush=True)
        if asked.recipe:
            command = [sys.executable, "-m", "glassine", "recipe", str(source), "--decibels", "22", "--forms", "4,6"]
            wall, peak = measure.child([*command, "-o", str(Path(place) / "recipe.json")], **measure.QUIET)
            result |= {"recipe_seconds": wall, "recipe_peak_megabytes": peak}
            print(f"recipe: {wall:.1f} s, {peak:.0f} MB", flush=True)
        bits = [int(words) for words in asked.forms if words.isdecimal()]
        if asked.coremltools and bits:
            shutil.rmtree(out, ignore_errors=True)
            plain = [sys.executable, "-m", "glassine", "convert", str(source), str(out), "--part", "unet"]
            subprocess.run(plain, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            route = [sys.executable, __file__, "--child", str(bits[0]), str(out / "Unet.mlpackage")]
            wall, peak = measure.child([*route, str(out / "theirs.mlpackage")], stderr=subprocess.DEVNULL)
            result |= {f"coremltools_{bits[0]}_seconds": wall, f"coremltools_{bits[0]}_peak_megabytes": peak}
            print(f"coremltools, {bits[0]} bits: {wall:.1f} s, {peak:.0f} MB", flush=True)
    for width in bits:
        result[f"{width}_error_beyond_optimum"] = beyond_optimum(width)
        print(f"{width} bits, error beyond the optimum: {result[f'{width}_error_beyond_optimum']}", flush=True)
    measure.record("palettes", result)


if __name__ == "__main__":
    main()
