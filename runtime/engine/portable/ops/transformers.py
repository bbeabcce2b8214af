"""Attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glassine.runtime.engine.portable.registry import op


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attend over (.., tokens, d), with the factor d^-1/2 where `scale` is None.

    PyTorch's fast kernel wants rank 4 and d contiguous; making it so costs less than the slow one.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.ndim == 3 and mask is None:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(E) + mask) value, over the last two axes (L, E), (S, E), (S, EV)."""
    return attend(query, key, value, attn_mask, None)
