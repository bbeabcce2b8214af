"""Other forms of a folder's UNet, for `glassine tune`: the same weights, another attention or another number of rows.

forms -> packages in a place of their own, to be timed | the one that won -> a part of the folder, "tuned_unet"

All of them live in the UNet's own weight.bin, hard-linked; what really differs (`sdpa` scales by itself, so that its
queries are stored unscaled) has records of its own behind it. As a part of the folder, with an index like all UNets,
the form gets every LoRA that the UNet gets, and loses it with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from glassine.convert.addition import add_networks
from glassine.convert.control import steered_unet
from glassine.convert.index import SUFFIX
from glassine.convert.network import Base, Form, Network, Size
from glassine.convert.packages import Report
from glassine.convert.swap import explained, locked
from glassine.manifest import Manifest, Part, finish_swap

ROLE = "tuned_unet"
PACKAGE = "TunedUnet"


def form_of(part: Part, tokens: int) -> Form:
    """The form that a UNet of a folder is written in."""
    rows = part.inputs["sample"][0][0]
    assert part.attention is not None
    assert part.layout is not None
    return Form(rows=rows, tokens=tokens, attention=part.attention, layout=part.layout)  # type: ignore[arg-type]


def name_of(form: Form) -> str:
    """The form in words."""
    return f"{form.attention}, batch {form.rows}"


def write_forms(folder: Path, size: Size, forms: Sequence[Form], place: Path, report: Report) -> dict[Form, Part]:
    """Write the UNet of a folder in other forms into `place`, an empty folder on the same disk; the folder stays as is.

    Raises:
        PackageError, ConversionError: the folder is of others, has LoRAs in its weights, or cannot be read back.
    """
    keys = {form: f"{ROLE}:{form.attention}_{form.rows}" for form in forms}
    names = {form: f"Unet_{form.attention}_{form.rows}" for form in forms}

    def listed(base: Base) -> list[Network]:
        return [_network(base, form, keys[form], names[form], size) for form in forms]

    manifest = add_networks(folder, [listed], report, place=place)
    return {form: manifest.parts[key + _suffix(manifest, size)] for form, key in keys.items()}


def keep_form(folder: Path, size: Size, form: Form, report: Report) -> Part:
    """Make the UNet in this form a part of the folder, in the place of another one.

    Raises:
        As `write_forms`.
    """
    drop_form(folder, size)
    manifest = add_networks(folder, [partial(_kept, form, size)], report)
    return manifest.parts[ROLE + _suffix(manifest, size)]


def drop_form(folder: Path, size: Size) -> None:
    """Remove the form that was kept in a folder, if there is one; the UNet stays, with what lies behind its weights."""
    manifest = Manifest.read(folder)
    key = ROLE + _suffix(manifest, size)
    if key not in manifest.parts:
        return
    with locked(folder) as store, explained(folder):
        manifest = Manifest.read(folder)
        part = manifest.parts[key]
        staged = store / "swap.partial"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        replace(manifest, parts={name: other for name, other in manifest.parts.items() if name != key}).write(staged)
        staged.rename(store / "swap")
        finish_swap(folder)
        for file in part.about.get("chunks", [part.file]):
            shutil.rmtree(folder / file, ignore_errors=True)
            (folder / f"{Path(file).stem}{SUFFIX}").unlink(missing_ok=True)


def _kept(form: Form, size: Size, base: Base) -> list[Network]:
    return [_network(base, form, ROLE, PACKAGE, size)]


def _network(base: Base, form: Form, key: str, package: str, size: Size) -> Network:
    options = replace(base.options, batch=form.rows, attention=form.attention, layout=form.layout)
    unet = steered_unet(replace(base, options=options), key, package)
    return replace(unet, role=ROLE, sizes=(size,), summary=f"Stable Diffusion's UNet, {name_of(form)}.")


def _suffix(manifest: Manifest, size: Size) -> str:
    return "" if size == (manifest.width, manifest.height) else f"_{size[0]}x{size[1]}"
