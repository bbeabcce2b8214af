"""A converted model, ready to draw: loads its parts when they are needed and hands the arrays along.

pipe = glassine.Pipeline.load("dreamshaper")
image = pipe("a paper boat on a lake", seed=7)
image = pipe("a swan", image=image, change_map="gradient:left-right")

run = pipe.run(Request(prompt="a paper boat", steps=30))
for step in run:                      # one denoising step at a time; leave the loop to cancel
    show(run.preview(step))
result = run.finish()                 # decode what has been drawn
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from glassine.errors import PackageError
from glassine.manifest import Manifest
from glassine.runtime.conditioning import EncodedPrompt, encode_prompt
from glassine.runtime.decode import CELL, SD1_PREVIEW, measure_preview
from glassine.runtime.engine import Engine, EngineOptions, open_engine
from glassine.runtime.image import Source
from glassine.runtime.inputs import Inputs, MapSource, read_inputs
from glassine.runtime.latents import encode_image
from glassine.runtime.request import DEFAULT_STRENGTH, Request
from glassine.runtime.run import Run
from glassine.runtime.schedule import NoiseSchedule
from glassine.runtime.tokenizer import Tokenizer

Float = NDArray[np.float32]
Output = Literal["pil", "numpy", "latent"]
T = TypeVar("T")

SD1_DECODER_PARAMETERS = 49_490_199  # a decoder of this size is taken for Stable Diffusion's own
_REMEMBERED = 8  # prompts and source pictures whose encodings are kept


class Pipeline:
    """A converted model folder and the engines that run its parts; use `load`, and close it or use `with`."""

    def __init__(self, folder: Path, manifest: Manifest, options: EngineOptions, size: tuple[int, int]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.size = size
        self.schedule = NoiseSchedule(manifest.scheduler)
        self._options = options
        self._engines: dict[str, Engine] = {}
        self._tokenizer: Tokenizer | None = None
        self._preview_matrix: Float | None = None
        self._prompts: OrderedDict[object, EncodedPrompt] = OrderedDict()
        self._sources: OrderedDict[object, Float] = OrderedDict()

    @classmethod
    def load(
        cls, folder: Path | str, options: EngineOptions | None = None, *, size: tuple[int, int] | None = None
    ) -> Pipeline:
        """Open a folder made by `glassine convert`; its packages are loaded when they are first needed.

        Args:
            folder: the model.
            options: how to run its packages.
            size: (width, height) in pixels, one of those it was converted for; None is the first.

        Raises:
            PackageError: the folder or its manifest is missing or damaged, or has no packages of this size.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        size = manifest.sizes[0] if size is None else size
        if size not in manifest.sizes:
            raise PackageError(
                f"{folder}: converted for {_spelled(*manifest.sizes)}, not for {_spelled(size)}; "
                f"convert it again with --size {_spelled(size)} too"
            )
        return cls(folder, manifest, options if options is not None else EngineOptions(), size)

    def __call__(
        self,
        prompt: str = "",
        *,
        image: Source | None = None,
        change_map: Source | None = None,
        mask: Source | None = None,
        softness: float = 0.0,
        output: Output = "pil",
        inputs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """Draw one picture.

        Args:
            prompt: what to draw, in A1111's syntax.
            image: the picture to change: a path, PIL image or (H, W, 3) uint8 array.
            change_map: how much each pixel of it may change: a path, array in [0, 1] or words (docs/change-maps.md).
            mask, softness: instead of a map: what may change, and pixels of soft border outside it.
            output: "pil" an image, "numpy" (H, W, 3) uint8, "latent" (1, 4, h, w) float32.
            inputs: arrays made elsewhere, by the names of `Inputs`: latents, noise, context, negative_context.
            settings: the fields of `Request`, such as steps, sampler, seed, strength, guidance_scale.

        Raises:
            RequestError: a setting, picture or map cannot be drawn with.
            EngineError: a package cannot be run.
        """
        if image is not None and change_map is None and mask is None:
            settings.setdefault("strength", DEFAULT_STRENGTH)
        request = Request(prompt=prompt, **settings)
        maps = MapSource(map=change_map, mask=mask, softness=softness)
        read = read_inputs(image, maps, *self.size, fit=request.fit, **(inputs if inputs is not None else {}))
        result = self.run(request, read).finish()
        if output == "latent":
            return result.latents
        return result.pixels if output == "numpy" else result.image

    def run(self, request: Request, inputs: Inputs | None = None) -> Run:
        """Prepare one picture: iterate over the steps of the returned `Run`, or just call its `finish`."""
        return Run(self, request, inputs if inputs is not None else Inputs())

    def engine(self, role: str) -> Engine:
        """Return the engine of one part ("unet", "text_encoder", "vae_encoder", "vae_decoder"), loaded on first use.

        Raises:
            PackageError: the model has no such part.
            EngineError: its package cannot be loaded.
        """
        if role not in self._engines:
            part = self.manifest.part(role, self.size)
            if part is None:
                raise PackageError(
                    f"{self.folder}: this model has no {role}, only {sorted(self.manifest.parts)}; "
                    "convert a whole checkpoint to draw with it"
                )
            self._engines[role] = open_engine(self.folder / part.file, self._options)
        return self._engines[role]

    def encode(self, text: str, request: Request) -> EncodedPrompt:
        """Return the text as the UNet reads it; remembered, so that a change of seed or map costs nothing."""
        clip_skip = request.clip_skip if request.clip_skip is not None else self.manifest.clip_skip

        def encode() -> EncodedPrompt:
            return encode_prompt(
                self.engine("text_encoder").predict,
                self.tokenizer,
                text,
                tokens=self.manifest.tokens,
                clip_skip=clip_skip,
                emphasis=request.emphasis,
            )

        return _remember(self._prompts, (text, clip_skip, request.emphasis), encode)

    def source_latents(self, image: Float) -> Float:
        """Return the latents z (1, 4, h, w) of a picture (1, 3, H, W) in [-1, 1]: the posterior's mean; remembered."""

        def encode() -> Float:
            return encode_image(self.engine("vae_encoder").predict, image, latent_scale=self.manifest.latent_scale)

        return _remember(self._sources, image.tobytes(), encode)

    def preview_matrix(self) -> Float:
        """Return the (5, 3) matrix from latents to colours: Stable Diffusion's, or one measured on this model's VAE."""
        part = self.manifest.part("vae_decoder", self.size)
        if part is None or part.parameters == SD1_DECODER_PARAMETERS:
            return SD1_PREVIEW
        if self._preview_matrix is None:
            width, height = self.size
            self._preview_matrix = measure_preview(
                self.engine("vae_decoder").predict,
                height=height // CELL,
                width=width // CELL,
                latent_scale=self.manifest.latent_scale,
            )
        return self._preview_matrix

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own vocabulary."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.folder)
        return self._tokenizer

    def close(self) -> None:
        """Unload every part."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _spelled(*sizes: tuple[int, int]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def _remember(memory: OrderedDict[object, T], key: object, make: Callable[[], T]) -> T:
    """Look `key` up, or make it and forget the oldest."""
    if key not in memory:
        memory[key] = make()
        if len(memory) > _REMEMBERED:
            memory.popitem(last=False)
    memory.move_to_end(key)
    return memory[key]
