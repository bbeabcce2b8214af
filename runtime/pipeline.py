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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from glassine.errors import PackageError, RequestError
from glassine.manifest import Manifest, Prediction
from glassine.runtime.branches import PIX2PIX
from glassine.runtime.conditioning import EncodedPrompt, encode_prompt, side_by_side
from glassine.runtime.control import Control
from glassine.runtime.control_pictures import with_controls
from glassine.runtime.decode import CELL, SD1_PREVIEW, measure_preview
from glassine.runtime.engine import Engine, EngineOptions, open_engine
from glassine.runtime.engine.compose import Chain, Renamed
from glassine.runtime.engine.contract import engine_name
from glassine.runtime.foreign import read_model
from glassine.runtime.image import Source
from glassine.runtime.inputs import Inputs, MapSource, read_inputs
from glassine.runtime.latents import encode_image
from glassine.runtime.layer_run import LayerRun
from glassine.runtime.plan import TEXT_ENCODERS, Memory, Need, memory, needs
from glassine.runtime.prompt import NetworkTag, without_tags
from glassine.runtime.request import DEFAULT_STRENGTH, Request
from glassine.runtime.residency import Residents, Wanted, weight_files
from glassine.runtime.run import Run
from glassine.runtime.schedule import NoiseSchedule
from glassine.runtime.tokenizer import Tokenizer
from glassine.runtime.tuned import Choices, Chosen, files_of

if TYPE_CHECKING:
    from glassine.runtime.collage import Collage

Float = NDArray[np.float32]
Output = Literal["pil", "numpy", "latent"]
T = TypeVar("T")

SD1_LATENT_SCALE = 0.18215
SD1_DECODER_PARAMETERS = 49_490_199  # a decoder of this size is taken for Stable Diffusion's own
_REMEMBERED = 8  # prompts and source pictures whose encodings are kept


class Pipeline:
    """A converted model folder and the engines that run its parts; use `load`, and close it or use `with`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        options: EngineOptions,
        size: tuple[int, int],
        *,
        vocabulary: Path | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.size = size
        self.schedule = NoiseSchedule(manifest.scheduler)
        self.refiner: Pipeline | None = None
        self.choices = Choices(folder, manifest, size, options)
        self.notices: tuple[str, ...] = self.choices.notices
        self._vocabulary = vocabulary
        self._options = options
        self.residents = Residents(one_stage=options.low_memory)
        self._refines = False
        self.nets: Mapping[str, Path] = {}  # control networks beside a folder that others made
        self._tokenizer: Tokenizer | None = None
        self._preview_matrix: Float | None = None
        self._prompts: OrderedDict[object, EncodedPrompt] = OrderedDict()
        self._sources: OrderedDict[object, Float] = OrderedDict()

    @classmethod
    def load(
        cls,
        folder: Path | str,
        options: EngineOptions | None = None,
        *,
        size: tuple[int, int] | None = None,
        refiner: Path | str | None = None,
    ) -> Pipeline:
        """Open a converted folder; its packages are loaded when they are first needed.

        Args:
            folder: the model, made by `glassine convert`, or by others as `foreign.py` knows it.
            options: how to run its packages.
            size: (width, height) in pixels, one of those it was converted for; None is the first.
            refiner: the folder of a model that draws the last steps of every picture, such as SDXL's refiner; None is
                the one in the same folder, which Apple's bundles may have.

        Raises:
            PackageError: a folder or its manifest is missing or damaged, or has no packages of this size, or the two
                models' latents are not the same.
        """
        found = read_model(Path(folder))
        manifest = found.manifest
        size = manifest.sizes[0] if size is None else size
        if size not in manifest.sizes:
            raise PackageError(
                f"{folder}: converted for {_spelled(*manifest.sizes)}, not for {_spelled(size)}; "
                f"convert it again with --size {_spelled(size)} too"
            )
        options = options if options is not None else EngineOptions()
        pipe = cls(found.folder, manifest, options, size, vocabulary=found.vocabulary)
        pipe.notices = (*found.notices, *pipe.notices)
        pipe.nets = found.nets
        if refiner is not None:
            pipe.refiner = cls.load(refiner, options, size=size)
            _check_refiner(pipe, pipe.refiner)
        elif found.refiner is not None:
            pipe.refiner = cls(found.folder, found.refiner, options, size, vocabulary=found.vocabulary)
        if pipe.refiner is not None:
            pipe.refiner.residents, pipe.refiner._refines = pipe.residents, True
        return pipe

    def __call__(
        self,
        prompt: str = "",
        *,
        image: Source | Collage | None = None,
        change_map: Source | None = None,
        mask: Source | None = None,
        softness: float = 0.0,
        controls: Sequence[Control] = (),
        output: Output = "pil",
        inputs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """Draw one picture.

        Args:
            prompt: what to draw, in A1111's syntax.
            image: the picture to change: a path, PIL image or (H, W, 3) uint8 array; or a `Collage`, which is its own
                change map too (docs/collage.md).
            change_map: how much each pixel of it may change: a path, array in [0, 1] or words (docs/change-maps.md).
            mask, softness: instead of a map: what may change, and pixels of soft border outside it.
            controls: networks that steer the picture, such as Control("canny", "edges.png"); docs/control.md.
            output: "pil" an image, "numpy" (H, W, 3) uint8, "latent" (1, 4, h, w) float32. With `transparent=True`
                pictures are RGBA, straight alpha.
            inputs: arrays made elsewhere, by the names of `Inputs`: latents, noise, context, negative_context.
            settings: the fields of `Request`, such as steps, sampler, seed, strength, guidance_scale.

        Raises:
            RequestError: a setting, picture or map cannot be drawn with.
            EngineError: a package cannot be run.
        """
        from glassine.runtime.collage import Collage

        maps = MapSource(map=change_map, mask=mask, softness=softness)
        alone = image is not None and maps.source is None and not isinstance(image, Collage)
        request = self.request({"prompt": prompt, **settings}, image_alone=alone)
        arrays = inputs if inputs is not None else {}
        read = self._read(image, maps, request, arrays)
        read = with_controls(read, controls, self.size, request.fit, engine=self._options)
        result = self.run(request, read).finish()
        if output == "latent":
            return result.latents
        return result.pixels if output == "numpy" else result.image

    def _read(
        self, image: Source | Collage | None, maps: MapSource, request: Request, arrays: Mapping[str, Any]
    ) -> Inputs:
        """The source picture and its map, of the model's size; `arrays` are further fields of `Inputs`."""
        from glassine.runtime.collage import Collage
        from glassine.runtime.collage_inputs import collage_inputs

        if not isinstance(image, Collage):
            return read_inputs(image, maps, *self.size, fit=request.fit, keep_alpha=request.transparent, **arrays)
        if maps.source is not None:
            raise RequestError(
                "a collage is its own change map: say it layer by layer, and leave change_map and mask out"
            )
        return replace(collage_inputs(self, image, request), **arrays)

    def request(self, settings: Mapping[str, Any], *, image_alone: bool = False) -> Request:
        """Return the request that `settings` ask for; what they leave open is this model's own, then Glassine's.

        Args:
            settings: fields of `Request`.
            image_alone: there is a picture and no change map: then the strength is 0.75 if nobody says otherwise (an
                instruct-pix2pix model's: 1, as it sees the picture anyway).

        Raises:
            RequestError: a setting that is unknown, out of range or of the wrong type.
        """
        alone = {"strength": DEFAULT_STRENGTH} if image_alone and self.unet_inputs["sample"][1] != PIX2PIX else {}
        return Request.from_dict({**alone, **self.manifest.defaults, **settings})

    def run(self, request: Request, inputs: Inputs | None = None) -> Run:
        """Prepare one picture: iterate over the steps of the returned `Run`, or just call its `finish`."""
        kind = LayerRun if request.transparent or request.layers else Run
        return kind(self, request, inputs if inputs is not None else Inputs())

    def engine(self, role: str, size: tuple[int, int] | None = None) -> Engine:
        """Return the engine of one part ("unet", "text_encoder", "vae_encoder", "vae_decoder"), loaded on first use.

        Args:
            role: of the part. size: (width, height) in pixels; None is the pipeline's own.

        Raises:
            PackageError: the model has no such part.
            EngineError: its package cannot be loaded.
        """
        return self._resident(self._wanted(role, size))

    def load_ahead(self, needed: Sequence[Need]) -> None:
        """Load the parts of a picture in a thread of its own, while the caller works with those before them.

        With little memory nothing is loaded ahead, nor for the portable engine on the CPU, where it brought nothing
        (benchmarks/ahead.py). What cannot be loaded is said where it is needed.
        """
        if engine_name(self._options) == "portable" and self._options.device in (None, "cpu"):
            return
        pipes = {False: self, True: self.refiner}
        found = [(pipes[need.refines], need.role) for need in needed]
        self.residents.ahead([pipe._wanted(role) for pipe, role in found if pipe is not None])

    def memory(self, needed: Sequence[Need]) -> Memory:
        """Return what the weights of these parts take in memory.

        Core ML's as they are stored, in one file or another; the portable engine's are float32, every part's its own.
        """
        weights: dict[Need, dict[object, int]] = {}
        for need in needed:
            pipe = self.refiner if need.refines and self.refiner is not None else self
            part = pipe._chosen(need.role).part
            weights[need] = dict(weight_files(files_of(pipe.folder, part)))
            if engine_name(self._options) == "portable":
                stored = sum(weights[need].values())
                weights[need] = {need: 4 * part.parameters if part.parameters else 2 * stored}
        return memory(needed, weights)

    def needs(self, request: Request, inputs: Inputs) -> tuple[Need, ...]:
        """Return the parts that a picture needs, in order, before it is known how many steps its map takes."""
        takes_over = self.refiner is not None and request.refine_at < 1
        refiner = self.refiner.manifest if self.refiner is not None and takes_over else None
        return needs(request, inputs, self.manifest, self.size, refiner=refiner, refined=int(takes_over))

    def rows(self, role: str) -> int:
        """The rows of every call of a UNet: its package's batch.

        Raises:
            PackageError: the model has no such part.
        """
        return self._chosen(role).part.inputs["sample"][0][0]

    def _wanted(self, role: str, size: tuple[int, int] | None = None) -> Wanted:
        chosen = self._chosen(role, size)
        packages = files_of(self.folder, chosen.part)
        key = role if size is None else f"{role} {_spelled(size)}"
        key = f"refiner {key}" if self._refines else key
        return Wanted(key, Need(role, self._refines).stage, packages, partial(_open, packages, chosen))

    def _resident(self, wanted: Wanted) -> Engine:
        """Return an engine that is loaded now, and keep what it said when it was."""
        engine = self.residents.get(wanted)
        self.notices = tuple(dict.fromkeys((*self.notices, *engine.realised.notices)))
        return engine

    def package(self, path: Path) -> Engine:
        """Return the engine of a package beside the folder, such as another model's control net; loaded on first use.

        Raises:
            PackageError, EngineError: it is missing, damaged, or cannot be loaded.
        """
        load = partial(_load, path, self._options)
        return self._resident(Wanted(str(path.resolve()), "denoise", (path,), load))

    def _chosen(self, role: str, size: tuple[int, int] | None = None) -> Chosen:
        """What plays a role, and how it is to run."""
        part = self.manifest.part(role, self.size if size is None else size)
        if part is None:
            raise PackageError(
                f"{self.folder}: this model has no {role}, only {sorted(self.manifest.parts)}; "
                "convert a whole checkpoint to draw with it"
            )
        return self.choices.of(role, part) if size in (None, self.size) else Chosen(part, self._options)

    def prediction(self, request: Request) -> Prediction:
        """What this model's UNet predicts; a request speaks of the base, not of a refiner."""
        said = None if self._refines else request.prediction_type
        return self.manifest.prediction_type if said is None else said

    def inputs(self, role: str) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """The inputs of a part, each with shape and dtype.

        Raises:
            PackageError: the model has no such part.
        """
        return self._chosen(role).part.inputs

    @property
    def unet_inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what this model's UNet reads, by name: they say of which kind it is (`branches.py`).

        Raises:
            PackageError: the model has no UNet, or one without latents and text.
        """
        part = self._chosen("unet").part
        if not {"sample", "encoder_hidden_states"} <= set(part.inputs):
            raise PackageError(f"{self.folder}: its UNet reads {sorted(part.inputs)}, neither latents nor text")
        return {name: shape for name, (shape, _) in part.inputs.items()}

    def encode(self, text: str, request: Request) -> EncodedPrompt:
        """Return the text as the UNet reads it; remembered, so that a change of seed or map costs nothing."""
        text = without_tags(text, [NetworkTag(lora.name, lora.unet, lora.text) for lora in self.manifest.loras])
        own_skip = self.manifest.clip_skip
        clip_skip = request.clip_skip if request.clip_skip is not None else own_skip

        def encode(role: str) -> EncodedPrompt:
            return encode_prompt(
                self.engine(role).predict,
                self.tokenizer,
                text,
                tokens=self.manifest.tokens,
                clip_skip=clip_skip,
                own_skip=own_skip,
                emphasis=request.emphasis,
                pad=self._chosen(role).part.about.get("pad"),
            )

        roles = [role for role in TEXT_ENCODERS if role in self.manifest.parts]
        return _remember(
            self._prompts,
            (text, clip_skip, request.emphasis),
            lambda: side_by_side([encode(role) for role in (roles if roles else TEXT_ENCODERS[:1])]),
        )

    def posterior_mean(self, image: Float) -> Float:
        """Return the mean (1, 4, h, w) of the latents of a picture (1, 3, H, W) in [-1, 1], unscaled; remembered."""

        def encode() -> Float:
            return encode_image(self.engine("vae_encoder").predict, image, latent_scale=1.0)

        return self.remembered(image.tobytes(), encode)

    def remembered(self, key: bytes, encode: Callable[[], Float]) -> Float:
        """Return the latents of the source picture that `key` stands for; encoded if they are not remembered."""
        return _remember(self._sources, key, encode)

    def source_latents(self, image: Float) -> Float:
        """Return the latents z (1, 4, h, w) of a picture (1, 3, H, W) in [-1, 1]: the posterior's mean, scaled."""
        return np.asarray(self.posterior_mean(image) * self.manifest.latent_scale, np.float32)

    def preview_matrix(self) -> Float:
        """Return the (5, 3) matrix from latents to colours: Stable Diffusion's, or one measured on this model's VAE."""
        part = self.manifest.part("vae_decoder", self.size)
        known = self.manifest.latent_scale == SD1_LATENT_SCALE  # SDXL's decoder has as many parameters
        if part is None or (part.parameters == SD1_DECODER_PARAMETERS and known):
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
        """The model's own vocabulary; CLIP's where the folder has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.clip() if self._vocabulary is None else Tokenizer.load(self._vocabulary)
            words = {e.word: range(e.first, e.first + e.count) for e in self.manifest.embeddings}
            self._tokenizer.add_words(words)
        return self._tokenizer

    def close(self) -> None:
        """Unload every part."""
        self.residents.close()  # the refiner's too

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(packages: Sequence[Path], chosen: Chosen, given_up: Event) -> Engine:
    """Open the package of a part, or the chunks it is cut into, under Glassine's names; all of them or none."""
    function = chosen.part.about.get("function")
    further = {} if function is None else {"function": function}
    with ExitStack() as opened:
        stages = []
        for path in packages:
            stages.append(_load(path, chosen.options, given_up, **further))
            opened.callback(stages[-1].close)
        engine: Engine = stages[0] if len(stages) == 1 else Chain(stages)
        names = chosen.part.about.get("names")
        named = engine if names is None else Renamed(engine, **names)
        opened.pop_all()
    return named


def _load(path: Path, options: EngineOptions, given_up: Event, **further: str) -> Engine:
    return open_engine(path, replace(options, given_up=given_up.is_set), **further)


def _check_refiner(base: Pipeline, refiner: Pipeline) -> None:
    """Refuse a refiner that could not go on with the base model's latents."""
    scales = (base.manifest.latent_scale, refiner.manifest.latent_scale)
    if scales[0] != scales[1]:
        raise PackageError(
            f"{refiner.folder}: latents are scaled by {scales[1]}, those of {base.folder} by {scales[0]}; "
            "take a refiner of the same family"
        )
    schedules = (base.manifest.scheduler, refiner.manifest.scheduler)
    if schedules[0] != schedules[1]:
        raise PackageError(
            f"{refiner.folder}: trained on other noise levels than {base.folder}; they cannot share a run"
        )


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
