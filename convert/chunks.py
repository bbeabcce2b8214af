"""One lowered network -> several that run one after the other, so that no weight file is too big for its hardware.

The Neural Engine takes weight files of less than 2 GiB; a UNet of SDXL in fp16 has 5.1 GB. A cut goes through the list
of operations of the written program: what one side computes and the other reads becomes an output here and an input
there, in its own dtype and under its own name, as in Apple's UnetChunk1 and UnetChunk2. Everything can be cut anywhere;
cuts are put where few bytes cross them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassine.convert.program import ALIGNMENT, Lowered, Plan, Record, Tensors
from glassine.errors import ConversionError

LIMIT = 2**31 - 1  # bytes of a weight file that the Neural Engine's compiler accepts
MOST = 8
_ARRAYS = {10: ("float16", 2, 65552), 11: ("float32", 4, 65568), 23: ("int32", 4, 131104)}  # MIL dtype -> feature dtype
_NEVER = 1 << 60  # the price of a cut through something that no package can hand on


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
    """A program as its operations: `work` computes, the others are constants and go wherever they are read."""

    lowered: Lowered

    @cached_property
    def _model(self) -> Any:
        from coremltools.proto import Model_pb2

        return Model_pb2.Model.FromString(self.lowered.model)

    @cached_property
    def _function(self) -> Any:
        return self._model.mlProgram.functions["main"]

    @cached_property
    def _block(self) -> Any:
        return self._function.block_specializations[self._function.opset]

    @cached_property
    def _constants(self) -> dict[str, int]:
        """Name -> index of the operation, of everything that is known before the program runs."""
        return {
            op.outputs[0].name: i
            for i, op in enumerate(self._block.operations)
            if op.type == "const" or op.type.startswith("constexpr_")
        }

    @cached_property
    def work(self) -> list[int]:
        """Indices of the operations that compute."""
        constants = set(self._constants.values())
        return [i for i in range(len(self._block.operations)) if i not in constants]

    @cached_property
    def _reads(self) -> list[list[str]]:
        """Of every operation, the names that it reads."""
        return [
            [
                binding.name
                for argument in operation.inputs.values()
                for binding in argument.arguments
                if binding.WhichOneof("binding") == "name"
            ]
            for operation in self._block.operations
        ]

    @cached_property
    def _records(self) -> dict[int, Record]:
        return {record.offset: record for record in self.lowered.plan.records}

    def _needed(self, index: int) -> Iterator[int]:
        """The constants that an operation reads, and those that they read."""
        for name in self._reads[index]:
            if name in self._constants:
                yield from self._needed(self._constants[name])
                yield self._constants[name]

    @cached_property
    def weight_bytes(self) -> NDArray[np.int64]:
        """Bytes of weight.bin that each working operation is the first to need."""
        return np.array([sum(r.nbytes + 2 * ALIGNMENT for r in records) for records in self._first_needed], np.int64)

    @cached_property
    def _first_needed(self) -> list[list[Record]]:
        """The records that each working operation is the first to need."""
        seen: set[int] = set()
        operations = self._block.operations
        found: list[list[Record]] = [[] for _ in self.work]
        for i, index in enumerate(self.work):
            for constant in self._needed(index):
                for value in _stored(operations[constant]):
                    offset = value.blobFileValue.offset
                    if offset not in self._records:
                        raise ConversionError("a network whose weights lie in another's file cannot be cut")
                    if offset not in seen:
                        seen.add(offset)
                        found[i].append(self._records[offset])
        return found

    @cached_property
    def _made(self) -> dict[str, tuple[int, Any]]:
        """Name -> position in `work` of what makes it, and its type."""
        operations = self._block.operations
        return {out.name: (i, out.type) for i, index in enumerate(self.work) for out in operations[index].outputs}

    @cached_property
    def _last_read(self) -> dict[str, int]:
        """Name -> the last position in `work` that reads it; what the program returns is read at its end."""
        last = {}
        for i, index in enumerate(self.work):
            for name in self._reads[index]:
                last[name] = i
        return last | {name: len(self.work) for name in self._block.outputs}

    @cached_property
    def crossing(self) -> NDArray[np.int64]:
        """Bytes that would cross a cut in front of each position of `work`."""
        change = np.zeros(len(self.work) + 2, np.int64)
        for name, (position, type_) in self._made.items():
            nbytes = _nbytes(type_)
            change[position + 1] += nbytes
            change[self._last_read.get(name, position) + 1] -= nbytes
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
        from coremltools.proto import MIL_pb2, Model_pb2

        operations = self._block.operations
        own = self.work[start:end]
        reads = dict.fromkeys(name for index in own for name in self._reads[index])
        given = [feature for feature in self._function.inputs if feature.name in reads]
        given += [self._named(name) for name in reads if name in self._made and self._made[name][0] < start]
        made = [name for name, (position, _) in self._made.items() if start <= position < end]
        returned = [name for name in made if self._last_read.get(name, 0) >= end]
        kept = sorted({constant for index in own for constant in self._needed(index)} | set(own))

        program = MIL_pb2.Program(version=self._model.mlProgram.version)
        function = program.functions["main"]
        function.opset = self._function.opset
        function.inputs.extend(given)
        block = function.block_specializations[function.opset]
        block.outputs.extend(returned)
        block.operations.extend(operations[index] for index in kept)
        plan = Plan()
        move(block.operations, self._records, plan)

        model = Model_pb2.Model(specificationVersion=self._model.specificationVersion)
        said = {feature.name: feature.shortDescription for feature in self._whole_features()}
        for features, variables in (
            (model.description.input, given),
            (model.description.output, [self._named(name) for name in returned]),
        ):
            for variable in variables:
                words = said.get(variable.name, "Handed from one chunk of the network to a later one.")
                feature = features.add(name=variable.name, shortDescription=words)
                feature.type.multiArrayType.shape.extend(_shape(variable.type))
                feature.type.multiArrayType.dataType = _ARRAYS[variable.type.tensorType.dataType][2]
        model.mlProgram.CopyFrom(program)
        return Lowered(
            model=model.SerializeToString(deterministic=True),
            plan=plan,
            inputs=_tensors(given),
            outputs=_tensors([self._named(name) for name in returned]),
            parameters=plan.parameters,
        )

    def _whole_features(self) -> list[Any]:
        return [*self._model.description.input, *self._model.description.output]

    def _named(self, name: str) -> Any:
        from coremltools.proto import MIL_pb2

        return MIL_pb2.NamedValueType(name=name, type=self._made[name][1])


def move(operations: Sequence[Any], records: Mapping[int, Record], plan: Plan) -> None:
    """Give what the operations store its places in another plan; `records` are those of the old one by offset."""
    for operation in operations:
        # Protobuf's maps have no order, and the same conversion makes the same bytes.
        for value in sorted(_stored(operation), key=lambda value: value.blobFileValue.offset):
            offset = value.blobFileValue.offset
            if offset not in records:
                raise ConversionError("a network whose weights lie in another's file cannot be cut or joined")
            record = records[offset]
            value.blobFileValue.offset = plan.place(record.content, record.shape, record.dtype)


def _stored(operation: Any) -> Iterator[Any]:
    """The values of an operation that lie in weight.bin."""
    for value in operation.attributes.values():
        if value.WhichOneof("value") == "blobFileValue":
            yield value
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value" and binding.value.WhichOneof("value") == "blobFileValue":
                yield binding.value


def _shape(type_: Any) -> tuple[int, ...]:
    return tuple(int(dimension.constant.size) for dimension in type_.tensorType.dimensions)


def _nbytes(type_: Any) -> int:
    """What it costs to hand a value on; scalars and other types than Core ML's arrays cannot be."""
    dtype, shape = type_.tensorType.dataType, _shape(type_)
    return math.prod(shape) * _ARRAYS[dtype][1] if dtype in _ARRAYS and shape else _NEVER


def _tensors(variables: Sequence[Any]) -> Tensors:
    return {v.name: (_shape(v.type), _ARRAYS[v.type.tensorType.dataType][0]) for v in variables}
