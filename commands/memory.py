"""What a picture takes in memory: `inspect` says it, and `generate` warns before it draws where that is not free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassine.commands.options import say

if TYPE_CHECKING:
    from glassine.runtime.engine.portable.summary import Summary
    from glassine.runtime.inputs import Inputs
    from glassine.runtime.pipeline import Pipeline
    from glassine.runtime.request import Request


def memory_of(model: Path, summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Bytes that a picture from a prompt takes in each engine, and between the operations of each part."""
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.inputs import Inputs
    from glassine.runtime.pipeline import Pipeline
    from glassine.runtime.request import Request

    found: dict[str, Any] = {}
    for engine in ("coreml", "portable"):
        with Pipeline.load(model, EngineOptions(engine=engine)) as pipe:
            needed = pipe.needs(Request(), Inputs())
            found[engine] = pipe.memory(needed)._asdict()
    return {**found, "activations": {role: summary.activations for role, summary in summaries.items()}}


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """The same for people."""
    stored, portable = memory["coreml"], memory["portable"]
    role = max(memory["activations"], key=memory["activations"].__getitem__)
    return [
        f"\nmemory for a picture: weights {_size(stored['all'])}, {_size(stored['low'])} with --low-memory; between "
        f"operations up to {_size(memory['activations'][role])} ({role}), an estimate",
        f"  in the portable engine, which computes in float32: weights {_size(portable['all'])}, "
        f"{_size(portable['low'])} with --low-memory",
    ]


def warn_of_memory(pipe: Pipeline, request: Request, inputs: Inputs, *, low_memory: bool) -> None:
    """Say so where less memory is free than the weights of a picture's parts take."""
    from glassine.runtime.machine import available_memory

    free = available_memory()
    takes = pipe.memory(pipe.needs(request, inputs))
    if free is None or free >= (takes.low if low_memory else takes.all):
        return
    said = f"note: {_size(free)} of memory are free, and the weights take {_size(takes.all)}"
    if low_memory or free < takes.low:
        say(f"{said}, {_size(takes.low)} with --low-memory: this will swap; close programs, or convert with --palette")
    else:
        say(f"{said}: this may swap; --low-memory takes {_size(takes.low)}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
