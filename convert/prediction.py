"""What a model predicts, on which noise schedule it was trained, and with which settings it is meant to be drawn.

None of it shows in shapes. Sources, the first that speaks: what the user asked for; the header's `__metadata__`; the
marker keys `v_pred` and `ztsnr`; a diffusers folder's scheduler_config.json; a file of the same name that ends in
.yaml (stable-diffusion-webui's convention); for Stable Diffusion 2 a tensor that training moved; the family.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from glassine.convert.checkpoint import Checkpoint
from glassine.convert.weights import WeightSource
from glassine.errors import CheckpointError, ConversionError
from glassine.manifest import Scheduler
from glassine.models.config import Family, Prediction

Distilled = Literal["turbo", "lightning", "hyper", "lcm", "none"]

_WORDS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "sample": "sample",
}
# Training for v moves this bias of Stable Diffusion 2 apart; its deviation is below 0.09 in models that predict noise.
_SD2_TELLER = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
_SD2_DEVIATION = 0.09

# How each kind of few-step model was made to be drawn (its authors' own examples); guidance 1 is none.
_SETTINGS: dict[str, dict[str, Any]] = {
    "turbo": {"steps": 4, "guidance_scale": 1.0, "sampler": "euler_a", "spacing": "trailing"},
    "lightning": {"steps": 4, "guidance_scale": 1.0, "sampler": "euler", "spacing": "trailing"},
    "hyper": {"steps": 8, "guidance_scale": 1.0, "sampler": "ddim", "spacing": "trailing"},
    "lcm": {"steps": 4, "guidance_scale": 1.0, "sampler": "lcm", "spacing": "lcm"},
}
_GUIDANCE_EMBEDDED = 8.0  # of a model that is told its guidance scale as a number
_NAMED: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("turbo", re.compile(r"turbo")),
    ("lightning", re.compile(r"lightning")),
    ("hyper", re.compile(r"hyper[-_ ]?sd|(?<![a-z])hyper(?![a-z])")),
    ("lcm", re.compile(r"(?<![a-z])lcm(?![a-z])")),
)
_STEPS = re.compile(r"(\d{1,2})[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What was found: `reasons` says what decided, `defaults` are settings of `runtime.request.Request`."""

    scheduler: Scheduler
    prediction: Prediction
    defaults: Mapping[str, Any]
    reasons: Mapping[str, str]


def read_training(
    checkpoint: Checkpoint,
    family: Family,
    unet: WeightSource | None,
    *,
    prediction_type: Prediction | None = None,
    distilled: Distilled | None = None,
) -> Training:
    """Find out what the model predicts, on which schedule, and how it wants to be drawn.

    Args:
        family: with the UNet as it is.
        unet: its weights, if it is there.
        prediction_type, distilled: override what the file says.

    Raises:
        CheckpointError: it was trained on another kind of schedule.
        ConversionError: the file says something that is not known.
    """
    scheduler, schedule_reason = _scheduler(checkpoint)
    kind, steps, kind_reason = _distilled(checkpoint, family, distilled)
    prediction, prediction_reason = _prediction(checkpoint, family, unet, prediction_type)
    if prediction_type is None and kind == "lightning" and steps == 1:
        prediction, prediction_reason = "sample", f"{kind_reason}: one step, which predicts the picture itself"
    defaults = _SETTINGS.get(kind, {}) | ({"steps": steps} if kind != "none" and steps is not None else {})
    if family.unet.timestep_cond_dim is not None:
        defaults |= {"guidance_scale": _GUIDANCE_EMBEDDED}
    if scheduler.zero_terminal_snr and not defaults:
        defaults = {"spacing": "trailing", "guidance_rescale": 0.7}  # Lin et al. 2023, arXiv 2305.08891
    reasons = {"prediction type": prediction_reason, "schedule": schedule_reason}
    if kind != "none" or distilled is not None:
        reasons["few steps"] = f"{kind}: {kind_reason}"
    return Training(scheduler=scheduler, prediction=prediction, defaults=defaults, reasons=reasons)


def _scheduler(checkpoint: Checkpoint) -> tuple[Scheduler, str]:
    config = checkpoint.configs.get("scheduler", {})
    kind = str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")):
        raise CheckpointError(
            f"{checkpoint.path}: scheduler_config.json says {kind}: a model of another noise schedule (EDM: Playground "
            "2.5, CosXL; flow matching), and Glassine draws on Stable Diffusion's own alone"
        )
    known = {
        ours: config[theirs]
        for ours, theirs in (
            ("train_timesteps", "num_train_timesteps"),
            ("beta_start", "beta_start"),
            ("beta_end", "beta_end"),
            ("beta_schedule", "beta_schedule"),
            ("zero_terminal_snr", "rescale_betas_zero_snr"),
        )
        if theirs in config
    }
    like = dataclasses.asdict(Scheduler())
    wrong = [name for name, value in known.items() if type(value) is not type(like[name])]
    if wrong:
        raise ConversionError(f"{checkpoint.path}: scheduler_config.json: {wrong[0]} is {known[wrong[0]]!r}")
    scheduler, why = Scheduler(**known), "scheduler_config.json" if known else "Stable Diffusion's own"
    for key, ends in (("ztsnr", "ztsnr" in checkpoint.tensors), ("alphas_cumprod", _ends_in_noise(checkpoint))):
        if ends:
            return replace(scheduler, zero_terminal_snr=True), f'the key "{key}": it ends in noise alone'
    return scheduler, why


def _ends_in_noise(checkpoint: Checkpoint) -> bool:
    """Whether the stored schedule ends in pure noise (zero terminal signal-to-noise ratio)."""
    tensor = checkpoint.tensors.get("alphas_cumprod")
    if tensor is None or len(tensor.shape) != 1 or tensor.shape[0] == 0:
        return False
    return float(tensor.read(tensor.shape[0] - 1)[0]) < 1e-6


def _prediction(
    checkpoint: Checkpoint, family: Family, unet: WeightSource | None, override: Prediction | None
) -> tuple[Prediction, str]:
    if override is not None:
        return override, "asked for"
    for word, where in _spoken(checkpoint):
        if not isinstance(word, str) or word not in _WORDS:
            raise ConversionError(
                f"{checkpoint.path}: {where} says prediction type {word!r}, expected one of {', '.join(_WORDS)}; "
                "say which with --prediction-type"
            )
        return _WORDS[word], where
    # Models of 9 channels and of the refiner's kind predict noise; only plain Stable Diffusion 2 comes in both kinds.
    teller = unet.shapes.get(_SD2_TELLER, ()) if unet is not None else ()
    if (
        family.name == "sd2"
        and family.unet.in_channels == 4
        and unet is not None
        and teller == family.unet.channels[:1]
    ):
        deviation = float(np.std(unet.read(_SD2_TELLER, 0, teller[0]).astype(np.float64)))
        said = f'"{unet.key(_SD2_TELLER)}" has a deviation of {deviation:.3f}'
        if deviation > _SD2_DEVIATION:
            return "v_prediction", f"{said}, above {_SD2_DEVIATION}"
        return "epsilon", f"{said}, not above {_SD2_DEVIATION}"
    return family.prediction, f"the family {family.name}"


def _spoken(checkpoint: Checkpoint) -> Iterator[tuple[Any, str]]:
    """What the file and its neighbours say, the most binding first."""
    for who in ("glassine", "modelspec"):
        word = checkpoint.metadata.get(f"{who}.prediction_type")
        if word is not None:
            yield word, f"metadata {who}"
    if "v_pred" in checkpoint.tensors:
        yield "v", "the key v_pred"
    word = checkpoint.configs.get("scheduler", {}).get("prediction_type")
    if word is not None:
        yield word, "scheduler_config.json"
    sidecar = checkpoint.path.with_suffix(".yaml")
    if checkpoint.path.suffix == ".safetensors" and sidecar.is_file():
        text = sidecar.read_bytes()[:65536].decode("utf-8", errors="replace")
        match = re.search(r"""^\s*parameterization:\s*["']?(\w+)""", text, re.MULTILINE)
        if match:
            yield {"eps": "epsilon", "x0": "sample"}.get(match[1], match[1]), sidecar.name


def _distilled(checkpoint: Checkpoint, family: Family, override: Distilled | None) -> tuple[Distilled, int | None, str]:
    """Which kind of few-step model this is, for how many steps, and what says so: tensors only know about LCM."""
    named = checkpoint.path.absolute()
    name = (named.name if named.is_dir() else named.stem).lower()
    match = _STEPS.search(name)
    steps = int(match[1]) if match and int(match[1]) > 0 else None
    if override is not None:
        return override, steps, "asked for"
    if family.unet.timestep_cond_dim is not None:
        return "lcm", steps, "it has a guidance embedding"
    scheduler = checkpoint.configs.get("scheduler", {}).get("_class_name")
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        return "lcm" if scheduler == "LCMScheduler" else "hyper", steps, f"scheduler_config.json: {scheduler}"
    for kind, pattern in _NAMED:
        if pattern.search(name):
            assert kind in get_args(Distilled)
            return kind, steps, f"the name {checkpoint.path.name}"  # type: ignore[return-value]
    return "none", None, ""
