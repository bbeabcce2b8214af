"""A model folder, measured: every part on every choice of compute units, then whole pictures.

folder -> subjects, by role -> timings in turns -> figures, beside what the machine could do -> Report
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from glassine import __version__
from glassine.errors import GlassineError, PackageError, RequestError
from glassine.manifest import Part
from glassine.runtime.bench.chips import Peak, published_peak
from glassine.runtime.bench.condition import condition, doubts, machine_record
from glassine.runtime.bench.energy import Meter, mean_watts
from glassine.runtime.bench.model import model_digest, packages_of, parts_of, weight_bytes
from glassine.runtime.bench.report import Figures, Json, Measured, Report
from glassine.runtime.bench.roofline import Work, position, work_of
from glassine.runtime.bench.settings import Settings
from glassine.runtime.bench.statistics import ratio_of_medians
from glassine.runtime.bench.timing import Effort, Failure, Pictures, Subject, Timing, time_in_turns, time_peak
from glassine.runtime.bench.words import seconds
from glassine.runtime.engine import EngineOptions
from glassine.runtime.engine.contract import COMPILED, engine_name
from glassine.runtime.engine.psnr import psnr
from glassine.runtime.foreign import read_model
from glassine.runtime.machine import Machine, this_machine
from glassine.runtime.request import Request

NEEDED = ("text_encoder", "unet", "vae_decoder")  # for a whole picture; SDXL's refiner has text_encoder_2 alone
_IDLE = 3.0  # seconds in which the machine's power is measured before anything runs
_HOST = 0.02  # seconds a step that the loop itself may take
_REFERENCE = 86400.0  # seconds that the reference picture may take: a large model on a CPU needs hours
_HELD = 3  # times its weights that a loaded network may hold
Tell = Callable[[str], None]
Timings = dict[str, Timing | Failure]


def bench(folder: Path, settings: Settings, tell: Tell) -> Report:
    """Measure a model folder.

    What fails is in the report's `failures`, and does not stop the rest.

    Raises:
        PackageError, EngineError: the folder cannot be read, or has no such parts or size.
        RequestError: what is asked for cannot be measured.
    """
    return _Bench(folder, settings, tell).run()


class _Bench:
    """One run of the benchmark."""

    def __init__(self, folder: Path, settings: Settings, tell: Tell) -> None:
        self._settings, self._tell = settings, tell
        self._model = read_model(folder)
        manifest = self._model.manifest
        self._size = settings.size if settings.size is not None else manifest.sizes[0]
        if self._size not in manifest.sizes:
            sizes = ", ".join(f"{width}x{height}" for width, height in manifest.sizes)
            raise PackageError(f"{folder}: converted for {sizes}; take one of these for --size, or convert it again")
        steps = {} if settings.steps is None else {"steps": settings.steps}
        self._steps = Request.from_dict({**manifest.defaults, **steps}).steps
        self._other = self._other_unet()
        self._contenders = settings.contenders()
        self._core_ml = engine_name(settings.options) == "coreml"
        self._machine: Machine = this_machine()
        self._notes: list[str] = list(self._model.notices)
        self._peaks: dict[str, Peak | None] = {}

    def run(self) -> Report:
        """Measure everything that was asked for."""
        started, begun = datetime.now(timezone.utc), time.perf_counter()
        chosen = parts_of(self._model.manifest, self._size, self._settings.parts)
        drawn = bool(self._settings.pictures) and self._drawable()
        machine, before = machine_record(self._machine), condition()
        self._cores = machine["gpu_cores"]
        with ExitStack() as stack:
            self._place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glassine_bench_")))
            meter = stack.enter_context(Meter()) if self._settings.energy and drawn else None  # refused before hours
            parts = tuple(self._part(role, part, begun) for role, part in chosen.items())
            pictures = self._pictures(meter, begun) if drawn else None
            batching = self._batching(chosen)
        if pictures is not None:
            self._notes += disagreements(parts, pictures)
        after = condition()
        self._notes += doubts(before, after, self._machine.cores)
        manifest = self._model.manifest
        return Report(
            glassine=__version__,
            started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            seconds=time.perf_counter() - begun,
            settings=self._asked(),
            machine={**machine, "before": dataclasses.asdict(before), "after": dataclasses.asdict(after)},
            model={
                "name": manifest.name,
                "family": manifest.family,
                "digest": model_digest(self._model),
                "batch": manifest.batch,
                "tokens": manifest.tokens,
                "loras": [lora.name for lora in manifest.loras],
            },
            parts=parts,
            pictures=pictures,
            batching=batching,
            notes=tuple(self._notes),
        )

    def _asked(self) -> Json:
        settings = self._settings
        return {
            "asked": list(self._contenders),
            "engine": engine_name(settings.options),
            "precision": "as converted" if self._core_ml else settings.options.precision,
            "runs": settings.runs,
            "pictures": settings.pictures,
            "warmup": settings.warmup,
            "steps": settings.steps,
            "width": self._size[0],
            "height": self._size[1],
        }

    def _part(self, role: str, part: Part, begun: float) -> Measured:
        """Time one part on every choice of units."""
        packages = packages_of(self._model.folder, part)
        function = part.about.get("function")
        subjects = {
            asked: Subject(
                packages=packages,
                options=options,
                function=function,
                cache=self._cache(asked),
                name=f"{role} on {asked}",
            )
            for asked, options in self._contenders.items()
        }
        settings = self._settings
        effort = Effort(
            runs=settings.runs, warmup=settings.warmup, timeout=settings.timeout, cold=settings.cold, placement=True
        )
        order, timings = self._timed(subjects, effort, weight_bytes(packages))
        work = self._work(role, packages, function)
        figures = [
            Figures.of(asked, timing, started=begun, roof=self._roof(work, asked, timing))
            for asked, timing in timings.items()
            if isinstance(timing, Timing)
        ]
        shape = next((shape for shape, _ in part.inputs.values() if shape), None)
        about = {
            "packages": [path.name for path in packages],
            "rows": None if shape is None else shape[0],
            "attention": part.attention,
            "palette": part.palette,
            "precision": part.precision,
            "work": None if work is None else dataclasses.asdict(work),
        }
        return Measured(role=role, order=order, figures=tuple(figures), failures=_failures(timings), about=about)

    def _work(self, role: str, packages: tuple[Path, ...], function: str | None) -> Work | None:
        """What a part has to do; None where that cannot be seen."""
        if any(path.suffix == COMPILED for path in packages):
            return None
        try:
            return work_of(packages, function)
        except GlassineError as error:
            self._notes.append(f"{role}: its work cannot be counted: {error}")
            return None

    def _timed(self, subjects: Mapping[str, Subject], effort: Effort, weights: int) -> tuple[str, Timings]:
        """Time contenders in turns where the memory holds all of them, else one after the other."""
        free = self._machine.available
        if len(subjects) == 1:
            return "alone", time_in_turns(subjects, effort, tell=self._tell)
        if free is None or len(subjects) * _HELD * weights < free / 2:
            return "in turns", time_in_turns(subjects, effort, tell=self._tell)
        results: Timings = {}
        for asked, subject in subjects.items():
            results |= time_in_turns({asked: subject}, effort, tell=self._tell)
        return "one after the other", results

    def _roof(self, work: Work | None, asked: str, timing: Timing) -> Json | None:
        """What was reached beside what could be."""
        if work is None:
            return None
        peak = self._peak(asked, timing.realised.device)
        where = dataclasses.asdict(position(work, timing.median, peak))
        known = {"tflops": None, "gigabytes": None, "source": None} if peak is None else dataclasses.asdict(peak)
        return {
            **where,
            "peak_tflops": known["tflops"],
            "peak_gigabytes": known["gigabytes"],
            "source": known["source"],
        }

    def _peak(self, asked: str, device: str) -> Peak | None:
        """The peak of what really ran; the CPU's and the portable engine's are measured, once."""
        if self._core_ml and device != "cpu_only":
            return published_peak(self._machine.chip, device, self._cores)
        if device not in self._peaks:
            self._tell("the machine's peak: measuring")
            try:
                self._peaks[device] = time_peak(self._contenders[asked])
            except GlassineError as error:
                self._peaks[device] = None
                self._notes.append(str(error))
        return self._peaks[device]

    def _pictures(self, meter: Meter | None, begun: float) -> Measured:
        """Time whole pictures."""
        settings, idle = self._settings, None
        if meter is not None:
            began = time.perf_counter()
            time.sleep(_IDLE)
            idle, _ = mean_watts(meter.intervals, [(began, time.perf_counter())])
        subjects = {
            asked: Pictures(
                folder=self._model.folder,
                size=self._size,
                steps=settings.steps,
                options=options,
                name=f"pictures on {asked}",
                cache=self._cache(asked),
                keep=self._place / f"{asked}.npy",
            )
            for asked, options in self._contenders.items()
        }
        manifest = self._model.manifest
        weights = sum(weight_bytes(packages_of(self._model.folder, part)) for part in manifest.parts.values())
        effort = Effort(runs=settings.pictures, warmup=1, turn=1, timeout=settings.timeout)
        order, timings = self._timed(subjects, effort, weights)
        reference = self._reference(next(iter(subjects.values()))) if settings.quality else None
        figures = []
        for asked, timing in timings.items():
            if isinstance(timing, Failure):
                continue
            stages = {name: statistics.median(one[name] for one in timing.stages) for name in timing.stages[0]}
            figures.append(
                Figures.of(
                    asked,
                    timing,
                    started=begun,
                    stages=stages,
                    images_per_minute=60 / timing.median,
                    energy=None if meter is None else self._energy(meter, timing, idle),
                    quality=None if reference is None else quality(self._place / f"{asked}.npy", reference),
                )
            )
        about = {"steps": self._steps}
        return Measured(role="picture", order=order, figures=tuple(figures), failures=_failures(timings), about=about)

    def _energy(self, meter: Meter, timing: Timing, idle: Mapping[str, float] | None) -> Json | None:
        """The mean power while this contender drew, and what a picture took."""
        windows = [(at, at + lasted) for at, lasted in zip(timing.at, timing.samples, strict=True)]
        watts, count = mean_watts(meter.intervals, windows)
        if not count:
            self._notes.append("no interval of powermetrics lies within a picture: no energy; take more --steps")
            return None
        joules = math.fsum(watts.values()) * timing.median
        idle_watts = math.fsum(idle.values()) if idle else None
        return {"watts": watts, "joules_per_picture": joules, "idle_watts": idle_watts, "intervals": count}

    def _reference(self, subject: Pictures) -> Path | None:
        """The latents of the first picture on the portable engine in float32."""
        if importlib.util.find_spec("torch") is None:
            self._notes.append("quality needs the portable engine: pip install 'glassine[portable]'")
            return None
        keep = self._place / "reference.npy"
        options = EngineOptions(engine="portable", device="cpu", precision="fp32")
        subject = dataclasses.replace(subject, options=options, keep=keep, name="the reference picture")
        (timing,) = time_in_turns({"": subject}, Effort(runs=0, warmup=0, timeout=_REFERENCE), tell=self._tell).values()
        if isinstance(timing, Failure):
            self._notes.append(f"no quality: {timing.reason}")
            return None
        return keep

    def _batching(self, chosen: Mapping[str, Part]) -> tuple[Json, ...]:
        """The same UNet with few and with many rows a call, in turns, on every choice of units."""
        if "unet" not in chosen:
            return ()
        rows = self._model.manifest.batch
        if self._other is None:
            self._notes.append(
                f"only batch {rows} is here; to compare batches: 'glassine convert SOURCE OTHER --batch "
                f"{1 if rows > 1 else 2}', and then this command with --other-batch OTHER"
            )
            return ()
        unets = {rows: (self._model.folder, chosen["unet"]), self._other[0]: self._other[1]}
        return tuple(one for asked in self._contenders if (one := self._batched(asked, unets)) is not None)

    def _other_unet(self) -> tuple[int, tuple[Path, Part]] | None:
        """The rows, the folder and the part of the same UNet with another batch, if one was given."""
        folder = self._settings.other_batch
        if folder is None:
            return None
        other = read_model(folder)
        rows = other.manifest.batch
        if model_digest(other) != model_digest(self._model) or rows == self._model.manifest.batch:
            raise RequestError(f"{folder}: expected the same weights as {self._model.folder}, with another --batch")
        return rows, (other.folder, parts_of(other.manifest, self._size, ("unet",))["unet"])

    def _batched(self, asked: str, unets: Mapping[int, tuple[Path, Part]]) -> Json | None:
        subjects = {
            str(rows): Subject(
                packages=packages_of(folder, part),
                options=self._contenders[asked],
                function=part.about.get("function"),
                cache=self._cache(asked),
                name=f"unet, batch {rows}, on {asked}",
            )
            for rows, (folder, part) in sorted(unets.items())
        }
        effort = Effort(runs=self._settings.runs, warmup=self._settings.warmup, timeout=self._settings.timeout)
        timings = time_in_turns(subjects, effort, tell=self._tell)
        self._notes += _failures(timings).values()
        timed = {int(rows): timing for rows, timing in timings.items() if isinstance(timing, Timing)}
        if len(timed) < 2:
            return None
        few, many = ([one / rows for one in timing.samples] for rows, timing in timed.items())
        ratio = ratio_of_medians(few, many)
        return {
            "asked": asked,
            "role": "unet",
            "rows": list(timed),
            "medians": [timing.median for timing in timed.values()],
            "ratio": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
        }

    def _drawable(self) -> bool:
        """Whether the folder can draw a picture by itself."""
        missing = [role for role in NEEDED if role not in self._model.manifest.parts]
        if missing:
            self._notes.append(f"no whole pictures: the folder has no {', '.join(missing)}")
        return not missing

    def _cache(self, asked: str) -> Path | None:
        """The compile cache of one contender: empty at first, so that loading is cold, or the user's own."""
        return self._place / f"cache-{asked}" if self._core_ml and self._settings.cold else None


def disagreements(parts: Sequence[Measured], pictures: Measured) -> Iterator[str]:
    """Where the UNet alone and the steps of whole pictures do not fit one another.

    A step is one call of the UNet, or two where it has one row a call and there is guidance. Half as much again, either
    way, is let pass.
    """
    for unet in (part for part in parts if part.role == "unet"):
        calls = 1 if unet.about["rows"] != 1 else 2
        for alone in unet.figures:
            drawn = pictures.of(alone.asked)
            step = None if drawn is None else drawn.stages["denoise"] / max(1.0, drawn.stages["evaluations"])
            if step is not None and not alone.median / 1.5 <= step <= 1.5 * calls * alone.median + _HOST:
                yield (
                    f"pictures and parts disagree on {alone.asked}: a step took {seconds(step)}, the UNet alone "
                    f"{seconds(alone.median)} a call; one of them is not to be trusted, measure again"
                )


def quality(latents: Path, reference: Path) -> Json:
    """PSNR of the first picture's latents beside the reference's (`engine.psnr`, dB); None: they are equal."""
    ours, theirs = np.load(latents), np.load(reference)
    value, most = psnr(ours, theirs), float(np.abs(ours - theirs).max())
    return {
        "psnr": value if math.isfinite(value) else None,
        "max_error": most,
        "reference": "portable engine, float32, cpu",
    }


def _failures(timings: Mapping[str, Timing | Failure]) -> dict[str, str]:
    return {asked: timing.reason for asked, timing in timings.items() if isinstance(timing, Failure)}
