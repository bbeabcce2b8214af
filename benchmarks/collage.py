"""What do words in their places cost: the UNet for collages beside the plain one, and the host beside no collage?

    python benchmarks/collage.py

The UNets have Stable Diffusion's blocks at a quarter of its width, 256 px, two rows, eight layers, and the same random
weights; they run on the portable engine in turn, with zeros for a bias and with the words of eight layers. That engine
runs the plain UNet's attention as one operation and a biased one step by step, so both are timed without such fusing
too. The host is what `LayerAttention` does at 512 px for eight layers: once a picture (the masks), and at every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np

from glassine.convert.package import write_package
from glassine.convert.program import Requests, lower
from glassine.convert.weights import Arrays
from glassine.models.config import SD15, UNetConfig
from glassine.models.unet import unet
from glassine.runtime.denoiser import NetworkCall, Row
from glassine.runtime.engine import Engine, EngineOptions, open_engine
from glassine.runtime.engine.portable import executor
from glassine.runtime.layer_attention import LayerAttention, PlacedWords

QUARTER = UNetConfig(channels=(80, 160, 320, 320), heads=(4, 4, 4, 4), norm_groups=16)
LAYERS, CELLS = 8, 32
FORMS = (("split", "channels_first"), ("einsum", "channels_last"))
CALL = NetworkCall(0, 3.0, (Row(0, "uncond"), Row(0, "cond")), {})


def words(height: int, width: int) -> PlacedWords:
    """Eight layers with three tokens each, on a picture of so many pixels."""
    seen = np.random.default_rng(0).random((LAYERS, height, width)).astype(np.float32) / LAYERS
    columns = tuple((3 * i + 1, 3 * i + 2, 3 * i + 3) for i in range(LAYERS))
    return PlacedWords(visible=seen, columns=columns, attract=(0.5,) * LAYERS, repel=(0.5,) * LAYERS)


def opened(config: UNetConfig, form: tuple[str, str], folder: Path) -> Engine:
    """The UNet with random weights, on the portable engine."""
    requests = Requests()
    lowered = lower(unet(config, requests, height=CELLS, width=CELLS, attention=form[0], layout=form[1]))
    rng = np.random.default_rng(0)
    arrays = {
        weight.name: (rng.standard_normal(record.shape) * 0.02 + ("norm" in weight.name)).astype(np.float16)
        for record, weight in sorted(lowered.plan.weights(), key=lambda pair: pair[1].name)
    }
    write_package(folder, lowered, Arrays(arrays))
    return open_engine(folder, EngineOptions(engine="portable"))


def inputs_of(engine: Engine, placed: bool) -> dict[str, np.ndarray]:
    """Random inputs, and the words' own or zeros."""
    rng = np.random.default_rng(1)
    specs = {name: (spec.shape, spec.dtype) for name, spec in engine.inputs.items()}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in specs.items()}
    given["timestep"] = np.full(2, 501, np.float32)
    if "collage_table" in specs:
        given |= LayerAttention(words(8 * CELLS, 8 * CELLS), specs, 2)(CALL)
        given["collage_table"] = given["collage_table"] * np.float32(placed)
    return given


def networks(form: tuple[str, str], repeats: int) -> dict[str, measure.Sample]:
    """Seconds of a call of each, and the ratios to the plain one."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = opened(QUARTER, form, Path(scratch) / "plain.mlpackage")
        collage = opened(dataclasses.replace(QUARTER, collage=LAYERS), form, Path(scratch) / "collage.mlpackage")
        given = {
            "plain": inputs_of(plain, False),
            "zeros": inputs_of(collage, False),
            "words": inputs_of(collage, True),
        }
        engines = {"plain": plain, "zeros": collage, "words": collage}
        calls = {name: lambda name=name: engines[name].predict(**given[name]) for name in given}
        times = measure.alternate(calls, warmup=2, repeats=repeats)
        plain.close()
        collage.close()
    found = {name: measure.Sample.of(seconds, "s") for name, seconds in times.items()}
    return found | {f"{name} ratio": measure.ratio(times[name], times["plain"]) for name in ("zeros", "words")}


def host(repeats: int) -> dict[str, measure.Sample]:
    """Milliseconds of the host at 512 px, Stable Diffusion 1.5: once a picture, and every step."""
    count = 2 * LAYERS
    masks = {f"collage_masks_{level}": ((2, count, 64 >> level, 64 >> level), "float16") for level in range(4)}
    specs = {**masks, "collage_table": ((2, SD15.text_encoders[0].tokens, 1, count), "float16")}
    placed = words(512, 512)
    attention = LayerAttention(placed, specs, 2)

    def milliseconds(call: Callable[[], object], times: int) -> measure.Sample:
        values = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(times):
                call()
            values.append(1000 * (time.perf_counter() - start) / times)
        return measure.Sample.of(values, "ms")

    return {
        "once": milliseconds(lambda: LayerAttention(placed, specs, 2), 1),
        "step": milliseconds(lambda: attention(CALL), 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    rows = {f"host {name}": sample for name, sample in host(asked.repeats).items()}
    for form in FORMS:
        rows |= {f"{'/'.join(form)} {name}": sample for name, sample in networks(form, asked.repeats).items()}
    fuse, executor.fuse = executor.fuse, lambda body: body
    try:
        unfused = networks(FORMS[1], asked.repeats)
    finally:
        executor.fuse = fuse
    rows |= {f"{'/'.join(FORMS[1])} unfused {name}": sample for name, sample in unfused.items()}
    print(*(f"  {name}: {sample}" for name, sample in rows.items()), sep="\n")
    measure.record("collage", {"layers": LAYERS, "cells": CELLS, **{name: vars(s) for name, s in rows.items()}})


if __name__ == "__main__":
    main()
