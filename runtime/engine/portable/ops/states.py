"""State that outlives a call (iOS 18): a state value is a one-element list that holds its tensor."""

from __future__ import annotations

from torch import Tensor

from glassine.runtime.engine.portable.registry import Value, op


@op("read_state")
def read_state(input: Value) -> Tensor:
    value: Tensor = input[0]
    return value


@op("write_state")
def write_state(input: Value, data: Tensor) -> tuple[()]:
    input[0] = data.clone()
    return ()
