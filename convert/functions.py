"""Several programs over the same weights -> one package with a function for each (macOS 15).

A model for several sizes is one file then, where packages of their own are several whose weight files are hard links of
each other: an app that copies or ships them does not know that.
"""

from __future__ import annotations

from collections.abc import Mapping

from glassine.convert.chunks import move
from glassine.convert.program import Lowered, Plan

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
        move(function.block_specializations[function.opset].operations, records, plan)
    first = next(iter(programs.values()))
    return Lowered(
        model=joined.SerializeToString(deterministic=True),
        plan=plan,
        inputs=first.inputs,
        outputs=first.outputs,
        parameters=first.parameters,
    )
