"""The noise schedule the family is trained on, and the samplers that training and measuring need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # noisy latents (B, 4, h, w), timesteps (B,) -> eps


@dataclass(frozen=True, slots=True)
class Schedule:
    """Stable Diffusion's: 1000 steps, scaled-linear betas from 0.00085 to 0.012; x_t = alpha z + sigma eps."""

    alpha: Tensor  # (1000,)
    sigma: Tensor  # (1000,)

    @classmethod
    def on(cls, device: torch.device) -> Schedule:
        """Return the schedule on a device."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, 0)
        return cls(kept.sqrt().float().to(device), (1 - kept).sqrt().float().to(device))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of timesteps (B,), each (B, 1, 1, 1)."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]


def guided(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, empty: Tensor, scale: float
) -> Denoise:
    """Return classifier-free guidance over `denoise(x, t, context)`: eps_empty + scale (eps - eps_empty)."""
    both = torch.cat([empty.expand_as(context), context])

    def call(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = denoise(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return uncond + scale * (cond - uncond)

    return call


def ddim(denoise: Denoise, schedule: Schedule, x: Tensor, timesteps: list[int]) -> Tensor:
    """Follow the probability-flow ODE from x at timesteps[0] through the others to the clean latents."""
    for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        t = torch.full((len(x),), now, device=x.device)
        alpha, sigma = schedule.at(t)
        eps = denoise(x, t)
        clean = (x - sigma * eps) / alpha
        if after is None:
            return clean
        alpha, sigma = schedule.at(torch.full_like(t, after))
        x = alpha * clean + sigma * eps
    return x


def dpmpp_2m(denoise: Denoise, schedule: Schedule, noise: Tensor, steps: int) -> Tensor:
    """DPM-Solver++(2M), Lu et al. (2022), over `steps` timesteps evenly spaced from 999 down."""
    times = torch.linspace(999, 0, steps + 1, device=noise.device).round().long()[:-1]
    x, past = noise, None  # past: the last clean prediction and its step in log-SNR
    for i, now in enumerate(times):
        t = now.expand(len(x))
        alpha, sigma = schedule.at(t)
        clean = (x - sigma * denoise(x, t)) / alpha
        if i + 1 == len(times):
            return clean
        alpha_next, sigma_next = schedule.at(times[i + 1].expand(len(x)))
        h = torch.log(alpha_next / sigma_next) - torch.log(alpha / sigma)
        estimate = clean if past is None else clean + (clean - past[0]) * h / (2 * past[1])
        x = sigma_next / sigma * x - alpha_next * torch.expm1(-h) * estimate
        past = clean, h
    return x


def lcm_timesteps(steps: int) -> list[int]:
    """Return the timesteps of LCM's scheduler: 4 steps are 999, 759, 499, 259."""
    origin = torch.arange(1, 51) * 20 - 1
    picks = torch.linspace(0, 50, steps + 1)[:-1].floor().long()
    return origin.flip(0)[picks].tolist()


def lcm(denoise: Denoise, schedule: Schedule, noise: Tensor, steps: int) -> Tensor:
    """Sample as LCM does: predict the clean latents, add fresh noise of the next level, again (Luo et al. 2023)."""
    x, times = noise, lcm_timesteps(steps)
    for i, now in enumerate(times):
        t = torch.full((len(x),), now, device=x.device)
        alpha, sigma = schedule.at(t)
        scaled = 10 * now
        keep, take = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        clean = take * (x - sigma * denoise(x, t)) / alpha + keep * x
        if i + 1 == steps:
            return clean
        alpha, sigma = schedule.at(torch.full_like(t, times[i + 1]))
        x = alpha * clean + sigma * torch.randn_like(x)
    return x
