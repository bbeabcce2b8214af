"""Random numbers. They follow the asked distribution; no two engines agree on the numbers themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import Ints, Node, op


def _generator(seed: int | None, node: Node) -> torch.Generator | None:
    if seed is None or seed < 0:
        return None
    return torch.Generator(node.numerics.device).manual_seed(seed)


def _uniform(shape: Ints, seed: int | None, node: Node) -> Tensor:
    return torch.rand(shape, generator=_generator(seed, node), device=node.numerics.device)


@op("random_uniform")
def random_uniform(shape: Ints, node: Node, low: float = 0.0, high: float = 1.0, seed: int | None = None) -> Tensor:
    return low + (high - low) * _uniform(shape, seed, node)


@op("random_normal")
def random_normal(shape: Ints, node: Node, mean: float = 0.0, stddev: float = 1.0, seed: int | None = None) -> Tensor:
    return mean + stddev * torch.randn(shape, generator=_generator(seed, node), device=node.numerics.device)


@op("random_bernoulli")
def random_bernoulli(shape: Ints, node: Node, prob: float = 0.5, seed: int | None = None) -> Tensor:
    return (_uniform(shape, seed, node) < prob).float()


@op("random_categorical")
def random_categorical(x: Tensor, node: Node, mode: str = "logits", size: int = 1, seed: int | None = None) -> Tensor:
    """`size` draws a row, from logits or probabilities."""
    weights = torch.softmax(x, -1) if mode == "logits" else x
    return torch.multinomial(weights, size, replacement=True, generator=_generator(seed, node)).float()
