"""What `inspect --placement` says: which operations run where, and why some are not on the Neural Engine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glassine.commands.options import give, options

if TYPE_CHECKING:
    from glassine.runtime.engine.contract import ComputeUnits
    from glassine.runtime.engine.placement import Placement

placement_options = options(
    click.option("--placement", is_flag=True, help="Say which operations run where, and why not elsewhere."),
    click.option("--units", type=click.Choice(["all", "cpu_and_ne", "cpu_and_gpu", "cpu_only"]), default="all",
                 show_default=True, help="With --placement: the compute units that Core ML may use."),
)  # fmt: skip
_WORDS = {"neural_engine": "Neural Engine", "gpu": "GPU", "cpu": "CPU"}
_SHOWN = 12  # operations that are named for one reason


def show_placement(
    packages: Mapping[str, Path], functions: Mapping[str, str | None], units: ComputeUnits, as_json: bool
) -> None:
    """Print the placement of every package, role -> package."""
    from glassine.runtime.engine.placement import placement

    placements = {role: placement(package, units, functions.get(role)) for role, package in packages.items()}
    parts = {role: dataclasses.asdict(found) for role, found in placements.items()}
    lines = [line for role, found in placements.items() for line in _lines(f"{role} ({packages[role].name})", found)]
    if any(found.source == "prediction" for found in placements.values()):
        lines.append("\nA prediction from rules, not from Core ML: run it on a Mac for Core ML's own plan.")
    give({"units": units, "parts": parts}, "\n".join(lines), as_json)


def _lines(name: str, found: Placement) -> list[str]:
    """One package: the units' shares, then every reason with the operations it holds for."""
    from glassine.runtime.engine.placement import UNITS

    used = [unit for unit in UNITS if found.count(unit)]
    shares = ", ".join(f"{_WORDS[unit]} {found.count(unit)} ({found.share(unit):.1%} of the cost)" for unit in used)
    lines = [f"\n{name}, {found.source}: {shares}"]
    left = [each for each in found.operations if each.reason]
    for reason, count in Counter(each.reason.split(":")[0] for each in left).most_common():
        same = [each for each in left if each.reason.split(":")[0] == reason]
        units = " and ".join(_WORDS[unit] for unit in UNITS if any(each.unit == unit for each in same))
        counted = f"{count} operation{'s' if count > 1 else ''}"
        lines.append(f"  {units}, {counted}, {sum(each.cost for each in same):.1%} of the cost: {reason}")
        same.sort(key=lambda each: -each.cost)
        lines += [f"    {each.type:28} {each.name}" for each in same[:_SHOWN]]
        lines += [f"    and {len(same) - _SHOWN} more"] if len(same) > _SHOWN else []
    return lines
