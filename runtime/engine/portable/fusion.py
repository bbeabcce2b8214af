"""Rewrites that let PyTorch run what a program spells out with one of its fused functions, float32 only.

    reshape, mean, sub, square, mean, add, sqrt, real_div, reshape [, batch_norm]   ->  group_norm
    matmul [, mul] [, add mask], softmax, matmul                                    ->  attention
    einsum [, mul], softmax, einsum                                                 ->  attention

A rewrite happens only where it changes nothing but rounding: every intermediate value has this one use, and shapes are
static. In fp16 mode nothing is rewritten, because there each operation rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.runtime.engine.portable.program import Block, Constant, Operation, ValueType

Ref = str | Constant


def fuse(block: Block) -> Block:
    """Return the block with every group norm and attention it spells out replaced."""
    operations = list(block.operations)
    for match in (_match_group_norm, _match_attention):
        graph = _Graph(operations, block.outputs)
        for anchor in operations:
            fused = match(graph, anchor)
            if fused is not None:
                graph.replace(*fused)
        operations = graph.remaining()
    return replace(block, operations=tuple(operations))


class _Graph:
    """Who makes each value, who reads it, and what has been replaced."""

    def __init__(self, operations: list[Operation], outputs: tuple[str, ...]) -> None:
        self._operations = operations
        self.producer = {variable.name: op for op in operations for variable in op.outputs}
        self.types = {variable.name: variable.type for op in operations for variable in op.outputs}
        self.readers: dict[str, list[Operation]] = {}
        self.uses: Counter[str] = Counter(outputs)
        for op in operations:
            for name in _read_names(op):
                self.readers.setdefault(name, []).append(op)
                self.uses[name] += 1
        self._new: dict[int, Operation] = {}
        self._gone: set[int] = set()

    def made_by(self, ref: Ref, *types: str, uses: int = 1) -> Operation | None:
        """Return the operation of one of these types that makes `ref`, if the value is read `uses` times."""
        op = self.producer.get(ref) if isinstance(ref, str) else None
        if op is None or op.type not in types or self.uses[op.outputs[0].name] != uses or id(op) in self._gone:
            return None
        return op

    def only_reader(self, op: Operation) -> Operation | None:
        """Return the one operation that reads the result of `op`."""
        name = op.outputs[0].name
        return self.readers[name][0] if self.uses[name] == 1 and len(self.readers.get(name, ())) == 1 else None

    def constant(self, ref: Ref) -> NDArray[Any] | None:
        """Return the values behind `ref` if it is a constant."""
        if isinstance(ref, Constant):
            return ref.array()
        op = self.producer.get(ref)
        return op.attributes["val"].array() if op is not None and op.type == "const" else None

    def shape(self, ref: Ref) -> tuple[int, ...] | None:
        """Return a static shape, None if any dimension is unknown."""
        shape = ref.type.shape if isinstance(ref, Constant) else self.types[ref].shape if ref in self.types else ()
        known = tuple(dim for dim in shape if dim is not None)
        return known if len(known) == len(shape) else None

    def replace(self, fused: Operation, gone: list[Operation]) -> None:
        """Put `fused` in place of the last of the operations `gone`, whose result it computes."""
        self._gone |= {id(op) for op in gone}
        self._new[id(gone[-1])] = fused

    def remaining(self) -> list[Operation]:
        """Return the operations after all replacements."""
        return [self._new.get(id(op), op) for op in self._operations if id(op) in self._new or id(op) not in self._gone]


def _read_names(op: Operation) -> list[str]:
    names = [item for bound in op.inputs.values() for item in bound if isinstance(item, str)]
    for block in op.blocks:
        names += block.outputs
        names += [name for inner in block.operations for name in _read_names(inner)]
    return names


def _match_group_norm(graph: _Graph, anchor: Operation) -> tuple[Operation, list[Operation]] | None:
    """Match from the division on: it is the one operation no other normalization here has."""
    if anchor.type != "real_div":
        return None
    centred = graph.made_by(anchor.inputs["x"][0], "sub", uses=2)
    root = graph.made_by(anchor.inputs["y"][0], "sqrt")
    shifted = graph.made_by(root.inputs["x"][0], "add") if root else None
    if centred is None or root is None or shifted is None:
        return None
    epsilon = graph.constant(shifted.inputs["y"][0])
    variance = graph.made_by(shifted.inputs["x"][0], "reduce_mean")
    square = graph.made_by(variance.inputs["x"][0], "square") if variance else None
    mean = graph.made_by(centred.inputs["y"][0], "reduce_mean")
    grouped = graph.made_by(centred.inputs["x"][0], "reshape", uses=2)
    ungrouped = graph.only_reader(anchor)
    if variance is None or square is None or mean is None or grouped is None or ungrouped is None or epsilon is None:
        return None
    shape, result = graph.shape(grouped.outputs[0].name), graph.shape(ungrouped.outputs[0].name)
    chained = (
        ungrouped.type == "reshape"
        and square.inputs["x"][0] == centred.outputs[0].name
        and mean.inputs["x"][0] == grouped.outputs[0].name
    )
    if not chained or shape is None or result is None or len(result) < 3 or epsilon.size != 1:
        return None
    over = tuple(range(2, len(shape)))
    if result[:2] != (shape[0], shape[1] * shape[2]) or any(_axes(graph, op) != over for op in (variance, mean)):
        return None
    gone = [grouped, mean, centred, square, variance, shifted, root, anchor, ungrouped]
    inputs: dict[str, tuple[Ref, ...]] = {
        "x": grouped.inputs["x"],
        "groups": (_literal("groups", np.int32(shape[1])),),
        "shape": (_literal("shape", np.array(result, np.int32)),),
        "epsilon": (_literal("epsilon", np.float32(epsilon.reshape(()))),),
    }
    last = ungrouped
    affine = _affine(graph, ungrouped)
    if affine is not None:
        last, inputs["weight"], inputs["bias"] = affine
        gone.append(last)
    return Operation("glassine_group_norm", last.name, inputs, last.outputs), gone


def _axes(graph: _Graph, reduction: Operation) -> tuple[int, ...] | None:
    axes, keep = graph.constant(reduction.inputs["axes"][0]), graph.constant(reduction.inputs["keep_dims"][0])
    rank = len(graph.shape(reduction.outputs[0].name) or ())
    if axes is None or keep is None or not bool(keep):
        return None
    return tuple(sorted(int(axis) % rank for axis in axes.reshape(-1)))


def _affine(graph: _Graph, op: Operation) -> tuple[Operation, tuple[Ref, ...], tuple[Ref, ...]] | None:
    """Return a batch norm behind `op` as (operation, weight, bias)."""
    norm = graph.only_reader(op)
    if norm is None or norm.type != "batch_norm":
        return None
    given = {key: graph.constant(bound[0]) for key, bound in norm.inputs.items() if key != "x"}
    if any(value is None for value in given.values()):
        return None
    held = {key: value.astype(np.float32) for key, value in given.items() if value is not None}
    weight = held.get("gamma", np.float32(1)) / np.sqrt(held["variance"] + held["epsilon"])
    bias = held.get("beta", np.float32(0)) - held["mean"] * weight
    return norm, (_literal("weight", weight),), (_literal("bias", np.broadcast_to(bias, weight.shape).copy()),)


def _literal(name: str, value: NDArray[Any] | np.generic) -> Constant:
    array = np.asarray(value)
    return Constant(name, ValueType("tensor", array.dtype.name, array.shape), array)


def _match_attention(graph: _Graph, anchor: Operation) -> tuple[Operation, list[Operation]] | None:
    if anchor.type != "softmax":
        return None
    after = graph.only_reader(anchor)
    gone = []
    mask: Ref | None = None
    scores: Ref = anchor.inputs["x"][0]
    masked = graph.made_by(scores, "add")
    if masked is not None:
        scores, mask = masked.inputs["x"][0], masked.inputs["y"][0]
        gone.append(masked)
    scale = np.float32(1)
    scaled = graph.made_by(scores, "mul")
    if scaled is not None:
        factor = graph.constant(scaled.inputs["y"][0])
        if factor is None or factor.size != 1:
            return None
        scale = np.float32(factor.reshape(()))
        scores = scaled.inputs["x"][0]
        gone.append(scaled)
    product = graph.made_by(scores, "matmul", "einsum")
    if product is None or after is None or after.type != product.type:
        return None
    axis = graph.constant(anchor.inputs["axis"][0])
    split = product.type == "einsum"
    operands = (_einsums if split else _matmuls)(graph, product, after, anchor, axis)
    if operands is None or (split and mask is not None):
        return None
    inputs = {**operands, "scale": (_literal("scale", scale),)}
    if mask is not None:
        inputs["mask"] = (mask,)
    kind = "glassine_split_attention" if split else "glassine_attention"
    return Operation(kind, after.name, inputs, after.outputs), [*gone, product, anchor, after]


def _matmuls(
    graph: _Graph, product: Operation, after: Operation, softmax: Operation, axis: NDArray[Any] | None
) -> Mapping[str, tuple[Ref, ...]] | None:
    """Two matmuls with the softmax over their shared axis; `transposed` operands are (.., d, tokens)."""
    shape = graph.shape(softmax.outputs[0].name)
    if axis is None or shape is None or len(shape) < 3 or int(axis) % len(shape) != len(shape) - 1:
        return None
    flags = [_flag(graph, op, key) for op in (product, after) for key in ("transpose_x", "transpose_y")]
    if None in flags:
        return None
    q_turned, k_straight = flags[0], not flags[1]
    weights = softmax.outputs[0].name
    if after.inputs["x"][0] == weights and not flags[2]:
        value, v_turned, turned = after.inputs["y"][0], flags[3], False
    elif after.inputs["y"][0] == weights and flags[3]:
        # v weights^T = (weights v^T)^T: everything is transposed.
        value, v_turned, turned = after.inputs["x"][0], not flags[2], True
    else:
        return None
    turns = np.array([bool(q_turned), bool(k_straight), bool(v_turned), turned])
    return {
        "query": product.inputs["x"],
        "key": product.inputs["y"],
        "value": (value,),
        "transposed": (_literal("transposed", turns),),
    }


def _flag(graph: _Graph, op: Operation, key: str) -> bool | None:
    if key not in op.inputs:
        return False
    value = graph.constant(op.inputs[key][0])
    return None if value is None else bool(value)


def _einsums(
    graph: _Graph, product: Operation, after: Operation, softmax: Operation, axis: NDArray[Any] | None
) -> Mapping[str, tuple[Ref, ...]] | None:
    """einsum(k, q) -> softmax over keys -> einsum(v, weights), operands (B, tokens or d, 1, d or tokens)."""
    shape = graph.shape(softmax.outputs[0].name)
    if axis is None or shape is None or len(shape) != 4 or shape[2] != 1 or int(axis) % 4 != 1:
        return None
    equations = [graph.constant(op.inputs["equation"][0]) for op in (product, after)]
    if any(equation is None or str(equation) != "nchw,nwhu->nchu" for equation in equations):
        return None
    (key, query), (value, weights) = product.inputs["values"], after.inputs["values"]
    if weights != softmax.outputs[0].name:
        return None
    return {"query": (query,), "key": (key,), "value": (value,)}
