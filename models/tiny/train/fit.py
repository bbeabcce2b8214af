"""One training loop for every stage.

The loss draws its own batch and noise on the device, so a step takes no data from the host: on a GPU it is captured
once as a CUDA graph and replayed. The nets compute in bf16 there; AdamW works on fp32 masters, and what a stage hands
on is the moving average of the masters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast one stage trains."""

    steps: int
    batch: int
    rate: float  # of AdamW at the top of the cosine
    final: float = 0.01  # of the rate at the end
    warmup: float = 0.03  # of the steps
    average: float = 0.04  # of the steps: the time constant of the moving average
    decay: float = 0.01  # AdamW's weight decay
    clip: float = 1.0  # of the gradient's norm

    def factor(self, step: int) -> float:
        """Return the learning rate of a step as a fraction of `rate`: linear warm-up, then a cosine."""
        progress = torch.tensor((step + 1) / self.steps)
        if progress < self.warmup:
            return float(progress / self.warmup)
        cosine = 0.5 + 0.5 * torch.cos(torch.pi * (progress - self.warmup) / (1 - self.warmup))
        return float(self.final + (1 - self.final) * cosine)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what nets compute in on this device: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def fit(
    name: str,
    plan: Plan,
    nets: Sequence[nn.Module],
    loss: Callable[[], Tensor],
    device: torch.device,
    compiled: Sequence[nn.Module] = (),
) -> None:
    """Train what requires gradients in `nets`, in place; they come back averaged, in fp32 and evaluation mode.

    Args:
        loss: draws a batch and returns the scalar to descend; nothing in it may wait for the device.
        compiled: the modules worth compiling for this stage, trained or not; only a GPU compiles them.
    """
    began = time.perf_counter()
    for net in nets:
        net.to(device).train()
    weights: list[Tensor] = [weight for net in nets for weight in net.parameters() if weight.requires_grad]
    masters = [weight.detach().float().clone() for weight in weights]
    averages = [master.clone() for master in masters]
    for net in nets:
        net.to(compute_dtype(device))
    step = _Step(plan, weights, masters, averages, loss, device)
    on_gpu = device.type == "cuda"
    for module in compiled if on_gpu else ():
        module.compile()
    replay = _capture(step) if on_gpu else step
    ready = time.perf_counter()
    every = max(plan.steps // 10, 1)
    for number in range(plan.steps):
        step.set_rate(plan.rate * plan.factor(number))
        replay()
        if (number + 1) % every == 0:
            report = f"{name}: step {number + 1}/{plan.steps}  loss {step.mean_loss():.5f}"
            print(f"{report}  {time.perf_counter() - began:.0f} s", flush=True)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - ready
    print(
        f"{name}: {seconds:.1f} s, {1000 * seconds / plan.steps:.2f} ms a step, {ready - began:.1f} s to start",
        flush=True,
    )
    for module in compiled:
        module._compiled_call_impl = None  # evaluation comes in other shapes
    for net in nets:
        net.float().eval()
    with torch.no_grad():
        for weight, average in zip(weights, averages, strict=True):
            weight.copy_(average)


class _Step:
    """One step over tensors that stay where they are, as a CUDA graph needs it."""

    def __init__(
        self,
        plan: Plan,
        weights: list[Tensor],
        masters: list[Tensor],
        averages: list[Tensor],
        loss: Callable[[], Tensor],
        device: torch.device,
    ) -> None:
        on_gpu = device.type == "cuda"
        self.plan, self.loss = plan, loss
        self.weights, self.masters, self.averages = weights, masters, averages
        self.keep = 1 / max(plan.average * plan.steps, 1)
        self.rate = torch.zeros((), device=device)
        self.total, self.counted = torch.zeros((), device=device), torch.zeros((), device=device)
        self.gradients = [torch.zeros_like(master) for master in masters]
        for master, gradient in zip(masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer = torch.optim.AdamW(
            masters, lr=self.rate, betas=(0.9, 0.99), weight_decay=plan.decay, fused=on_gpu, capturable=on_gpu
        )

    def set_rate(self, rate: float) -> None:
        self.rate.fill_(rate)

    def mean_loss(self) -> float:
        mean = float(self.total / self.counted)
        self.total.zero_()
        self.counted.zero_()
        return mean

    def __call__(self) -> None:
        loss = self.loss()
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            torch._foreach_copy_(self.gradients, gradients)
            nn.utils.clip_grad_norm_(self.masters, self.plan.clip)
            self.optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)
            torch._foreach_lerp_(self.averages, self.masters, self.keep)
            self.total += loss.detach().float()
            self.counted += 1


def _capture(step: _Step) -> Callable[[], None]:
    """Run a few steps at rate zero, which lets libraries choose their kernels, and record one as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    step.mean_loss()
    return graph.replay
