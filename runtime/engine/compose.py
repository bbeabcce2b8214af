"""Engines made of engines: a network cut into packages that run one after the other, and packages with other names.

Chain    UnetChunk1 -> UnetChunk2: each gets, by name, what the caller gave and what those before it returned
Renamed  a package that calls or lays out its inputs and outputs otherwise than Glassine does
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError
from glassine.runtime.engine.contract import Engine, Realised, TensorSpec

Arrays = dict[str, NDArray[np.generic]]


class Chain:
    """Packages that together are one network; the last one's outputs are the network's."""

    def __init__(self, stages: Sequence[Engine]) -> None:
        self._stages = tuple(stages)
        inputs: dict[str, TensorSpec] = {}
        made: set[str] = set()
        for stage in self._stages:
            inputs.update({name: spec for name, spec in stage.inputs.items() if name not in made})
            made |= set(stage.outputs)
        self.inputs: Mapping[str, TensorSpec] = inputs
        self.outputs: Mapping[str, TensorSpec] = self._stages[-1].outputs
        realised = [stage.realised for stage in self._stages]
        self.realised = Realised(
            engine=realised[0].engine,
            device=" + ".join(dict.fromkeys(one.device for one in realised)),
            precision=realised[0].precision,
            load_seconds=sum(one.load_seconds for one in realised),
            notices=tuple(notice for one in realised for notice in one.notices),
        )

    def predict(self, **arrays: NDArray[np.generic]) -> Arrays:
        """Run the packages in order.

        Raises:
            EngineError: an input is missing, unknown or of another shape.
        """
        unknown = sorted(set(arrays) - set(self.inputs))
        if unknown:
            raise EngineError(f"the network has no inputs {unknown}, only {sorted(self.inputs)}")
        known: Arrays = dict(arrays)
        results: Arrays = {}
        for stage in self._stages:
            results = stage.predict(**{name: known[name] for name in stage.inputs if name in known})
            known.update(results)
        return results

    def close(self) -> None:
        """Close every package."""
        for stage in self._stages:
            stage.close()


class Renamed:
    """A package whose names and layouts are not Glassine's.

    Args:
        inputs, outputs: Glassine's name -> the package's, where they differ. Layouts follow from the package's own
            shapes: an input of the same size is reshaped, a context (B, D, 1, T) becomes (B, T, D) where the package
            has three axes, numbers become integers where it wants those, and of several equal ones the first is
            given where there is room for one.
        zeros: the package's inputs that get zeros, such as the residuals of a ControlNet that is not there.
    """

    def __init__(
        self, engine: Engine, inputs: Mapping[str, str], outputs: Mapping[str, str], zeros: Sequence[str] = ()
    ) -> None:
        self._engine, self._inputs = engine, inputs
        self._zeros = {name: np.zeros(engine.inputs[name].shape, np.float32) for name in zeros}
        self._outputs = {theirs: ours for ours, theirs in outputs.items()}
        names = {theirs: ours for ours, theirs in inputs.items()}
        self.inputs: Mapping[str, TensorSpec] = {
            names.get(name, name): spec for name, spec in engine.inputs.items() if name not in zeros
        }
        self.outputs: Mapping[str, TensorSpec] = {
            self._outputs.get(name, name): spec for name, spec in engine.outputs.items()
        }
        self.realised = engine.realised

    def predict(self, **arrays: NDArray[np.generic]) -> Arrays:
        """Run the package with its own names and layouts."""
        given: Arrays = dict(self._zeros)
        for name, array in arrays.items():
            given[self._inputs.get(name, name)] = _laid_out(array, self.inputs.get(name))
        return {self._outputs.get(name, name): array for name, array in self._engine.predict(**given).items()}

    def close(self) -> None:
        """Close the package."""
        self._engine.close()


def _laid_out(array: NDArray[np.generic], spec: TensorSpec | None) -> NDArray[np.generic]:
    """Bring an array to the layout a package declares, if that is the same numbers in another order or type."""
    if spec is None:
        return array
    if array.ndim == 4 and len(spec.shape) == 3 and array.shape[2] == 1:
        array = array[:, :, 0].transpose(0, 2, 1)
    elif spec.shape == (1,):
        array = array[:1]  # one time for all rows
    elif array.shape != spec.shape and array.size == int(np.prod(spec.shape)):
        array = array.reshape(spec.shape)
    return np.rint(array).astype(np.int32) if spec.dtype.startswith("int") else array
