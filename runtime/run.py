"""One picture in the making: request and inputs -> conditioning, noise, steps -> a finished picture."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glassine import __version__
from glassine.errors import RequestError
from glassine.runtime.branches import PIX2PIX, guidance_of
from glassine.runtime.change_map import n_table, to_cells
from glassine.runtime.control import recorded
from glassine.runtime.decode import CELL, composite, decode_latents, preview
from glassine.runtime.denoiser import Control, Denoiser, Relay
from glassine.runtime.inputs import Inputs
from glassine.runtime.layer_attention import COLLAGE_UNET, LayerAttention
from glassine.runtime.loop import Model, Step, denoising_steps
from glassine.runtime.metadata import text_chunks
from glassine.runtime.noise import StepNoise, randn
from glassine.runtime.plan import Need, needs, unet_of
from glassine.runtime.request import Request
from glassine.runtime.samplers import SAMPLERS, Sampler
from glassine.runtime.schedule import NoiseSchedule, Sigmas, handover, last_steps, make_sigmas
from glassine.runtime.steering import Steered, steered
from glassine.runtime.transparency import Health

if TYPE_CHECKING:
    from glassine.runtime.pipeline import Pipeline

Float = NDArray[np.float32]
PREVIEW_DECODER = "preview_decoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished picture.

    pixels: (H, W, 3) uint8; (H, W, 4), straight alpha, of a transparent picture. latents: (1, 4, h, w) float32.
    evaluations: model evaluations made. seconds: by stage. notices: what the user should know. text: the PNG text
    chunks from which it can be drawn again.
    With transparency: layers: every picture that the run drew, by its name, such as "fg"; grey: (H, W, 3) the
    transparent one as the VAE shows it; health: its figures.
    """

    pixels: NDArray[np.uint8]
    latents: Float
    evaluations: int
    seconds: dict[str, float]
    notices: tuple[str, ...]
    text: dict[str, str]
    icc_profile: bytes | None = None
    layers: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    grey: NDArray[np.uint8] | None = None
    health: Health | None = None

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.pixels)


class Run:
    """One picture in the making: iterating makes the denoising steps, `finish` those that are left and the decoding.

    Attributes:
        n: (1, 1, h, w) how many evaluations may touch each latent cell; None where there is no change map.
        steps: denoising steps this run makes.
        notices: what the user should know: cut prompts, resized pictures.
        frames: pictures that are drawn together.
    """

    frames = 1

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
        changed = inputs.image if not self._from_noise() else None
        if changed is not None:
            self._sigmas = last_steps(self._sigmas, request.strength)
        scheduled = len(self._sigmas) - 1
        self.n = self._table()
        self.steps = scheduled if self.n is None else int(self.n.max())
        pipe.load_ahead(self._needs())
        if changed is not None:
            self._source = self._source_latents(changed)
        self._model, self.notices = self._prepare_model()
        self._generator = self._draw()
        self._seconds["prepare"] = time.perf_counter() - start

    def __iter__(self) -> Iterator[Step]:
        return self._generator

    def preview(self, step: Step) -> NDArray[np.uint8]:
        """Return a rough picture (H, W, 3) uint8 of what the step predicts.

        In about a millisecond, or by the model's preview decoder where it has one.
        """
        if self._pipe.manifest.part(PREVIEW_DECODER, self._pipe.size) is not None:
            predict = self._pipe.engine(PREVIEW_DECODER).predict
            return decode_latents(predict, step.denoised[:1].astype(np.float32, copy=False), latent_scale=1.0)
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
            notices=self._all_notices(),
            text=self._text_chunks(),
            icc_profile=self._inputs.icc_profile,
        )

    def _all_notices(self) -> tuple[str, ...]:
        """What there is to say, with what engines said that were loaded since the run was prepared."""
        pipes = [pipe for pipe in (self._pipe, self._pipe.refiner) if pipe is not None]
        return tuple(dict.fromkeys((*self.notices, *(notice for pipe in pipes for notice in pipe.notices))))

    def _draw(self) -> Generator[Step, None, None]:
        """The loop, with the time it takes counted without the caller's own."""
        loop = denoising_steps(
            self._model,
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

    def _from_noise(self) -> bool:
        """Whether drawing starts from noise although there is a picture: instruct-pix2pix sees it at every step."""
        everything = self._inputs.change_map is None and self.request.strength == 1
        return everything and self._pipe.unet_inputs["sample"][1] == PIX2PIX

    def _table(self) -> NDArray[np.int64] | None:
        """The n-table of the change map."""
        if self._inputs.change_map is None:
            return None
        cells = to_cells(self._inputs.change_map)
        return n_table(cells, self._sigmas, self.request.rule, total=self.request.steps, schedule=self._pipe.schedule)

    def _source_latents(self, image: Float) -> Float:
        return self._pipe.source_latents(image)

    def _prepare_model(self) -> tuple[Model, tuple[str, ...]]:
        """The UNet with both prompts, its refiner behind it, and what there is to say about them."""
        model, notices = self._denoiser(self._pipe)
        refiner, start = self._pipe.refiner, self._handover()
        if refiner is None or start == len(self._sigmas) - 1:
            return model, (*self._pipe.notices, *self._inputs.notices, *notices)
        refined, said = self._denoiser(refiner)
        further = tuple(notice for notice in said if notice not in notices)
        return Relay(model, refined, start), (*self._pipe.notices, *self._inputs.notices, *notices, *further)

    def _needs(self) -> tuple[Need, ...]:
        """The parts that this run will use."""
        pipe, own = self._pipe, self._handover()
        scheduled = len(self._sigmas) - 1
        return needs(
            self.request,
            self._inputs,
            pipe.manifest,
            pipe.size,
            steps=self.steps,
            refiner=pipe.refiner.manifest if pipe.refiner is not None and own < scheduled else None,
            refined=min(self.steps, scheduled - own) if pipe.refiner is not None else 0,
        )

    def _handover(self) -> int:
        """The first step that would be a refiner's."""
        return handover(self._pipe.schedule, self._sigmas, self.request.refine_at)

    def _denoiser(self, pipe: Pipeline) -> tuple[Denoiser, tuple[str, ...]]:
        """One UNet with what its branches read."""
        inputs = self._inputs
        if pipe is not self._pipe:  # a refiner has a text encoder of its own
            inputs = dataclasses.replace(
                inputs, context=None, pooled=None, negative_context=None, negative_pooled=None, words=None
            )
        guidance, notices = guidance_of(pipe, self.request, inputs, self.n)
        unet = self._steered(pipe, unet_of(inputs))
        control: Control | None = unet.control
        if inputs.words is not None:
            control = LayerAttention(inputs.words, pipe.inputs(COLLAGE_UNET), unet.rows, unet.control)
        denoiser = Denoiser(
            unet.predict,
            pipe.schedule,
            guidance,
            rows=unet.rows,
            prediction=pipe.prediction(self.request),
            control=control,
        )
        return denoiser, notices

    def _steered(self, pipe: Pipeline, role: str) -> Steered:
        """A UNet, and what steers it: nothing steers a refiner. Shares of the steps are of those that the run makes."""
        controls = self._inputs.controls if pipe is self._pipe else ()
        return steered(pipe, controls, role=role, first=len(self._sigmas) - 1 - self.steps, steps=self.steps)

    def _noise(self) -> Float:
        """The initial noise e."""
        width, height = self._pipe.size
        shape = (self.frames, 4, height // CELL, width // CELL)
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
        return text_chunks(
            dataclasses.asdict(self.request),
            version=__version__,
            size=self._pipe.size,
            model=self._model_record(),
            inputs=self._inputs.files,
            controls=[recorded(ready) for ready in self._inputs.controls],
            collage=self._inputs.collage,
        )

    def _model_record(self) -> dict[str, str]:
        manifest = self._pipe.manifest
        model = {"name": manifest.name}
        if manifest.parts["unet"].source_sha256:  # what others converted does not say what it was made of
            model["sha256"] = manifest.parts["unet"].source_sha256
        if manifest.loras:
            merged = (f"{lora.name}={lora.unet:g},{lora.text:g} {lora.sha256[:12]}" for lora in manifest.loras)
            model["loras"] = "; ".join(merged)
        if self._pipe.refiner is not None:
            model["refiner"] = self._pipe.refiner.manifest.name
        return model


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
