"""What `inspect` says of how `glassine tune` runs a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tuned_here(model: Path) -> dict[str, Any]:
    """The choices in force for a model here, by size and role, for the engine that draws by itself."""
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.foreign import read_model
    from glassine.runtime.pipeline import Pipeline

    found: dict[str, Any] = {}
    for size in read_model(model).manifest.sizes:
        with Pipeline.load(model, EngineOptions(), size=size) as pipe:
            parts = {role: pipe.choices.of(role, part) for role, part in pipe.manifest.parts.items()}
            used = {role: chosen for role, chosen in parts.items() if chosen.tuned is not None}
            notices = pipe.choices.notices
        if used or notices:
            found["{}x{}".format(*size)] = {
                "parts": {
                    role: {
                        "package": chosen.part.file,
                        "units": chosen.options.compute_units,
                        "device": chosen.options.device,
                        "why": chosen.tuned.why if chosen.tuned is not None else "",
                    }
                    for role, chosen in used.items()
                },
                "notices": notices,
            }
    return found


def tuned_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = []
    for size, said in found.items():
        lines.append(f"\ntuned for this machine at {size} ('glassine tune --reset' forgets it)")
        lines += [
            f"  {role}: {part['package']} on {part['units'] if part['units'] is not None else part['device']}: "
            f"{part['why']}"
            for role, part in said["parts"].items()
        ]
        lines += [f"  note: {notice}" for notice in said["notices"]]
    return lines
