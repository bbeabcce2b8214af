"""What to measure, and what takes turns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from glassine.errors import RequestError
from glassine.runtime.bench.statistics import MIN_RUNS, WHY_MIN_RUNS
from glassine.runtime.engine import EngineOptions
from glassine.runtime.engine.contract import ComputeUnits, engine_name

UNITS: dict[str, ComputeUnits] = {"ane": "cpu_and_ne", "gpu": "cpu_and_gpu", "cpu": "cpu_only", "all": "all"}
SHORT: dict[str, str] = {units: name for name, units in UNITS.items()}  # as other verbs spell units -> as this one does


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure.

    units: keys of UNITS, each a contender; for Core ML. options: engine, device and precision. size: (width, height) in
    pixels; None is the model's first. steps: of pictures; None is the model's own. runs: timed calls of every part.
    pictures: whole ones; 0 leaves them out. parts: roles; () is all. cold: load with an empty compile cache too.
    energy: with powermetrics. quality: beside the portable engine. other_batch: the same model, converted with
    another --batch, whose UNet takes turns with this one's.

    Raises:
        RequestError: too few runs, units that are none, or wishes that do not go together.
    """

    units: tuple[str, ...] = ("ane", "gpu", "all")
    options: EngineOptions = field(default_factory=EngineOptions)
    size: tuple[int, int] | None = None
    steps: int | None = None
    runs: int = 20
    pictures: int = MIN_RUNS
    warmup: int = 3
    parts: tuple[str, ...] = ()
    cold: bool = True
    energy: bool = False
    quality: bool = False
    other_batch: Path | None = None
    timeout: float = 900.0

    def __post_init__(self) -> None:
        for name, count in (("runs", self.runs), ("pictures", self.pictures)):
            if count < MIN_RUNS and not (name == "pictures" and count == 0):
                raise RequestError(f"--{name} {count}: at least {MIN_RUNS} are measured; {WHY_MIN_RUNS}")
        alone = [name for name in ("energy", "quality") if getattr(self, name) and not self.pictures]
        if alone:
            raise RequestError(f"--{alone[0]}: is about whole pictures; leave --pictures 0 out")
        if self.other_batch is not None and self.parts and "unet" not in self.parts:
            raise RequestError("--other-batch: is about the UNet; add --part unet")
        unknown = [unit for unit in self.units if unit not in UNITS]
        if unknown or not self.units:
            raise RequestError(f"--units {','.join(self.units)}: expected some of {', '.join(UNITS)}, with commas")

    def contenders(self) -> dict[str, EngineOptions]:
        """What takes turns: name -> options."""
        options = dataclasses.replace(self.options, load_timeout=self.timeout, low_memory=False)
        if engine_name(options) == "coreml":
            return {
                unit: dataclasses.replace(options, engine="coreml", compute_units=UNITS[unit])
                for unit in dict.fromkeys(self.units)
            }
        device = options.device if options.device is not None else "cpu"
        return {device: dataclasses.replace(options, engine="portable", device=device)}
