"""Glassine: Stable Diffusion on Core ML, with a strength for every pixel.

convert:   checkpoint -> weights -> network -> program -> package -> verify
generate:  prompt / image / change map -> conditioning -> latents -> loop(denoiser, sampler, blend) -> decode -> image
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glassine.runtime.collage import Collage, Layer
    from glassine.runtime.control import Control
    from glassine.runtime.pipeline import Pipeline

__version__ = "0.4.0"
__all__ = ["Collage", "Control", "Layer", "Pipeline", "__version__"]


def __getattr__(name: str) -> object:
    # Loaded on first use, so that `import glassine` and `glassine --help` answer at once.
    if name == "Pipeline":
        from glassine.runtime.pipeline import Pipeline

        return Pipeline
    if name == "Control":
        from glassine.runtime.control import Control

        return Control
    if name in ("Collage", "Layer"):
        from glassine.runtime import collage

        return getattr(collage, name)
    raise AttributeError(f"module 'glassine' has no attribute {name!r}")
