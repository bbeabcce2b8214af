"""What coremltools makes of a program of ours: the same operations by its builder, its exporter's message of them."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder
from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor, types_to_proto_primitive
from coremltools.converters.mil.backend.mil.load import (
    CoreMLProtoExporter,
    MILProtoExporter,
    create_immediate_value,
    should_use_weight_file,
)
from coremltools.converters.mil.mil import Function, types
from coremltools.converters.mil.mil import Program as TheirProgram
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
from coremltools.proto import Model_pb2

from glassine.convert.program import Plan, StandIn
from glassine.models.mil import IOS18, Program, Var

BUILTIN = {"float16": types.fp16, "float32": types.fp32}


def rebuilt(program: Program) -> TheirProgram:
    """Give coremltools' builder every operation of a program; what it infers has to be what we said.

    The builder adds what an operation should have and has not been given, and refuses what it does not know.
    """
    inputs = {name: Builder.placeholder(var.shape, dtype=BUILTIN[var.dtype]) for name, var in program.inputs.items()}
    theirs = TheirProgram()
    with Function(inputs, opset_version=ct.target.iOS18 if program.version == IOS18 else ct.target.iOS16) as function:
        known: dict[Var, Any] = {var: function.inputs[name] for name, var in program.inputs.items()}
        for op in program.operations:
            if op.op_type == "const":
                (var,) = op.outputs
                number = isinstance(var.val, np.ndarray) and not var.shape
                known[var] = Builder.const(val=var.val[()] if number else var.val, name=op.name)
                continue
            given = {
                key: [known[one] for one in value] if isinstance(value, list) else known[value]
                for key, value in op.inputs.items()
            }
            results = getattr(Builder, op.op_type)(**given, name=op.name)
            results = results if isinstance(results, (list, tuple)) else [results]
            for var, result in zip(op.outputs, results, strict=True):
                inferred = (types.builtin_to_string(result.dtype), tuple(map(int, result.shape)))
                assert inferred == (short(var.dtype), var.shape), (op.name, inferred, var)
                known[var] = result
        function.set_outputs([known[var] for var in program.outputs])
    theirs.add_function("main", function)
    return theirs


def short(dtype: str) -> str:
    """coremltools' name of a dtype."""
    return {"float16": "fp16", "float32": "fp32"}.get(dtype, dtype)


def exported(program: Program) -> tuple[Any, Plan]:
    """The model that coremltools makes of a program, its weights placed in a plan as ours are."""
    theirs, plan, version = rebuilt(program), Plan(), program.version

    class Exporter(MILProtoExporter):
        def get_milproto_value(self, var: Any) -> Any:
            value = var.val
            if isinstance(value, StandIn):
                offset = plan.place(value.weight, value.shape, value.dtype.name)
            elif isinstance(value, np.ndarray) and should_use_weight_file(value, version):
                offset = plan.place(value.tobytes(), value.shape, value.dtype.name)
            else:
                return create_immediate_value(var)
            primitive = types_to_proto_primitive(var.sym_type.get_primitive())
            return create_file_value_tensor("@model_path/weights/weight.bin", offset, value.shape, primitive)

    for name in ("common::dedup_op_and_var_names", "mil_backend::sanitize_name_strings"):
        PASS_REGISTRY[name](theirs)
    message = Exporter(theirs, "", version).export()
    made = CoreMLProtoExporter(theirs, message, None, None, None, "mlprogram", "milinternal", version).export(version)
    made.description.ClearField("metadata")
    return made, plan


def read(model: bytes) -> Any:
    """The message of a model."""
    return Model_pb2.Model.FromString(model)
