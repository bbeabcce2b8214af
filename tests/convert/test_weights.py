"""Weights over weights: a stack answers as the file would if it had been changed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from glassine.convert.weights import Arrays, Patched


class Plus:
    """A patch that adds a number, and a weight of its own."""

    def __init__(self, number: float, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.number, self.shapes = number, shapes
        self.calls = 0

    def apply(self, name: str, weight: NDArray[np.float32] | None) -> NDArray[np.float32]:
        self.calls += 1
        wide = np.zeros(self.shapes[name], np.float32)
        if weight is not None:
            wide[tuple(map(slice, weight.shape))] = weight
        return wide + np.float32(self.number)

    def origin(self, name: str) -> str:
        return f"plus {self.number}: {name}"


BASE = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(4, np.float32)}


def test_patches_apply_in_order_widen_and_add() -> None:
    first, second = Plus(1, {"a": (2, 4)}), Plus(10, {"a": (2, 4), "c": (3,)})
    weights = Patched(Arrays(BASE), [first, second])
    assert weights.shapes == {"a": (2, 4), "b": (4,), "c": (3,)}
    np.testing.assert_array_equal(weights.read("a", 0, 8), [11, 12, 13, 11, 14, 15, 16, 11])
    np.testing.assert_array_equal(weights.read("b", 1, 3), [1, 1])
    np.testing.assert_array_equal(weights.read("c", 0, 3), [10, 10, 10])
    assert weights.origin("a") == 'memory: tensor "a" with plus 1: a with plus 10: a'
    assert weights.origin("c") == "plus 10: c"


def test_a_tensor_read_in_pieces_is_computed_once_a_thread() -> None:
    patch = Plus(1, {"a": (2, 3), "b": (4,)})
    weights = Patched(Arrays(BASE), [patch])
    pieces = [weights.read("a", at, at + 2) for at in (0, 2, 4)]
    np.testing.assert_array_equal(np.concatenate(pieces), np.arange(6) + 1)
    assert patch.calls == 1

    def read(name: str) -> list[float]:
        return [float(weights.read(name, at, at + 1)[0]) for at in range(weights.shapes[name][0])]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read, ["b", "b"])) == [[2.0] * 4] * 2
