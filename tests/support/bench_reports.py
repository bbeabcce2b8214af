"""Reports with figures that are made up."""

from __future__ import annotations

import statistics
from typing import Any

from glassine.runtime.bench.report import Figures, Measured, Report
from glassine.runtime.bench.statistics import drift, quartiles, warnings

WOBBLE = (0.0, 0.01, -0.01, 0.02, -0.02)
WORK = {
    "flops": 1_600_000_000_000,
    "unsized": 0,
    "weight_bytes": 1_720_000_000,
    "edge_bytes": 500_000,
    "inner_bytes": 9_000_000_000,
}
UNITS = {"ane": "cpu_and_ne", "gpu": "cpu_and_gpu"}


def figures(asked: str, seconds: float, *, count: int = 10, picture: bool = False, **more: Any) -> Figures:
    samples = tuple(seconds * (1 + WOBBLE[index % 5]) for index in range(count))
    low, high = quartiles(samples)
    made: dict[str, Any] = {
        "asked": asked,
        "engine": "coreml",
        "device": UNITS[asked],
        "precision": "as converted",
        "cold_load": None if picture else 60.0,
        "warm_load": 1.5,
        "first": 2 * seconds,
        "samples": samples,
        "at": tuple(seconds * index for index in range(count)),
        "median": statistics.median(samples),
        "low": low,
        "high": high,
        "drift": drift(samples),
        "peak_bytes": 1_900_000_000,
        "base_bytes": 50_000_000,
        "memory": "physical footprint",
        "warnings": warnings(samples),
    }
    if picture:
        stages = {"prepare": 0.02, "denoise": 0.9 * seconds, "decode": 0.08 * seconds, "evaluations": 20.0}
        made |= {"stages": stages, "images_per_minute": 60 / seconds}
        made["energy"] = {
            "watts": {"cpu": 1.0, "ane": 3.0},
            "joules_per_picture": 4.0 * seconds,
            "idle_watts": 0.3,
            "intervals": 40,
        }
        made["quality"] = {"psnr": 41.2, "max_error": 0.2, "reference": "portable engine, float32, cpu"}
    else:
        made["placement"] = {"neural_engine": 0.98, "gpu": 0.0, "cpu": 0.02}
        made["roof"] = {
            "tflops": 1.6 / seconds,
            "gigabytes": 1.72 / seconds,
            "bound": "arithmetic",
            "share": 0.5,
            "peak_tflops": 15.8,
            "peak_gigabytes": 200.0,
            "source": "published, M2 Pro",
        }
    return Figures(**{**made, **more})


def report(scale: float = 1.0, **more: Any) -> Report:
    """A model of which the GPU takes twice as long as the Neural Engine; one part failed there."""
    about = {
        "packages": ["Unet.mlpackage"],
        "rows": 2,
        "attention": "split",
        "palette": None,
        "precision": "float16",
        "work": WORK,
    }
    unet = Measured(
        role="unet",
        about=about,
        order="in turns",
        figures=(figures("ane", 0.2 * scale, count=20), figures("gpu", 0.4 * scale, count=20)),
        failures={},
    )
    decoder = Measured(
        role="vae_decoder",
        about={**about, "rows": 1, "work": None},
        order="in turns",
        figures=(figures("gpu", 0.5 * scale, roof=None, placement=None),),
        failures={"ane": "vae_decoder on ane: crashed while loading it (it was ended by SIGKILL)"},
    )
    pictures = Measured(
        role="picture",
        about={"steps": 20},
        order="in turns",
        figures=(figures("ane", 4.5 * scale, picture=True), figures("gpu", 9.0 * scale, picture=True)),
        failures={},
    )
    condition = {"load": [0.1, 0.2, 0.3], "power": "AC Power", "thermal": "nominal"}
    made: dict[str, Any] = {
        "glassine": "0.2.0",
        "started": "2026-11-22T14:00:00Z",
        "seconds": 300.5,
        "settings": {
            "asked": ["ane", "gpu"],
            "engine": "coreml",
            "precision": "as converted",
            "runs": 20,
            "pictures": 10,
            "warmup": 3,
            "steps": None,
            "width": 512,
            "height": 512,
        },
        "machine": {
            "chip": "Apple M2 Pro",
            "system": "macOS 15.5 (24F74)",
            "cores": 12,
            "gpu_cores": 19,
            "memory_bytes": 34359738368,
            "python": "3.12.1",
            "versions": {"numpy": "2.3.5"},
            "before": condition,
            "after": condition,
        },
        "model": {"name": "boat", "family": "sd15", "digest": "ab" * 32, "batch": 2, "tokens": 77, "loras": []},
        "parts": (unet, decoder),
        "pictures": pictures,
        "batching": (
            {"asked": "ane", "role": "unet", "rows": [1, 2], "medians": [0.11, 0.2], "ratio": 1.1, "low": 1.05,
             "high": 1.15},
        ),
        "notes": ("a note",),
    }  # fmt: skip
    return Report(**{**made, **more})
