"""Activations, element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import op


@op("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """x where positive, alpha*x elsewhere, at most beta."""
    return torch.where(x >= 0, x.clamp(max=beta), (alpha * x).clamp(max=beta))


@op("elu")
def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


@op("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise EngineError(f"gelu: mode {mode!r}, expected EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION")


@op("leaky_relu")
def leaky_relu(x: Tensor, alpha: float = 0.01) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@op("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float = 0.0) -> Tensor:
    return alpha * x + beta


@op("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """One slope per channel (axis 1)."""
    return torch.where(x >= 0, x, _per_channel(alpha, x) * x)


@op("relu")
def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@op("relu6")
def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


@op("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    return alpha * torch.tanh(beta * x)


@op("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@op("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@op("silu")
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@op("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@op("softplus")
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))


@op("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha * log(1 + e^(beta x)), one alpha and beta per channel (axis 1)."""
    return _per_channel(alpha, x) * softplus(_per_channel(beta, x) * x)


@op("softsign")
def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


@op("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))
