"""How fast does the portable engine run a UNet, beside PyTorch eager running the same diffusers network?

Same random weights and inputs, float32, same threads, turn about. The reference is the network as diffusers runs it,
with fused attention and group norms. Every form of attention and layout is measured; the error is PSNR against it.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from glassine.convert.package import write_package
from glassine.convert.program import Requests, lower
from glassine.convert.weights import Arrays
from glassine.models.config import SD15, UNetConfig
from glassine.models.unet import unet
from glassine.runtime.engine import EngineOptions, open_engine

MEDIUM = UNetConfig(channels=(160, 320, 640, 640), heads=(8, 8, 8, 8))
FORMS = list(itertools.product(("einsum", "split", "sdpa"), ("channels_last", "channels_first")))


def diffusers_unet(config: UNetConfig, cells: int) -> torch.nn.Module:
    """The same network, by diffusers, with weights that float16 holds exactly."""
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=cells,
        block_out_channels=config.channels,
        attention_head_dim=config.heads,  # the number of heads, in spite of its name
        cross_attention_dim=config.context_dim,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half())
    return net.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="Stable Diffusion 1.5 itself at 512 px (860 M weights)")
    parser.add_argument("--cells", type=int, help="latent cells a side (32; with --full 64)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, help="PyTorch's; its own choice if not given")
    parser.add_argument("--forms", nargs="*", default=["/".join(form) for form in FORMS], help="attention/layout")
    asked = parser.parse_args()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    config = SD15.unet if asked.full else MEDIUM
    cells = asked.cells if asked.cells is not None else 64 if asked.full else 32

    net = diffusers_unet(config, cells)
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    inputs = _inputs(config, cells)
    reference = _reference(net, inputs)
    result: dict[str, Any] = {
        "channels": config.channels,
        "cells": cells,
        "batch": 2,
        "threads": torch.get_num_threads(),
    }
    for form in asked.forms:
        attention, layout = form.split("/")
        with tempfile.TemporaryDirectory() as scratch:
            package = Path(scratch) / "unet.mlpackage"
            requests = Requests({name: array.shape for name, array in arrays.items()})
            sizes = {"height": cells, "width": cells, "attention": attention, "layout": layout}
            write_package(package, lower(unet(config, requests, **sizes)), Arrays(arrays))
            engine = open_engine(package, EngineOptions(engine="portable"))
            error = engine.predict(**inputs)["noise_pred"] - reference()
            times = measure.alternate(
                {"glassine": lambda engine=engine: engine.predict(**inputs), "diffusers": reference},
                warmup=2,
                repeats=asked.repeats,
            )
            result[form] = {
                "load_seconds": engine.realised.load_seconds,
                "psnr_db": float(20 * np.log10(np.abs(reference()).max() / np.sqrt(np.mean(error**2)))),
                **{name: vars(measure.Sample.of(seconds, "s")) for name, seconds in times.items()},
                "ratio": vars(measure.ratio(times["glassine"], times["diffusers"])),
            }
            print(f"{form:25} ratio {measure.ratio(times['glassine'], times['diffusers'])}")
            engine.close()
    measure.record("portable_full" if asked.full else "portable", result)


def _inputs(config: UNetConfig, cells: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"sample": (2, config.in_channels, cells, cells), "encoder_hidden_states": (2, config.context_dim, 1, 77)}
    drawn = {name: rng.standard_normal(shape).astype(np.float16).astype(np.float32) for name, shape in shapes.items()}
    return {**drawn, "timestep": np.array([501, 501], np.float32)}


def _reference(net: torch.nn.Module, inputs: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    sample, timestep = torch.from_numpy(inputs["sample"]), torch.from_numpy(inputs["timestep"])
    states = torch.from_numpy(inputs["encoder_hidden_states"]).squeeze(2).mT.contiguous()

    def run() -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = net(sample, timestep, states, return_dict=False)[0].numpy()
        return result

    return run


if __name__ == "__main__":
    main()
