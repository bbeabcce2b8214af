"""Several programs over the same weights -> one package with a function for each (macOS 15).

A model for several sizes is one file then, where packages of their own are several whose weight files are hard links of
each other: an app that copies or ships them does not know that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glassine.convert.program import Lowered, Plan, Record
from glassine.errors import ConversionError

SPECIFICATION = 9  # the first version that has functions


def join(programs: Mapping[str, Lowered]) -> Lowered:
    """Make one package of several programs.

    Args:
        programs: function's name -> what it does, all written in the opset of macOS 15; the first is the default. What
            they store is stored once.

    Returns:
        The package; `inputs` and `outputs` are the default function's.
    """
    from coremltools.proto import Model_pb2

    plan = Plan()
    joined = Model_pb2.Model(specificationVersion=SPECIFICATION)
    for name, lowered in programs.items():
        model = Model_pb2.Model.FromString(lowered.model)
        if not joined.description.functions:
            joined.description.metadata.CopyFrom(model.description.metadata)
            joined.description.defaultFunctionName = name
            joined.mlProgram.version = model.mlProgram.version
        description = joined.description.functions.add(name=name)
        description.input.extend(model.description.input)
        description.output.extend(model.description.output)
        function = joined.mlProgram.functions[name]
        function.CopyFrom(model.mlProgram.functions["main"])
        records = {record.offset: record for record in lowered.plan.records}
        _move(function.block_specializations[function.opset].operations, records, plan)
    first = next(iter(programs.values()))
    return Lowered(
        model=joined.SerializeToString(deterministic=True),
        plan=plan,
        inputs=first.inputs,
        outputs=first.outputs,
        parameters=first.parameters,
    )


def _move(operations: Sequence[Any], records: Mapping[int, Record], plan: Plan) -> None:
    """Give what the operations store its places in another plan; `records` are those of the old one by offset."""
    for operation in operations:
        # Protobuf's maps have no order, and the same conversion makes the same bytes.
        for value in sorted(_stored(operation), key=lambda value: value.blobFileValue.offset):
            offset = value.blobFileValue.offset
            if offset not in records:
                raise ConversionError("a network whose weights lie in another's file cannot be joined")
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
