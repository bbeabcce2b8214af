"""Normalizations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glassine.runtime.engine.portable.registry import Ints, op


@op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalize every channel (axis 1) with the given statistics."""
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@op("instance_norm")
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Normalize every (row, channel) over its spatial axes."""
    axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    shape = (1, -1, *[1] * (x.ndim - 2))
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@op("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide by the norm over the last three axes."""
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


@op("layer_norm")
def layer_norm(
    x: Tensor, axes: Ints = (), gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Normalize over `axes` (all of them if none are given); gamma and beta have the shape of those axes."""
    axes = tuple(sorted(axis % x.ndim for axis in axes)) or tuple(range(x.ndim))
    if axes == tuple(range(x.ndim - len(axes), x.ndim)):
        return F.layer_norm(x, [x.shape[axis] for axis in axes], gamma, beta, epsilon)
    # Seen with those axes last; PyTorch's function makes the one copy this takes.
    last = tuple(range(-len(axes), 0))
    y = F.layer_norm(x.movedim(axes, last), [x.shape[axis] for axis in axes], gamma, beta, epsilon)
    return y.movedim(last, axes)


@op("local_response_norm")
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Divide by a power of the mean square of `size` neighbours on the third axis from the last.

    Those are the channels of images; of rank 3 they are the batch, says coremltools' test of what Core ML answers.
    """
    return F.local_response_norm(x.transpose(-3, 1), size, alpha, beta, k).transpose(-3, 1)
