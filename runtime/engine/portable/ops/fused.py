"""What `fusion` puts in place of groups of operations; these names are in no package."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glassine.runtime.engine.portable.ops.transformers import attend
from glassine.runtime.engine.portable.registry import Bools, Ints, op


@op("glassine_group_norm")
def group_norm(
    x: Tensor, groups: int, shape: Ints, epsilon: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Normalize over groups of channels and all positions, in `shape`."""
    return F.group_norm(x.reshape(shape), groups, weight, bias, epsilon)


@op("glassine_attention")
def attention(
    query: Tensor, key: Tensor, value: Tensor, transposed: Bools, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attend over (.., tokens, d); `transposed` says which of query, key, value and result are (.., d, tokens)."""
    q, k, v = (x.mT if turn else x for x, turn in zip((query, key, value), transposed, strict=False))
    y = attend(q, k, v, mask, scale)
    return y.mT if transposed[3] else y


@op("glassine_split_attention")
def split_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend in the Neural Engine's layout: query and value (B, d, 1, tokens), key (B, tokens, 1, d)."""
    # The third axis, of size 1, becomes the heads.
    y = attend(query.permute(0, 2, 3, 1), key.movedim(2, 1), value.permute(0, 2, 3, 1), None, scale)
    return y.permute(0, 3, 1, 2)
