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

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine import __version__
from glassine.errors import PackageError, RequestError
from glassine.manifest import Manifest
from glassine.runtime.change_map import n_table, to_cells
from glassine.runtime.conditioning import EncodedPrompt, encode_prompt
from glassine.runtime.decode import SD1_PREVIEW, composite, decode_latents, measure_preview, preview
from glassine.runtime.denoiser import Conditioning, Denoiser, Guidance
from glassine.runtime.engine import Engine, EngineOptions, open_engine
from glassine.runtime.image import Source
from glassine.runtime.inputs import Inputs, MapSource, read_inputs
from glassine.runtime.latents import encode_image
from glassine.runtime.loop import Step, denoising_steps
from glassine.runtime.metadata import text_chunks
from glassine.runtime.noise import StepNoise, randn
from glassine.runtime.request import DEFAULT_STRENGTH, Request
from glassine.runtime.samplers import SAMPLERS, Sampler
from glassine.runtime.schedule import NoiseSchedule, Sigmas, last_steps, make_sigmas
from glassine.runtime.tokenizer import Tokenizer

Float = NDArray[np.float32]
Output = Literal["pil", "numpy", "latent"]
T = TypeVar("T")

CELL = 8  # pixels a side of one latent cell
SD1_DECODER_PARAMETERS = 49_490_199  # a decoder of this size is taken for Stable Diffusion's own
_REMEMBERED = 8  # prompts and source pictures whose encodings are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished picture.

    pixels: (H, W, 3) uint8. latents: (1, 4, h, w) float32. evaluations: model evaluations made. seconds: by stage.
    notices: what the user should know. text: the PNG text chunks from which it can be drawn again.
    """

    pixels: NDArray[np.uint8]
    latents: Float
    evaluations: int
    seconds: dict[str, float]
    notices: tuple[str, ...]
    text: dict[str, str]
    icc_profile: bytes | None = None

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.pixels)


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


class Run:
    """One picture in the making: iterating makes the denoising steps, `finish` those that are left and the decoding.

    Attributes:
        n: (1, 1, h, w) how many evaluations may touch each latent cell; None where there is no change map.
        steps: denoising steps this run makes.
        notices: what the user should know: cut prompts, resized pictures.
    """

    def __init__(self, pipe: Pipeline, request: Request, inputs: Inputs) -> None:
        self.request = request
        self._pipe = pipe
        self._inputs = inputs
        self._seconds = {"prepare": 0.0, "denoise": 0.0, "decode": 0.0}
        self._evaluations = 0
        self._latents: Float | None = None
        start = time.perf_counter()
        self._sampler = choose_sampler(request).on(pipe.schedule)
        self._sigmas = sigmas_of(pipe.schedule, request)
        self._source: Float | None = None
        if inputs.image is not None:
            self._sigmas = last_steps(self._sigmas, request.strength)
            self._source = pipe.source_latents(inputs.image)
        scheduled = len(self._sigmas) - 1
        self.n = self._table()
        self.steps = scheduled if self.n is None else int(self.n.max())
        self._denoiser, self.notices = self._prepare_denoiser()
        self._generator = self._draw()
        self._seconds["prepare"] = time.perf_counter() - start

    def __iter__(self) -> Iterator[Step]:
        return self._generator

    def preview(self, step: Step) -> NDArray[np.uint8]:
        """Return a rough picture (H, W, 3) uint8 of what the step predicts, in about a millisecond."""
        return preview(step.denoised.astype(np.float32, copy=False), self._pipe.preview_matrix())

    def cancel(self) -> None:
        """Stop drawing for good. A loop that is merely left can still be taken up again, or finished."""
        self._generator.close()

    def finish(self) -> Result:
        """Make the steps that are left, decode, and put the protected pixels back.

        Raises:
            RequestError: the run was cancelled.
            EngineError: a package returned something that is not a picture.
        """
        for _ in self._generator:
            pass
        if self._latents is None:
            raise RequestError("this run was cancelled; there is no picture to finish")
        start = time.perf_counter()
        pixels = self._pixels(self._latents)
        self._seconds["decode"] = time.perf_counter() - start
        return Result(
            pixels=pixels,
            latents=self._latents,
            evaluations=self._evaluations,
            seconds=dict(self._seconds),
            notices=self.notices,
            text=self._text_chunks(),
            icc_profile=self._inputs.icc_profile,
        )

    def _draw(self) -> Generator[Step, None, None]:
        """The loop, with the time it takes counted without the caller's own."""
        loop = denoising_steps(
            self._denoiser,
            self._sampler,
            self._sigmas,
            self._noise(),
            source=self._source,
            n=self.n,
            step_noise=self._step_noise(),
        )
        while True:
            start = time.perf_counter()
            try:
                step = next(loop)
            except StopIteration as end:
                self._latents = end.value
                return
            finally:
                self._seconds["denoise"] += time.perf_counter() - start
            self._evaluations = step.evaluations
            yield step

    def _table(self) -> NDArray[np.int64] | None:
        """The n-table of the change map."""
        if self._inputs.change_map is None:
            return None
        cells = to_cells(self._inputs.change_map)
        return n_table(cells, self._sigmas, self.request.rule, total=self.request.steps, schedule=self._pipe.schedule)

    def _prepare_denoiser(self) -> tuple[Denoiser, tuple[str, ...]]:
        """The UNet with both prompts, and what there is to say about them and about the input files."""
        request, manifest = self.request, self._pipe.manifest
        cond, said = self._context(self._inputs.context, request.prompt)
        uncond: Conditioning | None = None
        said_too: tuple[str, ...] = ()
        if request.guidance_scale != 1:
            uncond, said_too = self._context(self._inputs.negative_context, request.negative_prompt)
        guidance = Guidance(cond=cond, uncond=uncond, scale=request.guidance_scale, rescale=request.guidance_rescale)
        denoiser = Denoiser(
            lambda **arrays: self._pipe.engine("unet").predict(**arrays),
            self._pipe.schedule,
            guidance,
            rows=manifest.batch,
            prediction=manifest.prediction_type,
        )
        return denoiser, (*self._inputs.notices, *said, *said_too)

    def _context(self, given: Float | None, prompt: str) -> tuple[Conditioning, tuple[str, ...]]:
        """Conditioning in the UNet's layout (1, width, 1, tokens), made elsewhere or encoded here."""
        notices: tuple[str, ...] = ()
        if given is None:
            encoded = self._pipe.encode(prompt, self.request)
            given, notices = encoded.context, encoded.notices
        return Conditioning(context=np.ascontiguousarray(given.transpose(0, 2, 1)[:, :, None])), notices

    def _noise(self) -> Float:
        """The initial noise e."""
        width, height = self._pipe.size
        shape = (1, 4, height // CELL, width // CELL)
        given = self._inputs.latents
        if given is None:
            return randn(self.request.seed, shape, self.request.noise)
        if given.shape != shape:
            raise RequestError(f"latents have shape {given.shape}, expected {shape} for {width}x{height} pixels")
        return np.asarray(given, dtype=np.float32)

    def _step_noise(self) -> Callable[[int, tuple[int, ...]], Float]:
        given = self._inputs.noise
        if given is not None:
            return lambda index, _: given(index)
        return StepNoise(self.request.seed, self.request.noise)

    def _pixels(self, latents: Float) -> NDArray[np.uint8]:
        source = self._inputs.pixels
        if source is not None and self.steps == 0:
            return source
        manifest = self._pipe.manifest
        decoded = decode_latents(self._pipe.engine("vae_decoder").predict, latents, latent_scale=manifest.latent_scale)
        if source is None or self.n is None:
            return decoded
        return composite(decoded, source, self.n[0, 0])

    def _text_chunks(self) -> dict[str, str]:
        """What the picture says about itself."""
        manifest = self._pipe.manifest
        model = {"name": manifest.name, "sha256": manifest.parts["unet"].source_sha256}
        return text_chunks(
            dataclasses.asdict(self.request),
            version=__version__,
            size=self._pipe.size,
            model=model,
            inputs=self._inputs.files,
        )


def choose_sampler(request: Request) -> Sampler:
    """The sampler a request names, with its eta.

    Raises:
        RequestError: no such sampler, or it has no eta.
    """
    if request.sampler not in SAMPLERS:
        raise RequestError(f"sampler is {request.sampler!r}, expected one of {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[request.sampler]
    return sampler if request.eta is None else sampler.using(eta=request.eta)


def sigmas_of(schedule: NoiseSchedule, request: Request) -> Sigmas:
    """Return the noise levels of a request at full strength: (steps + 1,), in its spacing or its sampler's own."""
    spacing = request.spacing if request.spacing is not None else choose_sampler(request).spacing
    return make_sigmas(schedule, request.steps, spacing)


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
