"""The ways there are to run the parts of a model, for `tune`: as converted, and UNets in other forms.

The forms are written into FOLDER/.glassine/tune for as long as they are tried, on the weights of the UNet; what a
killed command leaves there, the next one removes. The one that won is written anew, as a part of the folder.

Text encoders, VAEs and control networks have one form: a VAE's attention is one layer of thirty, and a text encoder
runs once a picture.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from glassine.commands.options import say
from glassine.errors import GlassineError, PackageError
from glassine.manifest import FILE_NAME, STORE, TUNED, Manifest, Part

if TYPE_CHECKING:
    from glassine.convert.network import Form
    from glassine.models.config import Attention, Layout
    from glassine.runtime.engine import EngineOptions
    from glassine.runtime.foreign import Model
    from glassine.runtime.tuning import Way

Size = tuple[int, int]
_SDPA = (15,)  # the first macOS that has the fused operation
_PIX2PIX = 8  # channels of an instruct-pix2pix UNet, which has a third branch: the picture's


def own_ways(found: Model, size: Size, roles: tuple[str, ...]) -> dict[str, Way]:
    """The parts of a model, or those of these roles, as they were converted.

    Raises:
        PackageError: it has no such part.
    """
    from glassine.runtime.bench.model import parts_of
    from glassine.runtime.tuning import Way

    parts = {role: part for role, part in parts_of(found.manifest, size, roles).items() if not role.startswith(TUNED)}
    return {
        role: Way(part=part, folder=found.folder, form=_words(part), calls=_calls(found.manifest, part))
        if _is_unet(part)
        else Way(part=part, folder=found.folder)
        for role, part in parts.items()
    }


def _is_unet(part: Part) -> bool:
    return part.role == "unet" or part.role.endswith("_unet")


def _words(unet: Part) -> str:
    from glassine.convert.forms import rows_of

    attention = "" if unet.attention is None else f"{unet.attention}, "
    return f"{attention}batch {rows_of(unet)}"


def _calls(manifest: Manifest, unet: Part) -> int:
    """The calls of a UNet that one step takes."""
    from glassine.convert.forms import rows_of

    return math.ceil(_branches(manifest) / rows_of(unet))


def _branches(manifest: Manifest) -> int:
    """The rows that guidance takes: the prompt's and the negative prompt's, or the prompt's alone."""
    inputs = manifest.parts["unet"].inputs
    if "timestep_cond" in inputs or manifest.defaults.get("guidance_scale") == 1:
        return 1
    return 3 if inputs["sample"][0][1] == _PIX2PIX else 2


@contextmanager
def other_forms(
    found: Model, size: Size, options: EngineOptions, own: Mapping[str, Way], notes: list[str]
) -> Iterator[dict[str, dict[Form, Way]]]:
    """The UNets of a model in other forms, by role, which are there while this lasts; why there are none: in `notes`.

    Args:
        own: the parts to tune; there are forms of UNets alone.
    """
    unets = {role: way.part for role, way in own.items() if _is_unet(way.part)}
    if not unets:
        yield {}
        return
    if not (found.folder / FILE_NAME).is_file():
        notes += [
            f"{role}: attention and batch stay as they are: Glassine did not convert this folder" for role in unets
        ]
        yield {}
        return
    from glassine.convert.forms import name_of, write_forms
    from glassine.convert.imports import import_coremltools_quietly_later
    from glassine.runtime.tuning import Way

    import_coremltools_quietly_later()
    with _workshop(found.folder) as place:
        ways: dict[str, dict[Form, Way]] = {}
        for role, unet in unets.items():
            wanted = _wanted(found.manifest, unet, options)
            if not wanted:
                continue
            say(f"{role}: writing {len(wanted)} other forms of it")
            try:
                written = write_forms(found.folder, size, role, wanted, place, lambda progress: None)
            except GlassineError as error:
                notes.append(f"{role}: attention and batch stay as they are: {error}")
                continue
            ways[role] = {
                form: Way(part=part, folder=place, form=name_of(form), own=False, calls=_calls(found.manifest, part))
                for form, part in written.items()
            }
            if "chunks" in unet.about:
                notes.append(f"{role}: its attention stays: each other one would need weight files of its own")
        yield ways


def _wanted(manifest: Manifest, unet: Part, options: EngineOptions) -> list[Form]:
    """Every attention that runs here with every number of rows that guidance can use, but for the UNet's own form.

    Chunks have their own attention alone: others store what they read in another order. Patched UNets have their own
    rows alone, which what else they read comes in, and do not change between the fused attention and the others: it
    has its queries in another scale, and what is behind the weights is known by the plain UNet's names.
    """
    from glassine.convert.forms import form_of, is_patched
    from glassine.runtime.engine.contract import engine_name
    from glassine.runtime.machine import this_machine

    own = form_of(unet, manifest.tokens)
    fused = engine_name(options) == "portable" or this_machine().version >= _SDPA
    layouts: dict[Attention, Layout] = {"split": "channels_first", "einsum": "channels_last"}
    layouts |= {"sdpa": "channels_last"} if fused else {}
    rows = dict.fromkeys((own.rows, 1, _branches(manifest)))
    if is_patched(manifest, unet.role):
        rows = {own.rows: None}
        layouts = {one: layout for one, layout in layouts.items() if (one == "sdpa") == (own.attention == "sdpa")}
    if "chunks" in unet.about:
        layouts = {own.attention: own.layout}
    forms = [replace(own, rows=count, attention=a, layout=layout) for count in rows for a, layout in layouts.items()]
    return [form for form in forms if (form.rows, form.attention) != (own.rows, own.attention)]


def keep(found: Model, size: Size, role: str, form: Form | None) -> tuple[str, Part]:
    """Make this form of a UNet the one that the folder has besides it; None: none.

    Returns:
        The role of what plays the UNet from now on, and its part.

    Raises:
        PackageError: the folder cannot be changed.
    """
    from glassine.convert.forms import drop_forms, keep_form

    if form is not None:
        return TUNED + role, keep_form(found.folder, size, role, form, lambda progress: None)
    own = found.manifest.part(role, size)
    assert own is not None
    if (found.folder / FILE_NAME).is_file():
        drop_forms(found.folder, size, (role,))
    return role, own


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """An empty folder in a model's store, held against another `tune`; gone at the end."""
    place = folder / STORE / "tune"
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise PackageError(f"{folder}: cannot be changed: {error.strerror} ({error.filename})") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackageError(f"{folder}: another 'glassine tune' is at it; wait for it") from None
        try:
            _empty(place)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if place.parent.is_dir() and not any(place.parent.iterdir()):
                place.parent.rmdir()
    finally:
        os.close(lock)


def _empty(place: Path) -> None:
    """Remove what a killed command has left."""
    for entry in place.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
