"""What the loop costs a step: everything between two calls of the network, at 512 x 512 with a change map.

    python benchmarks/loop.py

The network is a stub that answers at once, on both sides. Ours is the denoiser (guidance, two rows) and the loop with a
change map that releases cells at every step; theirs is diffusers' StableDiffusionImg2ImgPipeline, which has no map, fed
with latents and embeddings. A step is the difference between a long and a short run, so that preparing costs nothing on
either side.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from measure import Sample, alternate, ratio, record

from glassine.runtime.change_map import n_table, parse, to_cells
from glassine.runtime.denoiser import Conditioning, Denoiser, Guidance
from glassine.runtime.loop import denoising_steps
from glassine.runtime.noise import StepNoise, randn
from glassine.runtime.samplers import SAMPLERS
from glassine.runtime.schedule import STABLE_DIFFUSION, make_sigmas

LATENT = (1, 4, 64, 64)
SHORT, LONG = 20, 60
WARMUP, REPEATS = 3, 30
GOAL_MS = 0.5
# Ours -> diffusers' scheduler and its settings.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def our_run(name: str, steps: int, *, mapped: bool) -> Callable[[], None]:
    """Draw once: noise, schedule, table and denoiser are made in the call, as a user's would be."""
    sampler = SAMPLERS[name]
    answer = {"noise_pred": randn(2, (2, *LATENT[1:]))}
    context = Conditioning(context=randn(3, (1, 768, 1, 77)))
    noise, source = randn(0, LATENT), randn(1, LATENT)
    change = to_cells(parse("gradient:left-right", 512, 512))

    def run() -> None:
        sigmas = make_sigmas(STABLE_DIFFUSION, steps, sampler.spacing)
        guidance = Guidance(cond=context, uncond=context)
        denoiser = Denoiser(lambda **_: answer, STABLE_DIFFUSION, guidance, rows=2)
        n = n_table(change, sigmas) if mapped else None
        for _ in denoising_steps(denoiser, sampler, sigmas, noise, source=source, n=n, step_noise=StepNoise(0)):
            pass

    return run


def their_pipeline(name: str) -> Any:
    """diffusers' image-to-image pipeline around a network that answers at once."""
    import diffusers
    import torch
    from diffusers.configuration_utils import FrozenDict

    class Stub(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")
        config = FrozenDict(in_channels=4, sample_size=64, time_cond_proj_dim=None)

        def __init__(self) -> None:
            super().__init__()
            self.answer = torch.from_numpy(randn(2, (2, *LATENT[1:])))

        def forward(self, *_: Any, **__: Any) -> tuple[Any]:
            return (self.answer,)

    scheduler, settings = SCHEDULERS[name]
    training = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        vae=diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=8),
        text_encoder=None,
        tokenizer=None,
        unet=Stub(),
        scheduler=getattr(diffusers, scheduler)(**training, **settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_run(pipe: Any, steps: int) -> Callable[[], None]:
    import torch

    embeds = torch.from_numpy(randn(3, (1, 77, 768)))
    latents = torch.from_numpy(randn(1, LATENT))
    generator = torch.Generator()

    def run() -> None:
        with torch.no_grad():
            pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=embeds,
                image=latents,
                strength=1.0,
                num_inference_steps=steps,
                generator=generator.manual_seed(0),
                output_type="latent",
            )

    return run


def step_ms(short: list[float], long: list[float]) -> list[float]:
    return [1000 * (b - a) / (LONG - SHORT) for a, b in zip(short, long, strict=True)]


def main() -> None:
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {"latent": LATENT, "steps": [SHORT, LONG], "goal_ms": GOAL_MS}
    for name in SCHEDULERS:
        pipe = their_pipeline(name)
        makers: dict[str, Callable[[int], Callable[[], None]]] = {
            "ours": functools.partial(our_run, name, mapped=True),
            "ours without a map": functools.partial(our_run, name, mapped=False),
            "diffusers without a map": functools.partial(their_run, pipe),
        }
        contenders = {f"{who} {steps}": make(steps) for who, make in makers.items() for steps in (SHORT, LONG)}
        times = alternate(contenders, warmup=WARMUP, repeats=REPEATS)
        steps = {who: step_ms(times[f"{who} {SHORT}"], times[f"{who} {LONG}"]) for who in makers}
        row: dict[str, Sample] = {who: Sample.of(values, "ms") for who, values in steps.items()}
        row["ratio"] = ratio(steps["ours"], steps["diffusers without a map"])
        # The quickest long run against the quickest short one: as near as can be to a machine without other work.
        best = {who: step_ms([min(times[f"{who} {SHORT}"])], [min(times[f"{who} {LONG}"])])[0] for who in makers}
        result[name] = {**{who: vars(sample) for who, sample in row.items()}, "quickest_ms": best}
        print(name, *(f"  {who}: {sample}" for who, sample in row.items()), sep="\n")
        print("  quickest:", ", ".join(f"{who} {value:.3g} ms" for who, value in best.items()))
    record("loop", result)


if __name__ == "__main__":
    main()
