"""Engines run one .mlpackage: NumPy arrays in, NumPy arrays out, the same contract everywhere."""

from glassine.runtime.engine.contract import Engine, EngineOptions, Realised, TensorSpec, open_engine

__all__ = ["Engine", "EngineOptions", "Realised", "TensorSpec", "open_engine"]
