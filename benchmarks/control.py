"""What control costs a step on the host, at 512 x 512 with two nets, and the memory it takes.

    python benchmarks/control.py

The UNet and both ControlNets are stubs that answer at once with arrays of Stable Diffusion 1.5's sizes, on both sides;
what is left is what the host does with 13 residuals of each net: weights 0.8 and 0.6, sums, the check for NaN, and the
loop. Theirs is diffusers' StableDiffusionControlNetPipeline with a MultiControlNetModel; it weights inside
ControlNetModel, so its stubs do that too, by the same formula. A step is the difference of a long and a short run.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import Sample, alternate, child, ratio, record

HERE = Path(__file__).parent
STEPS = (5, 15)
WARMUP, REPEATS = 1, 12
GOAL_MS = 12.0
WEIGHTS = (0.8, 0.6)
RESIDUALS = (
    *[(320, 64, 64)] * 3, (320, 32, 32), *[(640, 32, 32)] * 2, (640, 16, 16), *[(1280, 16, 16)] * 2, *[(1280, 8, 8)] * 4
)  # fmt: skip
LATENT = (1, 4, 64, 64)


def answers(seed: int) -> list[np.ndarray]:
    """What one net returns for both rows of guidance: 53.7 MB."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, *shape), dtype=np.float32) for shape in RESIDUALS]


def our_run(steps: int, *, nets: int = 2, mode: str = "balanced", mapped: bool = False) -> Callable[[], None]:
    """Draw once with stubs; `mapped` puts a control map over every net."""
    from glassine.runtime.control import Control, ReadyControl
    from glassine.runtime.control_nets import ControlNets, Net
    from glassine.runtime.denoiser import Conditioning, Denoiser, Guidance
    from glassine.runtime.loop import denoising_steps
    from glassine.runtime.noise import randn
    from glassine.runtime.samplers import SAMPLERS
    from glassine.runtime.schedule import STABLE_DIFFUSION, make_sigmas

    base = {"sample": (2, 4, 64, 64), "timestep": (2,), "encoder_hidden_states": (2, 768, 1, 77)}
    names = [f"additional_residual_{j}" for j in range(len(RESIDUALS))]
    outputs = {name: (2, *shape) for name, shape in zip(names, RESIDUALS, strict=True)}
    hint = np.zeros((1, 3, 512, 512), np.float32)
    where = np.tile(np.linspace(0, 1, 512, dtype=np.float32), (512, 1)) if mapped else None

    def steered(index: int) -> tuple[ReadyControl, Net]:
        answer = dict(zip(names, answers(index), strict=True))
        inputs = {**base, "controlnet_cond": (2, 3, 512, 512)}
        net = Net(name=str(index), inputs=inputs, outputs=outputs, predict=lambda **_: answer)
        control = Control(net.name, weight=WEIGHTS[index], mode=mode)  # type: ignore[arg-type]
        return ReadyControl(control=control, hint=hint, map=where), net

    pairs = [steered(index) for index in range(nets)]
    eps = {"noise_pred": randn(2, (2, *LATENT[1:]))}
    context = Conditioning(context=randn(3, (1, 768, 1, 77)))
    noise, sampler = randn(0, LATENT), SAMPLERS["euler"]

    def run() -> None:
        sigmas = make_sigmas(STABLE_DIFFUSION, steps, sampler.spacing)
        control = ControlNets(pairs, {**base, **outputs}, steps=steps) if nets else None
        denoiser = Denoiser(
            lambda **_: eps, STABLE_DIFFUSION, Guidance(cond=context, uncond=context), rows=2, control=control
        )
        for _ in denoising_steps(denoiser, sampler, sigmas, noise):
            pass

    return run


def their_pipeline() -> Any:
    """diffusers' ControlNet pipeline around networks that answer at once."""
    import diffusers
    import torch
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    class Stub(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")
        config = FrozenDict(in_channels=4, sample_size=64, time_cond_proj_dim=None, global_pool_conditions=False)

    class UNet(Stub):
        def __init__(self) -> None:
            super().__init__()
            self.answer = torch.randn(2, *LATENT[1:])

        def forward(self, *_: Any, **__: Any) -> tuple[Any]:
            return (self.answer,)

    class Net(diffusers.ControlNetModel):
        """The smallest ControlNetModel there is; its forward answers, and weights as ControlNetModel.forward does."""

        def prepare(self, seed: int) -> Net:
            self.answer = [torch.from_numpy(array) for array in answers(seed)]
            return self

        def forward(self, *_: Any, conditioning_scale: float, **__: Any) -> Any:
            scaled = [sample * conditioning_scale for sample in self.answer]
            return scaled[:-1], scaled[-1]

    sizes: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8}
    nets = [Net(cross_attention_dim=768, **sizes).prepare(index) for index in range(2)]
    training = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae=diffusers.AutoencoderKL(latent_channels=4, **sizes),
        text_encoder=None,
        tokenizer=None,
        unet=UNet(),
        controlnet=MultiControlNetModel(nets),
        scheduler=diffusers.EulerDiscreteScheduler(**training),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_run(pipe: Any, steps: int) -> Callable[[], None]:
    import torch

    embeds = torch.randn(1, 77, 768)
    hints = [torch.zeros(1, 3, 512, 512)] * 2
    latents = torch.randn(LATENT)

    def run() -> None:
        with torch.no_grad():
            pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=embeds,
                image=hints,
                controlnet_conditioning_scale=list(WEIGHTS),
                num_inference_steps=steps,
                latents=latents,
                output_type="latent",
            )

    return run


def step_ms(short: list[float], long: list[float]) -> list[float]:
    return [1000 * (b - a) / (STEPS[1] - STEPS[0]) for a, b in zip(short, long, strict=True)]


def memory(nets: int) -> float:
    """Peak MB of a child that draws with so many nets; each one's answers are among it."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import control; control.our_run(3, nets={nets})()"
    return child([sys.executable, "-c", code])[1]


def main() -> None:
    warnings.filterwarnings("ignore")
    # Before anything large is loaded here: a child's peak begins with what its parent had.
    peaks = {f"{nets} nets": memory(nets) for nets in (0, 1, 2)}
    pipe = their_pipeline()
    makers: dict[str, Callable[[int], Callable[[], None]]] = {
        "ours": our_run,
        "ours, maps": functools.partial(our_run, mapped=True),
        "ours, control mode": functools.partial(our_run, mode="control"),
        "ours, one net": functools.partial(our_run, nets=1),
        "ours, no net": functools.partial(our_run, nets=0),
        "diffusers": functools.partial(their_run, pipe),
    }
    contenders = {f"{who} {steps}": make(steps) for who, make in makers.items() for steps in STEPS}
    times = alternate(contenders, warmup=WARMUP, repeats=REPEATS)
    steps = {who: step_ms(times[f"{who} {STEPS[0]}"], times[f"{who} {STEPS[1]}"]) for who in makers}
    rows: dict[str, Sample] = {who: Sample.of(values, "ms") for who, values in steps.items()}
    rows["ratio"] = ratio(steps["ours"], steps["diffusers"])
    answered = sum(array.nbytes for array in answers(0)) / 1e6
    # The quickest long run against the quickest short one: as near as can be to a machine without other work.
    best = {who: step_ms([min(times[f"{who} {STEPS[0]}"])], [min(times[f"{who} {STEPS[1]}"])])[0] for who in makers}
    print(*(f"  {who}: {sample}" for who, sample in rows.items()), sep="\n")
    print("  quickest:", ", ".join(f"{who} {value:.3g} ms" for who, value in best.items()))
    print(f"  peak MB, of which each net's answers are {answered:.0f}: {peaks}")
    kept = {who: vars(sample) for who, sample in rows.items()}
    record(
        "control",
        {"steps": STEPS, "goal_ms": GOAL_MS, **kept, "quickest_ms": best, "peak_mb": peaks, "answer_mb": answered},
    )


if __name__ == "__main__":
    main()
