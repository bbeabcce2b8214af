"""Pictures in layers: which runs draw them, and how they are written.

    joint      words -> foreground, background, and both together ("blend")
    fg2bg      a cut-out foreground -> the background behind it
    bg2fg      a background -> a foreground in front of it
    extract    a finished picture and one of its layers -> the other layer

Stable Diffusion 1.5's layer models draw all their pictures in one run; SDXL's draw first the blend, then the missing
layer from both. `given` and drawn layers end in one `Stack`, back to front: a folder of PNGs and an OpenRaster file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from glassine.errors import PackageError, RequestError
from glassine.runtime.compose import opaque, over
from glassine.runtime.decode import CELL
from glassine.runtime.image import Fit, Source, fit_picture, read_picture, save_png
from glassine.runtime.inputs import Inputs
from glassine.runtime.layer_run import alpha_decoder
from glassine.runtime.openraster import Layer, save_openraster
from glassine.runtime.request import Request
from glassine.runtime.run import Result, Run
from glassine.runtime.transparency import Health, Passes, health, to_bytes

if TYPE_CHECKING:
    from glassine.runtime.pipeline import Pipeline

Bytes = NDArray[np.uint8]
Task = Literal["joint", "fg2bg", "bg2fg", "extract"]
Draw = Callable[[Run], Result]

NAMES = {"bg": "background", "fg": "foreground", "blend": "blend"}
# task, and the layers given -> the chains of kinds that can do it, the single run of SD 1.5 first
CHAINS: dict[tuple[Task, tuple[str, ...]], tuple[tuple[str, ...], ...]] = {
    ("joint", ()): (("joint",),),
    ("fg2bg", ("fg",)): (("fg2bg",), ("fg2ble", "fgble2bg")),
    ("bg2fg", ("bg",)): (("bg2fg",), ("bg2ble", "bgble2fg")),
    ("extract", ("bg", "blend")): (("bgble2fg",),),
    ("extract", ("blend", "fg")): (("fgble2bg",),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A picture in layers.

    layers: (H, W, 4) uint8, straight alpha, by "bg" and "fg". blend: (H, W, 3) or (H, W, 4), the whole picture as the
    model drew it or as it was given; None if there is none. results: of the runs, in their order.
    """

    layers: dict[str, Bytes]
    blend: Bytes | None
    results: tuple[Result, ...]

    @property
    def composite(self) -> Bytes:
        """The layers over each other, (H, W, 4) uint8."""
        return over([self.layers[name] for name in ("bg", "fg") if name in self.layers])


def draw_layers(
    pipe: Pipeline,
    request: Request,
    task: Task,
    given: Mapping[str, Bytes] | None = None,
    *,
    draw: Draw = methodcaller("finish"),
) -> Stack:
    """Draw the layers that `task` asks for.

    Args:
        request: its prompt is about the whole picture; fg_prompt, bg_prompt and blend_prompt add to it for one picture
            alone. stop_at counts for the last run.
        given: (H, W, 4) uint8 of the model's size, by "fg", "bg", "blend": what the task starts from.
        draw: finishes a run, for those who watch it.

    Raises:
        RequestError: other layers than the task starts from, or a foreground that is not cut out.
        PackageError: the model has no UNet for this task.
    """
    known = dict(given) if given is not None else {}
    chain = _chain(pipe, task, tuple(sorted(known)))
    if "fg" in known:
        check_cutout(known["fg"])
    layers: dict[str, Bytes] = {name: known[name] for name in ("bg", "fg") if name in known}
    blend = known.get("blend")
    results = []
    for number, kind in enumerate(chain, 1):
        last = number == len(chain)
        run = pipe.run(
            dataclasses.replace(request, layers=kind, stop_at=request.stop_at if last else 1.0),
            Inputs(layers={name: known[name] for name in _reads(pipe, kind)}),
        )
        results.append(draw(run))
        for name, pixels in results[-1].layers.items():
            known[name] = pixels if pixels.shape[-1] == 4 else opaque(pixels)
            if name == "blend":
                blend = pixels
            else:
                layers[name] = known[name]
    return Stack(layers=layers, blend=blend, results=tuple(results))


def _chain(pipe: Pipeline, task: Task, given: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of UNet to run one after the other."""
    starts = {names for asked, names in CHAINS if asked == task}
    if given not in starts:
        wanted = " or ".join(" and ".join(names) if names else "nothing" for names in sorted(starts))
        raise RequestError(f"{task}: got the layers {', '.join(given) if given else 'none'}, expected {wanted}")
    chains = CHAINS[task, given]
    for chain in chains:
        if all(pipe.manifest.part(f"{kind}_unet", pipe.size) is not None for kind in chain):
            return chain
    files = " or ".join(" and ".join(chain) for chain in chains)
    raise PackageError(
        f"{pipe.folder}: this model cannot {task} at {pipe.size[0]}x{pipe.size[1]}; add LayerDiffuse's {files} with: "
        f"glassine convert FILE --base {pipe.folder}"
    )


def _reads(pipe: Pipeline, kind: str) -> list[str]:
    """The layers that a kind of UNet is given."""
    part = pipe.manifest.part(f"{kind}_unet", pipe.size)
    about = {} if part is None else part.about
    control = about.get("control")
    return [*about.get("conditions", []), *([control] if control is not None else [])]


def read_layer(source: Source, width: int, height: int, *, name: str, fit: Fit = "crop") -> Bytes:
    """Read a layer as (H, W, 4) uint8, straight alpha, of the model's size.

    Raises:
        RequestError: it cannot be read.
    """
    return fit_picture(read_picture(source, name=name, keep_alpha=True), width, height, fit).pixels


def check_cutout(rgba: Bytes, name: str = "foreground") -> None:
    """Raise RequestError unless a picture has both transparent and visible parts."""
    if rgba[..., 3].min() == 255:
        raise RequestError(
            f"{name}: is opaque everywhere; expected a cut-out with an alpha channel (RGBA), such as "
            "'glassine generate --transparent' draws"
        )
    if not rgba[..., 3].any():
        raise RequestError(f"{name}: is fully transparent (alpha is 0 everywhere); there is nothing to draw around")


def alpha_of_grey(pipe: Pipeline, pixels: Bytes, passes: Passes = 8) -> tuple[Bytes, Health]:
    """Read alpha from a picture of an object on mid-grey alone, as LayerDiffuse does for pictures made larger.

    The transparent decoder gets zeros in the place of latents, for which it was trained too.

    Args:
        pixels: (H, W, 3) uint8 of the model's size.

    Returns:
        (H, W, 4) uint8, straight alpha, and how far it can be trusted.
    """
    pixel = np.asarray(np.moveaxis(pixels, -1, 0)[None], np.float32) / np.float32(255)
    height, width = pixels.shape[:2]
    argb = alpha_decoder(pipe)(pixel, np.zeros((1, 4, height // CELL, width // CELL), np.float32), passes)
    return to_bytes(np.moveaxis(argb[[1, 2, 3, 0]], 0, -1)), health(argb, pixel[0])


def save_stack(folder: Path, stack: Stack, *, overwrite: bool = False) -> list[Path]:
    """Write a stack into a folder: its layers, blend and composite as PNG, all layers as `layers.ora`.

    Returns:
        The paths written, the OpenRaster file first.

    Raises:
        RequestError: the folder holds one of these files already, or cannot be written.
    """
    check_folder(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be made ({error.strerror})") from None
    text = {name: result.text for result in stack.results for name in result.layers}
    pictures = {NAMES[name]: (pixels, text.get(name)) for name, pixels in stack.layers.items()}
    if stack.blend is not None:
        pictures[NAMES["blend"]] = (stack.blend, text.get("blend"))
    pictures["composite"] = (stack.composite, None)
    file = folder / "layers.ora"
    back_to_front = [
        Layer(name=NAMES[name], pixels=stack.layers[name]) for name in ("bg", "fg") if name in stack.layers
    ]
    save_openraster(file, back_to_front, overwrite=overwrite)
    paths = [file]
    for name, (pixels, chunks) in pictures.items():
        paths.append(folder / f"{name}.png")
        save_png(paths[-1], pixels, text=chunks, overwrite=overwrite)
    return paths


def check_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Raise RequestError if a stack cannot be written into `folder`: call it before drawing."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: is a file, expected a folder for the layers")
    names = ["layers.ora", "composite.png", *(f"{name}.png" for name in NAMES.values())]
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise RequestError(f"{folder}: holds {', '.join(there)} already; choose another folder or say --overwrite")
