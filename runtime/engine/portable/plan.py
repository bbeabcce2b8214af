"""What the stand-in answers when coremltools asks for a compute plan or a model's structure; for tests.

It knows no hardware: an operation is on the first unit that may be used, or where `ELSEWHERE` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from glassine.runtime.engine.portable.program import Block, Program, read_package

Device = Literal["neural_engine", "gpu", "cpu"]

ELSEWHERE: dict[str, Device] = {}  # name of an operation's result -> where the stand-in says that it runs
_FIRST: dict[str, Device] = {"ALL": "neural_engine", "CPU_AND_NE": "neural_engine", "CPU_AND_GPU": "gpu"}


class CPU:
    """The CPU, as coremltools holds it."""


class GPU:
    """The GPU."""


class NeuralEngine:
    """The Neural Engine."""

    def get_total_core_count(self) -> int:
        """All of Apple silicon but the Ultras have as many."""
        return 16


class PlanProxy:
    """Where every operation of a model runs, in the form in which coremltools asks."""

    def __init__(self, path: str, units: str) -> None:
        self.model_structure = structure(path)
        self._first: Device = _FIRST.get(units, "cpu")
        (program,) = [self.model_structure.program]
        self._counted = sum(
            self._runs(operation) for function in program.functions.values() for operation in function.block.operations
        )

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        """Where one operation runs; None for constants, as Core ML says."""
        from coremltools.models import compute_device, compute_plan

        if not self._runs(operation):
            return None
        made = {
            "neural_engine": lambda: compute_device.MLNeuralEngineComputeDevice(NeuralEngine()),
            "gpu": lambda: compute_device.MLGPUComputeDevice(GPU()),
            "cpu": lambda: compute_device.MLCPUComputeDevice(CPU()),
        }
        device = made[ELSEWHERE.get(operation.outputs[0].name, self._first)]()
        return compute_plan.MLComputePlanDeviceUsage(
            preferred_compute_device=device, supported_compute_devices=[device]
        )

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        """The same share for every operation."""
        from coremltools.models.compute_plan import MLComputePlanCost

        return MLComputePlanCost(weight=1 / self._counted) if self._runs(operation) else None

    @staticmethod
    def _runs(operation: Any) -> bool:
        return operation.operator_name != "const" and not operation.operator_name.startswith("constexpr_")


def compute_plan(path: str, units: str) -> Any:
    """Return coremltools' plan of a compiled model."""
    from coremltools.models.compute_plan import MLComputePlan

    return MLComputePlan(PlanProxy(path, units))


def structure(path: str) -> Any:
    """Return coremltools' structure of a compiled model."""
    from coremltools.models import compute_plan

    program: Program = read_package(Path(path))
    functions = {
        name: compute_plan.MLModelStructureProgramFunction(inputs=[], block=_block(function.body))
        for name, function in program.functions.items()
    }
    whole = compute_plan.MLModelStructureProgram(functions=functions)
    return compute_plan.MLModelStructure(neuralnetwork=None, program=whole, pipeline=None)


def _block(block: Block) -> Any:
    from coremltools.models import compute_plan

    def named(name: str) -> Any:
        return compute_plan.MLModelStructureProgramNamedValueType(
            name=name, type=compute_plan.MLModelStructureProgramValueType()
        )

    operations = [
        compute_plan.MLModelStructureProgramOperation(
            inputs={},
            operator_name=operation.type,
            outputs=[named(variable.name) for variable in operation.outputs],
            blocks=[_block(inner) for inner in operation.blocks],
            __proxy__=None,
        )
        for operation in block.operations
    ]
    return compute_plan.MLModelStructureProgramBlock(inputs=[], operations=operations, output_names=list(block.outputs))
