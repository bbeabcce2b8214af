"""`glassine tune`, its measuring and its judgement: ways to run the parts of a model -> the fastest that is right.

ways -> candidates, the likeliest first -> each timed in a child process and held against a reference -> choices

A candidate that crashes, hangs, is refused, returns NaN, is not run by the units that were asked for, or whose results
are further from the reference than TOLERANCE, is never chosen, however fast it is.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glassine.manifest import Part
from glassine.runtime.bench.timing import Effort, Failure, Subject, Timing, time_in_turns
from glassine.runtime.engine import EngineOptions
from glassine.runtime.engine.contract import ComputeUnits, engine_name
from glassine.runtime.engine.psnr import psnr
from glassine.runtime.tuned import files_of

TOLERANCE = 30.0  # dB below the largest value of the reference, over which a result's error may not rise
UNITS: tuple[ComputeUnits, ...] = ("cpu_and_ne", "cpu_and_gpu", "all", "cpu_only")  # what saves energy first
OUT_OF_TIME = "not tried: the time was up"
_RUNS, _WARMUP, _SECONDS = 20, 2, 30.0  # timed calls of a candidate, and seconds after which fewer are enough
_PATIENCE = 60.0  # seconds that a candidate may be silent at least; at most half of what is left of the budget
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A package, or several, that can play a part.

    folder: where they lie. form: in words, "" where a part has no choice. own: as the model was converted. calls: that
    one step takes.
    """

    part: Part
    folder: Path
    form: str = ""
    own: bool = True
    calls: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to run a part: packages, on compute units (Core ML) or a device (the portable engine)."""

    role: str
    way: Way
    units: ComputeUnits | None
    device: str | None

    @property
    def on(self) -> str:
        """What it is to run on."""
        return str(self.device if self.units is None else self.units)

    @property
    def way_on(self) -> str:
        """How, and on what."""
        return f"{self.way.form} on {self.on}" if self.way.form else self.on

    def __str__(self) -> str:
        return f"{self.role}: {self.way_on}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What became of a candidate.

    step: seconds of one step: median, lower and upper quartile; None where it failed or was not tried. load: seconds,
    compiled before. psnr: dB against the reference; inf is equal. excluded: why it cannot be chosen, "" if it can.
    verdict: in words, once all have been judged.
    """

    candidate: Candidate
    step: tuple[float, float, float] | None = None
    load: float | None = None
    psnr: float | None = None
    realised: str = ""
    excluded: str = ""
    verdict: str = ""
    chosen: bool = False


def candidates(ways: Mapping[str, Sequence[Way]], options: EngineOptions) -> list[Candidate]:
    """Return every candidate, the likeliest to win first: a budget may end before the last.

    The parts that most of a picture's time goes into come first; of each the model's own packages, on the Neural
    Engine, the GPU and all, then other forms, where they are made for; the CPU alone comes last of all.
    """
    found = []
    for rank, (role, several) in enumerate(sorted(ways.items(), key=lambda item: _rank(item[0]))):
        for way in several:
            for units, device in _places(way, options):
                candidate = Candidate(role=role, way=way, units=units, device=device)
                found.append(((units == "cpu_only", rank, not way.own, _place(candidate)), candidate))
    return [candidate for _, candidate in sorted(found, key=lambda item: item[0])]


def _rank(role: str) -> int:
    """Return 0 for what takes most of a picture's time: what is called at every step, then the decoder, the rest."""
    if role == "unet":
        return 0
    if role.endswith("_unet"):
        return 1
    if role.startswith("control:"):
        return 2
    return 3 if role.endswith("vae_decoder") else 4


def _places(way: Way, options: EngineOptions) -> Iterator[tuple[ComputeUnits | None, str | None]]:
    if engine_name(options) == "portable":
        yield from ((None, device) for device in devices())
    elif way.own:
        yield from ((units, None) for units in UNITS)
    else:  # `split` is written for the Neural Engine, the others for the GPU
        yield from ((units, None) for units in UNITS[:2] if units == "cpu_and_gpu" or way.part.attention == "split")


def devices() -> list[str]:
    """The devices that PyTorch has here."""
    if importlib.util.find_spec("torch") is None:
        return []
    from glassine.runtime.engine.portable.numerics import devices as found

    return found()


class Tuner:
    """Tries the ways to run the parts of a model, until the budget ends.

    Args:
        ways: of every part, the model's own first. options: of the engine. ends: when to try no more, by
            `time.monotonic`. tell: is given what happens, in words.
    """

    def __init__(self, ways: Mapping[str, Sequence[Way]], options: EngineOptions, *, ends: float, tell: Tell) -> None:
        self._ways, self._options, self._tell, self._ends = ways, options, tell, ends
        self._references: dict[str, Path | str] = {}

    def run(self) -> list[Tried]:
        """Try what there is, the likeliest first, and judge it; what there was no time for comes back as not tried."""
        listed = candidates(self._ways, self._options)
        tried = []
        with tempfile.TemporaryDirectory(prefix="glassine_tune_") as place:
            self._place = Path(place)
            for number, candidate in enumerate(listed, start=1):
                if time.monotonic() >= self._ends:
                    tried.append(Tried(candidate=candidate, excluded=OUT_OF_TIME))
                    continue
                self._tell(f"{number} of {len(listed)}: {candidate}")
                tried.append(self._try(candidate))
        return judge(tried)

    def _try(self, candidate: Candidate) -> Tried:
        keep = self._place / "results.npz"
        keep.unlink(missing_ok=True)
        options = replace(self._options, compute_units=candidate.units, device=candidate.device)
        # What is compiled for a form that may lose is not kept.
        cache = None if candidate.way.own else self._place / "cache"
        timing = self._time(candidate.way, options, keep, Effort(runs=_RUNS, warmup=_WARMUP, seconds=_SECONDS), cache)
        if isinstance(timing, Failure):
            return Tried(candidate=candidate, excluded=timing.reason)
        calls = candidate.way.calls
        low, high = timing.quartiles
        tried = Tried(
            candidate=candidate,
            step=(calls * timing.median, calls * low, calls * high),
            load=timing.warm_load,
            realised=timing.realised.device,
        )
        if candidate.units is not None and set(tried.realised.split(" + ")) != {candidate.units}:
            return replace(tried, excluded=f"ran on {tried.realised} instead")
        reference = self._reference(candidate.role)
        if isinstance(reference, str):
            return replace(tried, excluded=f"there is nothing to compare it with: {reference}")
        near = psnr_of(keep, reference)
        far = f"its results are {near:.1f} dB from the reference, below {TOLERANCE:g}" if near < TOLERANCE else ""
        return replace(tried, psnr=near, excluded=far)

    def _time(
        self, way: Way, options: EngineOptions, keep: Path, effort: Effort, cache: Path | None = None
    ) -> Timing | Failure:
        """Time a way in a child, which may hang: then the rest of the budget is for others."""
        patience = max(_PATIENCE, (self._ends - time.monotonic()) / 2)
        subject = Subject(
            packages=files_of(way.folder, way.part),
            options=replace(options, load_timeout=min(options.load_timeout, patience)),
            function=way.part.about.get("function"),
            cache=cache,
            keep=keep,
        )
        return time_in_turns({"": subject}, replace(effort, timeout=patience), tell=self._tell)[""]

    def _reference(self, role: str) -> Path | str:
        """The results of a part in float32, by PyTorch; where that cannot run it, Core ML's on the CPU. Or why none."""
        if role not in self._references:
            keep = self._place / f"reference {len(self._references)}.npz"
            why = "PyTorch is not installed"
            for options in (EngineOptions(engine="portable"), EngineOptions(engine="coreml", compute_units="cpu_only")):
                if options.engine == "portable" and importlib.util.find_spec("torch") is None:
                    continue
                if options.engine == "coreml" and engine_name(self._options) != "coreml":
                    continue
                self._tell(f"{role}: what its results should be, from the {options.engine} engine on the CPU")
                found = self._time(self._ways[role][0], options, keep, Effort(runs=1, warmup=0))
                if not isinstance(found, Failure):
                    break
                why = found.reason
            self._references[role] = keep if keep.is_file() else why
        return self._references[role]


def psnr_of(results: Path, reference: Path) -> float:
    """Return the PSNR of results beside a reference (`engine.psnr`, dB) over the rows that both have: the worst."""
    with np.load(results) as ours, np.load(reference) as theirs:
        if set(ours.files) != set(theirs.files):
            return -math.inf
        return min(_psnr(ours[name], theirs[name]) for name in theirs.files)


def _psnr(ours: NDArray[np.generic], theirs: NDArray[np.generic]) -> float:
    rows = min(len(ours), len(theirs))
    return psnr(ours[:rows], theirs[:rows]) if ours.shape[1:] == theirs.shape[1:] else -math.inf


def winner(tried: Sequence[Tried]) -> Tried | None:
    """Return the one to choose for a part: the fastest by its median; none where there was time for one alone.

    Where the spreads (lower to upper quartile) of others reach into its own, the simplest of them: the model's own
    form before another, then the Neural Engine before the GPU, both before all units, and the CPU last.
    """
    fit = [one for one in tried if not one.excluded and one.step is not None]
    if not fit or _is_alone(tried):
        return None
    fastest = min(fit, key=_median)
    level = [one for one in fit if one.step is not None and fastest.step is not None and one.step[1] <= fastest.step[2]]
    return min(level, key=lambda one: (not one.candidate.way.own, _place(one.candidate), _median(one)))


def _is_alone(tried: Sequence[Tried]) -> bool:
    """Whether the time was up before there was anything to compare the first with."""
    return len(tried) > 1 and sum(one.excluded != OUT_OF_TIME for one in tried) < 2


def _median(tried: Tried) -> float:
    return math.inf if tried.step is None else tried.step[0]


def _place(candidate: Candidate) -> int:
    return 0 if candidate.units is None else UNITS.index(candidate.units)


def judge(tried: Sequence[Tried]) -> list[Tried]:
    """Return the same with a verdict in words on each."""
    chosen = {role: winner([one for one in tried if one.candidate.role == role]) for role in _roles(tried)}
    return [
        replace(one, verdict=_verdict(one, chosen[one.candidate.role], tried), chosen=one is chosen[one.candidate.role])
        for one in tried
    ]


def _roles(tried: Sequence[Tried]) -> list[str]:
    return list(dict.fromkeys(one.candidate.role for one in tried))


def _verdict(one: Tried, best: Tried | None, tried: Sequence[Tried]) -> str:
    if one.excluded:
        return one.excluded
    if best is None:
        return "not chosen: the time was up before there was anything to compare it with"
    assert best.step is not None
    assert one.step is not None
    others = [other for other in tried if other.candidate.role == one.candidate.role and not other.excluded]
    fastest = min(others, key=_median)
    if one is best:
        level = one is not fastest
        return f"chosen: as fast as {fastest.candidate.way_on} within the spread" if level else "chosen: the fastest"
    if fastest.step is not None and one.step[1] <= fastest.step[2]:
        return "as fast within the spread; what is simpler or saves energy is chosen"
    return f"{one.step[0] / best.step[0]:.2f} times as long"
