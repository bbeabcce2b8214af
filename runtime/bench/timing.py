"""Times engines, each in a child process of its own: a crash, a hang and the memory are the child's.

subject -> child: load -> first call -> warm-up -> timed calls, in turns with the other contenders -> peak memory

What is compared alternates: a busy or hot moment of the machine then hits all contenders. A turn is a few calls behind
one that is not counted, since a unit that has waited for the others may have slowed down its clock.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassine.errors import EngineError
from glassine.runtime.bench.chips import Peak
from glassine.runtime.bench.statistics import quartiles
from glassine.runtime.engine import EngineOptions, Realised
from glassine.runtime.engine.child import Words, child
from glassine.runtime.engine.contract import engine_name

CHILD: tuple[str, ...] = (sys.executable, "-m", "glassine.runtime.bench.worker")  # tests put their own here
_START = 600.0  # seconds that Python and its imports may take
TURN = 5  # timed calls until the next contender's turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is timed: one network, as the package or the packages it consists of, and how it is to run.

    name: for messages; "" is the packages'. function: of packages with several. cache: the folder of the compile
    cache; None is the user's own. keep: where the results of the first call go, as .npz; they are those of the same
    inputs for every form of a network, row by row.
    """

    packages: tuple[Path, ...]
    options: EngineOptions
    function: str | None = None
    cache: Path | None = None
    name: str = ""
    keep: Path | None = None

    def job(self) -> Words:
        """What the child is told."""
        keep = None if self.keep is None else str(self.keep.absolute())
        packages = [str(package.absolute()) for package in self.packages]
        return {"packages": packages, "function": self.function, "keep": keep}

    def __str__(self) -> str:
        return self.name if self.name else ", ".join(package.name for package in self.packages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures(Subject):
    """Whole pictures of a model folder.

    steps: None is the model's own. keep: where the latents of the first picture go, as .npy.
    """

    packages: tuple[Path, ...] = ()
    folder: Path
    size: tuple[int, int]
    steps: int | None = None
    keep: Path | None = None

    def job(self) -> Words:
        """What the child is told."""
        keep = None if self.keep is None else str(self.keep.absolute())
        return {"folder": str(self.folder.absolute()), "size": list(self.size), "steps": self.steps, "keep": keep}

    def __str__(self) -> str:
        return f"pictures of {self.folder.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure.

    runs: timed calls. warmup: calls before them that are not counted, besides the first. seconds: a budget for the
    timed calls, which then end early, yet not before `least`. turn: timed calls until another contender's turn.
    timeout: seconds without a word after which a child is taken to hang. cold: also load once with an empty compile
    cache. placement: also ask Core ML where the operations run.
    """

    runs: int = 20
    warmup: int = 3
    seconds: float | None = None
    least: int = 5
    turn: int = TURN
    timeout: float = 900.0
    cold: bool = False
    placement: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What was measured; seconds.

    cold_load: with nothing compiled before; None where it was not measured or nothing is compiled. warm_load: in a
    fresh process, with what is compiled and the files in memory. first: the first call. samples: the timed calls in
    the order of time, each begun `at` (the system's monotonic clock). stages: of every sample, where it knows them.
    peak_bytes: the most memory that the child held; base_bytes: before it loaded anything; memory: what is counted.
    placement: unit -> share of the cost by Core ML's plan. realised: what really ran.
    """

    cold_load: float | None
    warm_load: float
    first: float
    samples: tuple[float, ...]
    at: tuple[float, ...]
    stages: tuple[Mapping[str, float], ...]
    peak_bytes: int
    base_bytes: int
    memory: str
    realised: Realised
    placement: Mapping[str, float] | None = None
    notices: tuple[str, ...] = ()

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one; the extremes of fewer than four samples."""
        return quartiles(self.samples)

    @property
    def count(self) -> int:
        """How many samples."""
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there are no figures, in words."""

    reason: str


def time_engine(subject: Subject, effort: Effort | None = None) -> Timing:
    """Time one network by itself.

    Raises:
        EngineError: it cannot be loaded or run, crashes, hangs, or its results are not finite; the message says how.
    """
    result = time_in_turns({"": subject}, effort)[""]
    if isinstance(result, Failure):
        raise EngineError(result.reason)
    return result


def time_in_turns(
    contenders: Mapping[str, Subject],
    effort: Effort | None = None,
    *,
    tell: Callable[[str], None] = lambda words: None,
) -> dict[str, Timing | Failure]:
    """Time contenders that are loaded at the same time, in turns; one that fails does not stop the others.

    Args:
        tell: is given what is happening, in words.
    """
    effort = effort if effort is not None else Effort()
    results: dict[str, Timing | Failure] = {}
    with ExitStack() as stack:
        running: dict[str, _Contender] = {}
        for name, subject in contenders.items():
            contender = _Contender(subject, effort, tell)
            stack.callback(contender.close)
            try:
                contender.start()
                running[name] = contender
            except EngineError as error:
                results[name] = Failure(str(error))
                contender.close()
        alone = len(running) < 2
        while running:
            for name, contender in list(running.items()):
                try:
                    contender.turn(settle=not alone)
                    if not contender.done:
                        continue
                    results[name] = contender.finish()
                except EngineError as error:
                    results[name] = Failure(str(error))
                contender.close()  # a child that hangs would disturb the others
                del running[name]
    return {name: results[name] for name in contenders}


def time_peak(options: EngineOptions) -> Peak:
    """What the CPU, or the portable engine's device, reaches now, measured in a child.

    Raises:
        EngineError: it cannot be measured.
    """
    device = options.device if options.device is not None else "cpu"
    with _worker(Subject(packages=(), options=options, name="the machine's peak"), lambda _: None, _START) as ask:
        return Peak(**ask("measuring", do="peak", device=None if engine_name(options) == "coreml" else device))


class _Contender:
    """One subject while it is timed."""

    def __init__(self, subject: Subject, effort: Effort, tell: Callable[[str], None]) -> None:
        self._subject, self._effort, self._tell = subject, effort, tell
        self._cold: float | None = None
        self._samples: list[float] = []
        self._at: list[float] = []
        self._stages: list[Mapping[str, float]] = []
        self._stack = ExitStack()

    def close(self) -> None:
        """End its child."""
        self._stack.close()

    def start(self) -> None:
        """Load it, cold first where that is wanted, and warm it up."""
        cache = self._subject.cache
        if self._effort.cold and engine_name(self._subject.options) == "coreml":
            if cache is None:
                cache = Path(self._stack.enter_context(_folder()))
            self._tell(f"{self._subject}: loading for the first time")
            with _worker(self._subject, self._tell, self._effort.timeout, cache) as ask:
                self._cold = ask("loading it for the first time", do="load", warm=False)["seconds"]
        self._tell(f"{self._subject}: loading")
        self._ask = self._stack.enter_context(_worker(self._subject, self._tell, self._effort.timeout, cache))
        self._loaded = self._ask("loading it", do="load", warm=True)
        self._first = self._run("calling it for the first time", 1)["seconds"][0]
        if self._effort.warmup:
            self._run("warming it up", self._effort.warmup)

    def turn(self, *, settle: bool) -> None:
        """Make some timed calls."""
        wanted = min(self._effort.turn, self._effort.runs - len(self._samples))
        settling = int(settle and self._effort.turn > 1)
        answer = self._run("running it", settling + wanted)
        self._samples += answer["seconds"][settling:]
        self._at += answer["at"][settling:]
        self._stages += answer["stages"][settling:]

    @property
    def done(self) -> bool:
        """Whether there are samples enough."""
        budget, count = self._effort.seconds, len(self._samples)
        spent = budget is not None and sum(self._samples) >= budget and count >= self._effort.least
        return spent or count >= self._effort.runs

    def finish(self) -> Timing:
        """Ask for its memory and where it ran."""
        memory = self._ask("asking for its memory", do="memory")
        raw: dict[str, Any] = self._loaded["realised"]
        realised = Realised(**{**raw, "notices": tuple(raw["notices"])})
        placement, notices = self._placement(realised)
        return Timing(
            cold_load=self._cold,
            warm_load=self._loaded["seconds"],
            first=self._first,
            samples=tuple(self._samples),
            at=tuple(self._at),
            stages=tuple(self._stages),
            peak_bytes=memory["peak"],
            base_bytes=self._loaded["base"],
            memory=memory["counts"],
            realised=realised,
            placement=placement,
            notices=(*realised.notices, *notices),
        )

    def _placement(self, realised: Realised) -> tuple[Mapping[str, float] | None, tuple[str, ...]]:
        """Core ML's plan. That there is none is no failure: the figures are there."""
        several = " + " in realised.device
        if not self._effort.placement or realised.engine != "coreml" or several or not self._subject.packages:
            return None, ()
        try:
            return self._ask("asking for its plan", do="placement", units=realised.device)["placement"], ()
        except EngineError as error:
            return None, (f"no compute plan: {error}",)

    def _run(self, doing: str, times: int) -> Words:
        answer = self._ask(doing, do="run", times=times)
        if answer["not_finite"]:
            raise EngineError(
                f"{self._subject}: {', '.join(answer['not_finite'])} came out NaN or infinite; "
                "'glassine verify FOLDER SOURCE --locate' finds where"
            )
        return answer


@contextmanager
def _worker(
    subject: Subject, tell: Callable[[str], None], timeout: float, cache: Path | None = None
) -> Iterator[Callable[..., Words]]:
    """Start a child; yields what asks it and returns its answer.

    The user's own choices for this machine are hidden from it: what is measured is what was asked for.
    """
    options = subject.options
    how = {name: getattr(options, name) for name in ("engine", "compute_units", "device", "precision", "load_timeout")}
    job = {**subject.job(), "options": how, "core_ml": engine_name(options) == "coreml"}
    with _folder() as place:
        environment = {"GLASSINE_CONFIG": str(Path(place, "nothing-chosen"))}
        if cache is not None:
            environment["GLASSINE_CACHE"] = str(cache.absolute())
        with child([*CHILD, json.dumps(job)], Path(place), environment) as worker:

            def answer(doing: str, timeout: float) -> Words:
                while True:
                    try:
                        answer = worker.answer(timeout)
                    except TimeoutError:
                        raise EngineError(f"{subject}: hung: said nothing for {timeout:g} s while {doing}") from None
                    if answer is None:
                        raise EngineError(f"{subject}: crashed while {doing} ({worker.ending()})")
                    if "error" in answer:
                        raise EngineError(f"{subject}: failed while {doing}: {answer['error']}")
                    if "tell" not in answer:
                        return answer
                    tell(answer["tell"])

            def ask(doing: str, **words: Any) -> Words:
                worker.ask(words)
                return answer(doing, timeout)

            answer("starting", _START)
            yield ask


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="glassine_bench_", ignore_cleanup_errors=True)
