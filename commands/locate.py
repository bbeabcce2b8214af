"""What `verify --locate` does: every part of a model against a fresh conversion, and in fp16 against fp32.

Both say the first operation that goes wrong, by its name in the network, and what to do about it.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import bar, give

if TYPE_CHECKING:
    from glassine.convert.network import ConvertOptions
    from glassine.manifest import Manifest, Part
    from glassine.runtime.engine.portable.locate import Fault

ROUNDING = 30.0  # dB against float32: below, float16's rounding is more than what a sound network shows


def show_faults(model: Path, source: Path, parts: Sequence[str], threshold: float, as_json: bool, **asked: Any) -> None:
    """Print the first fault of every part in both comparisons; exit code 1 if there is any.

    Args:
        asked: `given` and `allow_pickle`, as `verify_folder` has them.

    Raises:
        PackageError: no such part, or the model cannot be compared with this source.
    """
    found: dict[str, dict[str, Fault | None]] = {}
    with bar("locating") as advance:
        for role, how, fault in _faults(model, source, parts, threshold, advance, **asked):
            found.setdefault(role, {})[how] = fault
    lines = [f"{role:14} {how}: {_told(fault)}" for role, faults in found.items() for how, fault in faults.items()]
    report = {
        role: {how: None if fault is None else _plain(fault) for how, fault in faults.items()}
        for role, faults in found.items()
    }
    give(report, "\n".join(lines), as_json)
    wrong = [role for role, faults in found.items() if any(fault is not None for fault in faults.values())]
    if wrong:
        raise click.ClickException(f"{', '.join(wrong)}: an operation goes wrong; see above")


def _faults(
    model: Path,
    source: Path,
    parts: Sequence[str],
    threshold: float,
    advance: Any,
    *,
    given: Sequence[Path],
    allow_pickle: bool,
) -> Iterator[tuple[str, str, Fault | None]]:
    """(part, comparison, fault) for every part that the source made."""
    from glassine.convert.folder import convert_checkpoint
    from glassine.convert.imports import import_coremltools_quietly_later
    from glassine.convert.ingredients import ingredients
    from glassine.convert.swap import change_loras
    from glassine.convert.verify import JUDGED, detect_again, inputs_of
    from glassine.errors import PackageError
    from glassine.manifest import Manifest
    from glassine.runtime.engine.contract import check_inputs
    from glassine.runtime.engine.interface import read_interface
    from glassine.runtime.engine.portable.locate import locate_change, locate_rounding

    manifest = Manifest.read(model)
    detected = detect_again(model, manifest, source, given, parts, allow_pickle)
    laid_over = ingredients(model, manifest, given, parts=parts, allow_pickle=allow_pickle)
    import_coremltools_quietly_later()
    with tempfile.TemporaryDirectory(prefix="glassine_locate_") as place:
        anew = Path(place) / "fresh"
        options = _options(manifest, parts, whole=bool(laid_over.removable))
        fresh = convert_checkpoint(source, anew, dataclasses.replace(options, extras=laid_over.converted))
        if laid_over.removable:
            change_loras(anew, laid_over.removable)
        roles = [role for role, part in manifest.parts.items() if role in fresh.parts and part.role in JUDGED]
        unknown = sorted(set(parts) - set(roles))
        if unknown:
            raise PackageError(
                f"{model}: {', '.join(unknown)} cannot be compared with {source}, only {', '.join(roles)}"
            )
        chosen = [role for role in roles if not parts or role in parts]
        for number, role in enumerate(chosen):
            advance(number, len(chosen), role)
            part, again = manifest.parts[role], fresh.parts[role]
            _check(model, role, part, again)
            package, function = model / part.file, part.about.get("function")
            interface = read_interface(package, function)
            arrays = check_inputs(str(package), interface.inputs, inputs_of(part.role, detected, interface))
            if part.palette is None:  # what is stored in fewer bits differs from the source everywhere
                fault = locate_change(
                    package,
                    anew / again.file,
                    arrays,
                    threshold=threshold,
                    function=function,
                    reference_function=again.about.get("function"),
                )
                yield role, "against its source", fault
            fault = locate_rounding(package, arrays, threshold=ROUNDING, function=function)
            yield role, "fp16 against fp32", fault


def _options(manifest: Manifest, parts: Sequence[str], *, whole: bool) -> ConvertOptions:
    """How to convert the source so that the programs come out the same, and no more of it than is compared.

    whole: all of it, because LoRAs will be merged that may change any part.
    """
    from glassine.convert.network import ConvertOptions
    from glassine.convert.verify import JUDGED

    shaped = [part for part in manifest.parts.values() if part.attention is not None]
    how: dict[str, Any] = {"attention": shaped[0].attention, "layout": shaped[0].layout} if shaped else {}
    roles = {part.role for name, part in manifest.parts.items() if not parts or name in parts}
    if len(roles) == 1 and roles <= {*JUDGED} and not whole:
        how["part"] = roles.pop()
    return ConvertOptions(
        sizes=manifest.sizes,
        batch=manifest.batch,
        tokens=manifest.tokens,
        chunks=1,
        functions=any("function" in part.about for part in manifest.parts.values()),
        **how,
    )


def _check(model: Path, role: str, part: Part, again: Part) -> None:
    """Refuse what differs from its source on purpose."""
    from glassine.errors import PackageError

    if "chunks" in part.about:
        raise PackageError(f"{model}: {role} is cut into chunks, and whole ones are compared; convert with --chunks 1")
    if part.source_sha256 != again.source_sha256:
        raise PackageError(
            f"{model}: {role} was made of {part.source} (sha256 {part.source_sha256[:12]}), this source's is "
            f"{again.source_sha256[:12]}; give the file it was made of"
        )


def _plain(fault: Fault) -> dict[str, Any]:
    """A fault as JSON values: no NaN, no infinity."""
    raw = dataclasses.asdict(fault)
    return {**raw, "psnr": raw["psnr"] if math.isfinite(raw["psnr"]) else None, "advice": _advice(fault)}


def _told(fault: Fault | None) -> str:
    if fault is None:
        return "no operation goes wrong"
    decibels = f" ({fault.psnr:.1f} dB)" if math.isfinite(fault.psnr) else ""
    where = f"{fault.type} {fault.name}, operation {fault.index} of {fault.total}"
    return f"{where}: {fault.kind}{decibels}: {fault.detail}\n{'':15}{_advice(fault)}"


def _advice(fault: Fault) -> str:
    if fault.constants:
        words = f"its {', '.join(fault.constants)} is not what the source makes"
        return f"{words}: a damaged weight file, or an older conversion; convert the model again"
    if fault.kind == "differs":
        return "if it is rounding, keep this part in float32; if not, convert the model again"
    return "keep this part in float32 (the VAE: --vae-precision float32), or run it on the CPU or GPU in float32"
