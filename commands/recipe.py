"""The verb that finds which layers need more bits: recipe."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import as_json, bar, engine_of, engine_options, give, overwrite, say

if TYPE_CHECKING:
    from glassine.runtime.engine import EngineOptions


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--decibels", type=float, help="Signal to noise of the UNet's output to reach, with the fewest bytes.")
@click.option("--megabytes", type=float, help="Size of the UNet's weights to stay within, with the least noise.")
@click.option(
    "--forms", default="4,6,8", show_default=True, help="To choose from, the fewest bits first; fp16 is the last."
)
@click.option("--out", "-o", type=click.Path(path_type=Path, dir_okay=False), default=Path("recipe.json"),
              show_default=True, help="The recipe to write.")  # fmt: skip
@overwrite
@engine_options
@as_json
def recipe(source: Path, out: Path, as_json: bool, **asked: Any) -> None:
    """Find which layers of a UNet need more bits.

    SOURCE is a checkpoint. Each group of layers is stored in the fewest bits, alone, and the UNet runs: what that does
    to its output decides who gets more. The recipe is for convert --palette.

    \b
    Example:
      glassine recipe dreamshaper_8.safetensors --decibels 25 -o recipe.json
      glassine recipe dreamshaper_8.safetensors --megabytes 600
    """
    from glassine.convert import recipe as recipes
    from glassine.convert.checkpoint import open_checkpoint
    from glassine.convert.detect import detect
    from glassine.convert.imports import import_coremltools_quietly_later
    from glassine.convert.palettize import Form
    from glassine.errors import PackageError

    if (asked["decibels"] is None) == (asked["megabytes"] is None):
        raise click.UsageError("give --decibels or --megabytes, one of the two")
    if out.exists() and not asked["overwrite"]:
        raise PackageError(f"{out}: exists; choose another name or say --overwrite")
    forms = [Form.read(words) for words in asked["forms"].split(",")]
    import_coremltools_quietly_later()
    detected = detect(open_checkpoint(source))
    scratch = tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".glassine_recipe_")
    with scratch as place, closing(_Run(engine_of(asked))) as run, bar("") as advance:
        judge = recipes.Judge(detected.family.unet, detected.parts["unet"], Path(place), run)
        groups = recipes.measure(judge, forms, advance)
        chosen = recipes.choose(groups, forms, megabytes=asked["megabytes"], decibels=asked["decibels"])
        palette = recipes.recipe(groups, chosen)
        noise = judge.noise(palette)
    measured = {
        "expected_db": round(recipes.signal_to_noise(groups, chosen, forms[0]), 2),
        "measured_db": round(-10 * math.log10(noise), 2) if noise else None,
        "megabytes": round(sum(group.bits[chosen[group.name]] for group in groups) / 8e6, 2),
        "forms": {name: "fp16" if form is None else str(form) for name, form in chosen.items()},
    }
    recipes.write_recipe(out, palette, measured)
    say(f"{measured['megabytes']} MB, {measured['measured_db']} dB (expected {measured['expected_db']})")
    give({"path": str(out), **measured}, str(out), as_json)


class _Run:
    """Runs the package on the same random inputs every time."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._engine: Any = None

    def __call__(self, package: Path, changed: Collection[int]) -> Any:
        import numpy as np

        from glassine.runtime.engine import open_engine

        if hasattr(self._engine, "reread"):
            self._engine.reread(changed)
        else:  # the first time; and Core ML compiles the weights into the model
            self.close()
            self._engine = open_engine(package, self._options)
        inputs = self._engine.inputs
        rng = np.random.default_rng(0)
        given = {name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in inputs.items()}
        given["timestep"] = np.full(inputs["timestep"].shape, 500.0, np.float32)
        return np.array(self._engine.predict(**given)["noise_pred"])

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
