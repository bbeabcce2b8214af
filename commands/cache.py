"""The verb for the compiled models that Core ML loads: what is there, make room, compile ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import FOLDER, UNITS, as_json, give, say
from glassine.errors import EngineError
from glassine.manifest import TUNED

if TYPE_CHECKING:
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.engine.cache import Cache, Entry
    from glassine.runtime.foreign import Model


@click.group()
def cache() -> None:
    """Look after the compiled models of the Core ML engine.

    Core ML compiles a package before it runs it, and again for the Neural Engine: minutes, the first time. Glassine
    does that in a child process, keeps the result, and remembers which compute units ran it. The folder is
    GLASSINE_CACHE, or the system's place for caches; it is safe to delete.

    \b
    Example:
      glassine cache warm dreamshaper --units cpu_and_ne
      glassine cache list
      glassine cache clear --stale
    """


@cache.command("list")
@as_json
def list_entries(as_json: bool) -> None:
    """List compiled models, last used first.

    \b
    Example:
      glassine cache list
    """
    store = _cache()
    entries = [_described(store, key, entry) for key, entry in store.entries().items()]
    size = sum(entry["bytes"] for entry in entries)
    lines = [f"{store.root}: {len(entries)} compiled models, {size / 1e9:.2f} GB"]
    for entry in entries:
        units = ", ".join(f"{name} {ending}" for name, ending in entry["units"].items())
        used = time.strftime("%Y-%m-%d", time.localtime(entry["used"]))
        lines.append(f"{entry['bytes'] / 1e9:6.2f} GB  used {used}  {entry['state']}  {units}  {entry['source']}")
    give({"folder": str(store.root), "bytes": size, "entries": entries}, "\n".join(lines), as_json)


@cache.command()
@click.option("--stale", is_flag=True,
              help="Only what is of another build of macOS, damaged, or of packages that are gone.")  # fmt: skip
@as_json
def clear(stale: bool, as_json: bool) -> None:
    """Remove compiled models, and what is remembered of them.

    \b
    Example:
      glassine cache clear
      glassine cache clear --stale
    """
    store = _cache()
    removed: dict[str, int] = {}
    busy = []
    for key, entry in store.entries().items():
        if stale and store.state(entry) == "ready":
            continue
        try:
            size = store.remove(key)
        except OSError as error:
            raise EngineError(f"{store.root / key}: cannot be removed ({error})") from error
        if size is None:
            busy.append(key)
            say(f"{key}: another process is compiling it; left where it is")
        else:
            removed[key] = size
    if not stale:
        store.forget_digests()
    size = sum(removed.values())
    text = f"{store.root}: removed {len(removed)} compiled models, {size / 1e9:.2f} GB"
    give({"folder": str(store.root), "removed": removed, "bytes": size, "busy": busy}, text, as_json)


@cache.command()
@click.argument("model", type=FOLDER)
@click.option("--units", type=click.Choice(UNITS),
              help="Core ML compute units to try first.  [default: as 'glassine tune' found, or all]")  # fmt: skip
@click.option("--retry", is_flag=True, help="Try again what failed before.")
@click.option("--timeout", type=click.FloatRange(min=1), default=900.0, show_default=True, metavar="SECONDS",
              help="What one choice of units may take for one package.")  # fmt: skip
@as_json
def warm(model: Path, units: Any, retry: bool, timeout: float, as_json: bool) -> None:
    """Compile a model's packages now, and try each once.

    Says on which compute units each of them runs, so that the first picture does not wait. Every package is tried in a
    child process: if that crashes, hangs, or returns NaN, the next choice of units is taken, and this is remembered.

    \b
    Example:
      glassine cache warm dreamshaper --units cpu_and_ne
    """
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.engine.coreml import warm as warm_package
    from glassine.runtime.foreign import read_model

    found = read_model(model)
    options = EngineOptions(engine="coreml", compute_units=units, load_timeout=timeout, tell=say)
    results = []
    for path, function, how in _packages(found, options):
        started = time.perf_counter()
        ready = warm_package(path, how, function, retry=retry)
        for notice in ready.notices:
            say(f"note: {notice}")
        seconds = round(time.perf_counter() - started, 3)
        results.append({"package": path.name, "function": function, "units": ready.units, "seconds": seconds})
    lines = [
        f"{one['package']}{'' if one['function'] is None else ' ' + str(one['function'])}: {one['units']}, "
        f"{one['seconds']:.1f} s"
        for one in results
    ]
    give({"model": str(model), "packages": results}, "\n".join(lines), as_json)


def _packages(found: Model, options: EngineOptions) -> Iterator[tuple[Path, str | None, EngineOptions]]:
    """Every package that pictures are drawn with, once for each function that is used, and how it is run."""
    from glassine.runtime.bench.model import parts_of
    from glassine.runtime.tuned import Choices, files_of

    seen = set()
    for size in found.manifest.sizes:
        choices = Choices(found.folder, found.manifest, size, options)
        for notice in choices.notices:
            say(f"note: {notice}")
        for role, part in parts_of(found.manifest, size).items():
            if role.startswith(TUNED):  # another form of a part, which plays it or is not used
                continue
            chosen = choices.of(role, part)
            function = chosen.part.about.get("function")
            for path in files_of(found.folder, chosen.part):
                if (path, function) not in seen:
                    seen.add((path, function))
                    yield path, function, chosen.options


def _cache() -> Cache:
    from glassine.runtime.engine.cache import Cache, cache_root

    return Cache(cache_root())


def _described(store: Cache, key: str, entry: Entry | None) -> dict[str, Any]:
    from glassine.runtime.engine.cache import folder_size

    return {
        "key": key,
        "source": "" if entry is None else entry.source,
        "build": "" if entry is None else entry.build,
        "state": store.state(entry),
        "bytes": folder_size(store.root / key),
        "used": store.used(key),
        "units": {} if entry is None else {name: trial.ending for name, trial in entry.trials.items()},
    }
