"""One lowered network -> several that run one after the other, so that no weight file is too big for its hardware.

The Neural Engine takes weight files of less than 2 GiB; a UNet of SDXL in fp16 has 5.1 GB. A cut goes through the list
of operations of the written program: what one side computes and the other reads becomes an output here and an input
there, in its own dtype and under its own name, as in Apple's UnetChunk1 and UnetChunk2. Everything can be cut anywhere;
cuts are put where few bytes cross them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.convert.program import ALIGNMENT, Description, Lowered, Plan, Record, Source, lower, write_constant
from glassine.errors import ConversionError
from glassine.models.mil import Operation, Program, Var

LIMIT = 2**31 - 1  # bytes of a weight file that the Neural Engine's compiler accepts
MOST = 8
_SIZES = {"float16": 2, "float32": 4, "int32": 4}  # bytes of what a package can hand on
_NEVER = 1 << 60  # the price of a cut through something that no package can hand on
_HANDED_ON = "Handed from one chunk of the network to a later one."


def cut(lowered: Lowered, count: int | None = None, between: Sequence[int] = ()) -> list[Lowered]:
    """Cut a network into packages.

    Args:
        lowered: a whole network.
        count: of packages, 1 leaves it whole; None: the fewest whose weight files stay below 2 GiB.
        between: bytes of weights in front of each cut, where another network with these weights was cut (`cuts_of`), so
            that their packages can share files; `count` is then not asked.

    Raises:
        ConversionError: it cannot be cut into so many.
    """
    if count == 1 or (count is None and not between and lowered.plan.file_size <= LIMIT):
        return [lowered]
    graph = _Graph(lowered)
    total = int(graph.weight_bytes.sum())
    cuts: list[int] | None
    if between:
        cuts = graph.between(between)
    elif count is None:
        if total + ALIGNMENT <= LIMIT:
            return [lowered]
        count, limit = min(MOST, -(-total // (LIMIT - ALIGNMENT))), LIMIT - ALIGNMENT
        while (cuts := graph.cheapest(count, limit)) is None and count < MOST:
            count += 1
    else:
        cuts = graph.cheapest(count, int(1.2 * total / count))
    if cuts is None:
        raise ConversionError(f"a network of {total / 1e9:.2f} GB cannot be cut into {count} packages; choose fewer")
    ends = [*cuts, len(graph.work)]
    return [graph.piece(start, end) for start, end in zip([0, *cuts], ends, strict=True)]


def cuts_of(pieces: Sequence[Lowered]) -> list[int]:
    """Bytes of weights in front of each cut that made `pieces`; literals, which may be in several, aside."""
    sizes = [sum(r.nbytes for r in piece.plan.records if not isinstance(r.content, bytes)) for piece in pieces]
    return list(itertools.accumulate(sizes))[:-1]


@dataclass(frozen=True)
class _Graph:
    """A program as its operations: `work` computes, constants go wherever they are read."""

    lowered: Lowered

    @property
    def _source(self) -> Source:
        assert self.lowered.source is not None  # only what has just been written is cut
        return self.lowered.source

    @cached_property
    def work(self) -> list[Operation]:
        """The operations that compute."""
        return [op for op in self._source.program.operations if op.op_type != "const"]

    @cached_property
    def _records(self) -> dict[Operation, list[Record]]:
        """Of every constant, the records of weight.bin that hold it."""
        by_offset = {record.offset: record for record in self.lowered.plan.records}
        found = {}
        for op in self._source.program.operations:
            if op.op_type != "const":
                continue
            offsets: list[int] = []

            def place(*what: Any, offsets: list[int] = offsets) -> int:
                offsets.append(self.lowered.plan.place(*what))  # where it has been placed already
                return offsets[-1]

            write_constant(op, self._source.program.version, place, self._source.palette)
            if not by_offset.keys() >= set(offsets):
                raise ConversionError("a network whose weights lie in another's file cannot be cut")
            found[op] = [by_offset[offset] for offset in sorted(offsets)]
        return found

    @cached_property
    def weight_bytes(self) -> NDArray[np.int64]:
        """Bytes of weight.bin that each working operation is the first to need."""
        return np.array([sum(r.nbytes + 2 * ALIGNMENT for r in records) for records in self._first_needed], np.int64)

    @cached_property
    def _first_needed(self) -> list[list[Record]]:
        """The records that each working operation is the first to need."""
        seen: set[int] = set()
        found: list[list[Record]] = [[] for _ in self.work]
        for i, op in enumerate(self.work):
            for record in (record for var in op.reads if var.op in self._records for record in self._records[var.op]):
                if record.offset not in seen:
                    seen.add(record.offset)
                    found[i].append(record)
        return found

    @cached_property
    def _made(self) -> dict[Var, int]:
        """Value -> position in `work` of what makes it."""
        return {var: i for i, op in enumerate(self.work) for var in op.outputs}

    @cached_property
    def _last_read(self) -> dict[Var, int]:
        """Value -> the last position in `work` that reads it; what the program returns is read at its end."""
        last = {var: i for i, op in enumerate(self.work) for var in op.reads}
        return last | {var: len(self.work) for var in self._source.program.outputs}

    @cached_property
    def crossing(self) -> NDArray[np.int64]:
        """Bytes that would cross a cut in front of each position of `work`."""
        change = np.zeros(len(self.work) + 2, np.int64)
        for var, position in self._made.items():
            nbytes = math.prod(var.shape) * _SIZES[var.dtype] if var.shape and var.dtype in _SIZES else _NEVER
            change[position + 1] += nbytes
            change[self._last_read.get(var, position) + 1] -= nbytes
        return np.cumsum(change)[: len(self.work) + 1]

    def cheapest(self, count: int, limit: int) -> list[int] | None:
        """The `count` - 1 positions of the cheapest cuts with no more than `limit` bytes of weights in a piece."""
        ends = np.concatenate([[0], np.cumsum(self.weight_bytes)])
        price = self.crossing.astype(np.float64)
        best = np.where(ends <= limit, 0.0, np.inf)  # of one piece that ends here; its own end is paid by the next
        earlier: list[NDArray[np.int64]] = []
        for _ in range(count - 1):
            paid = best + price
            paid[0] = np.inf
            starts = np.searchsorted(ends, ends - limit)
            choice = np.array(
                [start + int(np.argmin(paid[start:i])) if start < i else -1 for i, start in enumerate(starts)]
            )
            best = np.where(choice >= 0, paid[choice], np.inf)
            earlier.append(choice)
        if not best[-1] < _NEVER:
            return None
        cuts: list[int] = []
        at = len(self.work)
        for choice in reversed(earlier):
            at = int(choice[at])
            cuts.insert(0, at)
        return cuts

    def between(self, before: Sequence[int]) -> list[int] | None:
        """The cheapest positions of cuts with so many bytes of weights in front of them; None where there are none."""
        sizes = [sum(r.nbytes for r in records if not isinstance(r.content, bytes)) for records in self._first_needed]
        ends = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))])
        cuts = []
        for nbytes in before:
            (places,) = np.nonzero(ends == nbytes)
            if not len(places):
                return None
            cuts.append(int(places[np.argmin(self.crossing[places])]))
        return cuts

    def piece(self, start: int, end: int) -> Lowered:
        """The operations [start, end) of `work` as a package of their own."""
        program, own = self._source.program, self.work[start:end]
        reads = dict.fromkeys(var for op in own for var in op.reads)
        given = [var for var in program.inputs.values() if var in reads]
        given += [var for var in reads if var in self._made and self._made[var] < start]
        piece = Program({var.name: var for var in given}, program.version)
        kept = {*own, *(var.op for var in reads if var.op in self._records)}
        piece.operations = [op for op in program.operations if op in kept]
        piece.outputs = [var for op in own for var in op.outputs if self._last_read.get(var, 0) >= end]

        plan = Plan()
        for record in (record for op in piece.operations for record in self._records.get(op, ())):
            plan.place(record.content, record.shape, record.dtype)
        meanings = {var.name: _HANDED_ON for var in (*piece.inputs.values(), *piece.outputs)}
        whole = (*program.inputs, *(var.name for var in program.outputs))
        meanings |= {name: self._source.meanings.get(name, "") for name in whole}
        return lower(piece, Description(features=meanings), plan, self._source.palette)
