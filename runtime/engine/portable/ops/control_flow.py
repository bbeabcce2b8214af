"""Choice, loops, and lists of tensors. Blocks are compiled plans that share the slots of the function around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import Node, Value, Values, op


@op("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Where the condition holds a, elsewhere b."""
    return torch.where(cond.bool(), a, b)


@op("cond")
def cond(pred: bool, blocks: Value) -> tuple[Any, ...]:
    """Run one of two blocks."""
    return tuple(blocks[0 if pred else 1]())


@op("while_loop")
def while_loop(loop_vars: Values, blocks: Value) -> tuple[Any, ...]:
    """Run the body while the condition holds; both blocks take the loop variables."""
    condition, body = blocks
    values = tuple(loop_vars)
    while bool(condition(*values)[0]):
        values = body(*values)
    return values


@op("make_list")
def make_list(
    node: Node,
    init_length: int = 1,
    dynamic_length: bool = True,
    elem_shape: Values | None = None,
    dtype: str = "fp32",
) -> list[Tensor]:
    """A list of zeros; where the shape of an element is not known yet (a size is a name), of nothing."""
    known = elem_shape is not None and all(isinstance(size, Tensor) for size in elem_shape)
    shape = [int(size) for size in elem_shape] if known and elem_shape is not None else [0]
    zero = torch.zeros(shape, dtype=node.numerics.dtype(dtype), device=node.numerics.device)
    return [zero] * init_length


@op("list_length")
def list_length(ls: Value) -> Tensor:
    return torch.tensor(len(ls), dtype=torch.int32)


@op("list_read")
def list_read(ls: Value, index: int) -> Tensor:
    value: Tensor = ls[index]
    return value


@op("list_write")
def list_write(ls: Value, index: int, value: Tensor) -> list[Tensor]:
    """A new list with one element replaced; it grows if the index lies beyond its end."""
    grown = [*ls, *[torch.zeros_like(value)] * (index + 1 - len(ls))]
    grown[index] = value
    return grown


@op("list_gather")
def list_gather(ls: Value, indices: Tensor) -> Tensor:
    return torch.stack([ls[int(index)] for index in indices])


@op("list_scatter")
def list_scatter(ls: Value, indices: Tensor, value: Tensor) -> list[Tensor]:
    """A new list with `value`'s rows at `indices`."""
    for index, row in zip(indices.tolist(), value, strict=True):
        ls = list_write(ls, int(index), row)
    return list(ls)


@op("classify")
def classify(probabilities: Tensor, classes: Value) -> tuple[Any, dict[Any, float]]:
    """The most probable label, and the probability of each."""
    scores = probabilities.reshape(-1).tolist()
    labels = classes.tolist() if hasattr(classes, "tolist") else list(classes)
    if len(scores) != len(labels):
        raise EngineError(f"classify: {len(scores)} probabilities for {len(labels)} classes")
    best = max(range(len(scores)), key=scores.__getitem__)
    return labels[best], dict(zip(labels, scores, strict=True))
