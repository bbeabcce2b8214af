"""Attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glassine.runtime.engine.portable.registry import op


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(E) + mask) value, over the last two axes (L, E), (S, E), (S, EV)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask)
