"""What do transparent pictures cost? Converting the decoder beside `cp`, and one pass of it on the portable engine.

The decoder has the released one's sizes and random weights. A pass is timed and its memory measured in a fresh process,
for every form of attention, with queries in chunks (as shipped) and all at once, turn about with PyTorch eager running
the same network with fused attention.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np

from glassine.convert.addition import base_of
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.names import Source
from glassine.convert.packages import plan_packages, write_packages
from glassine.convert.program import Requests, lower
from glassine.convert.transparency import TransparentFile, transparent_networks
from glassine.convert.weights import FileWeights
from glassine.manifest import Manifest
from glassine.models import transparency
from glassine.models.config import TransparentDecoderConfig
from glassine.runtime.engine import EngineOptions, open_engine

TINY = Path(__file__).parents[1] / "models/tiny/tiny.safetensors"
LAYOUTS = {"split": "channels_first", "einsum": "channels_last", "sdpa": "channels_last"}
DECODER = "TransparentDecoder.mlpackage"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--forms", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--decode", nargs=4, metavar=("PACKAGE", "FILE", "SIZE", "REPEATS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.decode:
        _decode(Path(asked.decode[0]), Path(asked.decode[1]), int(asked.decode[2]), int(asked.decode[3]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        file = _write_decoder(place / "transparent_decoder.safetensors")
        result: dict[str, Any] = {"convert": _convert(place, file, asked.repeats)}
        for size in asked.sizes:
            for form in asked.forms:
                for chunked in (True, False) if form != "sdpa" else (True,):
                    name = f"{form} {size}" + ("" if chunked else " in one piece")
                    result[name] = _decode_in_child(place, file, form, size, chunked, asked.repeats)
                    print(f"{name:24} {json.dumps(result[name])}", flush=True)
    measure.record("transparency", result)


def _write_decoder(path: Path) -> Path:
    """A file of the released decoder's keys and shapes: 208 MB."""
    lowered = lower(transparency.transparent_decoder(TransparentDecoderConfig(), Requests(), height=64, width=64))
    shapes = {}
    for record, weight in lowered.plan.weights():
        linear = "norm" in weight.name or ".to_" in weight.name
        shapes[weight.name] = tuple(size for size in record.shape if size > 1) if linear else record.shape
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, dtype=np.float32)
            values *= 1.0 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
            out.write((values + (name.endswith("weight") and len(shape) == 1)).astype("<f2").tobytes())
    return path


def _convert(place: Path, file: Path, repeats: int) -> dict[str, Any]:
    """The decoder into a folder of 512 pixels, beside `cp` of its file; in this process, and as a command."""
    folder = place / "folder"
    convert_checkpoint(TINY, folder, ConvertOptions(sizes=((512, 512),), attention="einsum", layout="channels_last"))
    base = base_of(folder, Manifest.read(folder))
    out = place / "out"

    def convert() -> None:
        out.mkdir()
        networks = transparent_networks([TransparentFile(path=file, kind="decoder")], base)
        write_packages(out, plan_packages(networks, base.options.sizes, "m", lambda _: None), lambda _: None)
        shutil.rmtree(out)

    def copy() -> None:
        subprocess.run(["cp", file, place / "copy"], check=True)
        (place / "copy").unlink()

    times = measure.alternate({"convert": convert, "cp": copy}, warmup=1, repeats=repeats)
    command = [sys.executable, "-m", "glassine", "convert", f"decoder={file}", "--base", str(folder), "--overwrite"]
    wall, peak = zip(*(measure.child(command, stdout=subprocess.DEVNULL) for _ in range(repeats)), strict=True)
    beyond = [ours - theirs for ours, theirs in zip(times["convert"], times["cp"], strict=True)]
    result = {
        **{name: vars(measure.Sample.of(seconds, "s")) for name, seconds in times.items()},
        "beyond_cp": vars(measure.Sample.of(beyond, "s")),
        "command": vars(measure.Sample.of(wall, "s")),
        "command_peak": vars(measure.Sample.of(peak, "MB")),
    }
    print(f"{'convert':24} {json.dumps(result)}", flush=True)
    return result


def _decode_in_child(place: Path, file: Path, form: str, size: int, chunked: bool, repeats: int) -> dict[str, Any]:
    """Write the decoder in one form and size, and run it in fresh processes: with us, and with PyTorch alone."""
    package = place / DECODER
    requests = Requests()
    how: Any = {"height": size, "width": size, "attention": form, "layout": LAYOUTS[form]}
    whole, transparency.SCORES = transparency.SCORES, transparency.SCORES if chunked else 2**62
    try:
        program = transparency.transparent_decoder(TransparentDecoderConfig(), requests, **how)
    finally:
        transparency.SCORES = whole
    from glassine.convert.package import write_package

    write_package(package, lower(program), _weights(file), overwrite=True)
    result: dict[str, Any] = {}
    for name, source in (("glassine", package), ("torch", Path("-"))):
        log = place / "log.json"
        with log.open("w") as out:
            command = [sys.executable, __file__, "--decode", str(source), str(file), str(size), str(repeats)]
            _, peak = measure.child(command, stdout=out)
        seconds = json.loads(log.read_text().splitlines()[-1])
        result[name] = {**vars(measure.Sample.of(seconds, "s")), "peak_mb": round(peak)}
    result["ratio"] = result["glassine"]["median"] / result["torch"]["median"]
    return result


def _weights(file: Path) -> FileWeights:
    checkpoint = open_checkpoint(file)
    return FileWeights(checkpoint, {key: Source(key) for key in checkpoint.tensors})


def _decode(package: Path, file: Path, size: int, repeats: int) -> None:
    """Run one decoder in this process, and print the seconds of every pass after the first."""
    rng = np.random.default_rng(0)
    pixel = rng.random((1, 3, size, size), dtype=np.float32)
    latent = rng.standard_normal((1, 4, size // 8, size // 8), dtype=np.float32)
    run: Callable[[], object]
    if package.name == "-":
        import torch

        from glassine.convert import reference_layers

        weights = _InMemory(file)
        inputs = torch.from_numpy(pixel), torch.from_numpy(latent)
        torch.set_grad_enabled(False)
        run = partial(reference_layers.transparent_decoder, TransparentDecoderConfig(), weights, *inputs)
    else:
        engine = open_engine(package, EngineOptions(engine="portable"))
        run = partial(engine.predict, pixel=pixel, latent=latent)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds[1:]))


class _InMemory:
    """A file's weights in float32, read once."""

    def __init__(self, file: Path) -> None:
        weights = _weights(file)
        self.shapes = weights.shapes
        self._values = {
            name: weights.read(name, 0, int(np.prod(shape))).astype(np.float32) for name, shape in self.shapes.items()
        }

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._values[name][start:stop]


if __name__ == "__main__":
    main()
