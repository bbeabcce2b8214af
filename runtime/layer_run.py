"""A run whose UNet carries a patch for transparency or layers: its pictures are RGBA, or several at once.

What a patched UNet does is written in its part of the manifest (`Part.about`):

    frames      the pictures that one run draws, such as ("fg", "bg", "blend"): rows of every network call
    decoded     those of them that are transparent and go through the transparent decoder; the others through the VAE
    conditions  pictures whose latents the UNet reads beside the noisy ones, in this order (SDXL's models)
    control     the picture that a control package turns, once, into further inputs of the UNet (SD 1.5's models)

Everything else is an ordinary run: the same loop, samplers, guidance, change maps and control networks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassine.errors import PackageError, RequestError
from glassine.manifest import Part
from glassine.runtime.branches import guidance_of
from glassine.runtime.compose import checkerboard, composite_rgba
from glassine.runtime.decode import decode_latents, preview
from glassine.runtime.denoiser import Conditioning, Denoiser, Guidance, Relay
from glassine.runtime.image import over_grey
from glassine.runtime.inputs import Inputs
from glassine.runtime.loop import Model, Step
from glassine.runtime.plan import TRANSPARENT
from glassine.runtime.request import Request
from glassine.runtime.run import Result, Run
from glassine.runtime.schedule import NoiseSchedule, Sigmas
from glassine.runtime.transparency import (
    AlphaDecoder,
    Health,
    Passes,
    Transparent,
    decode_rgba,
    encode_rgba,
)

if TYPE_CHECKING:
    from glassine.runtime.pipeline import Pipeline

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_GREY_REACH = 24  # of 255: how far from mid-grey a preview's colour must be to count as drawn


class Patch(NamedTuple):
    """What the manifest says about a patched UNet; see the module."""

    role: str
    frames: tuple[str, ...]
    decoded: tuple[str, ...]
    conditions: tuple[str, ...]
    control: str | None
    name: str
    sha256: str


class LayerRun(Run):
    """One or several pictures in the making, drawn with a patched UNet.

    Attributes:
        patch: what its UNet does.
    """

    def __init__(self, pipe: Pipeline, request: Request, inputs: Inputs) -> None:
        kind = request.layers if request.layers else TRANSPARENT
        self.patch = patch_of(pipe, kind)
        self.frames = len(self.patch.frames)
        self._health: Health | None = None
        self._grey: Bytes | None = None
        self._layers: dict[str, Bytes] = {}
        _check(pipe, self.patch, inputs)
        super().__init__(pipe, request, _not_behind(inputs, self.patch.frames))

    def preview(self, step: Step) -> Bytes:
        """Return a rough picture (H, W, 3) uint8 of the first frame, over a checkerboard if it will be transparent.

        What looks as plain grey does counts as transparent: a preview knows no more.
        """
        pixels = super().preview(step)
        if self.patch.frames[0] not in self.patch.decoded:
            return pixels
        tone = self._grey_tone()
        share = np.clip(np.abs(pixels - tone).max(axis=-1, keepdims=True) / _GREY_REACH, 0, 1)
        checks = checkerboard(pixels.shape[1], pixels.shape[0])
        return np.asarray(np.rint(np.clip(pixels + (checks - tone) * (1 - share), 0, 255)), np.uint8)

    def _grey_tone(self) -> Float:
        """The colour (3,) that plain grey has in a preview, which is only roughly grey."""
        latent = grey_latent(self._pipe)
        if latent is None:
            return np.full(3, 127.5, np.float32)
        shown = preview((latent * self._pipe.manifest.latent_scale)[None, :, None, None], self._pipe.preview_matrix())
        return np.asarray(shown[0, 0], np.float32)

    def finish(self) -> Result:
        """Make the steps that are left, decode every frame, and put protected pixels back."""
        result = super().finish()
        said = self._health.notices if self._health is not None else ()
        return dataclasses.replace(
            result, notices=(*result.notices, *said), grey=self._grey, health=self._health, layers=self._layers
        )

    def _source_latents(self, image: Float) -> Float:
        if self._inputs.pixels is None:
            raise RequestError("to change a picture with transparency, give it as pixels too: (H, W, 4) uint8")
        return transparent_latents(self._pipe, self._inputs.pixels)

    def _prepare_model(self) -> tuple[Model, tuple[str, ...]]:
        """The patched UNet, and the base UNet behind it from `stop_at` on."""
        guidance, notices = guidance_of(self._pipe, self.request, self._inputs, self.n)
        layered, said = self._with_layer_prompts(guidance)
        fixed = {**self._conditions(), **self._signals()}
        model: Model = self._network(self.patch.role, layered, fixed, frames=self.frames)
        start = stop_step(self._pipe.schedule, self._sigmas, self.request.stop_at)
        if start < len(self._sigmas) - 1:
            model = Relay(model, self._network("unet", layered, {}, frames=1), start)
        return model, (*self._inputs.notices, *notices, *said)

    def _network(self, role: str, guidance: Guidance, fixed: dict[str, NDArray[Any]], *, frames: int) -> Denoiser:
        pipe = self._pipe
        unet = self._steered(pipe, role)
        return Denoiser(
            lambda **arrays: unet.predict(**arrays, **fixed),
            pipe.schedule,
            guidance,
            rows=unet.rows,
            prediction=pipe.prediction(self.request),
            control=unet.control,
            frames=frames,
        )

    def _with_layer_prompts(self, guidance: Guidance) -> tuple[Guidance, tuple[str, ...]]:
        """One row of the prompt a frame: a frame's own words stand before the common ones. The negative is shared."""
        request = self.request
        prompts = [getattr(request, f"{frame}_prompt", None) for frame in self.patch.frames]
        if not any(prompts):
            return guidance, ()
        words = [f"{own}, {request.prompt}".removesuffix(", ") if own else request.prompt for own in prompts]
        encoded = [self._pipe.encode(text, request) for text in words]
        context = np.concatenate([text.context for text in encoded]).transpose(0, 2, 1)[:, :, None]
        cond = Conditioning(
            context=np.ascontiguousarray(context), extra=guidance.cond.extra, channels=guidance.cond.channels
        )
        notices = tuple(dict.fromkeys(notice for text in encoded for notice in text.notices))
        return dataclasses.replace(guidance, cond=cond), notices

    def _conditions(self) -> dict[str, Float]:
        """The latents of the given pictures, over grey, for every row alike."""
        if not self.patch.conditions:
            return {}
        given = [over_grey(self._inputs.layers[name]) for name in self.patch.conditions]
        latents = np.concatenate([self._pipe.source_latents(picture) for picture in given], axis=1)
        rows = needed(self._pipe, self.patch.role).inputs["condition"][0][0]
        return {"condition": np.repeat(latents, rows, axis=0)}

    def _signals(self) -> dict[str, NDArray[np.generic]]:
        """What the control package makes of the given picture; it does not depend on time."""
        if self.patch.control is None:
            return {}
        network = self._pipe.engine(self.patch.role.removesuffix("_unet") + "_control")
        answer = network.predict(image=over_grey(self._inputs.layers[self.patch.control]))
        return {name: array.copy() for name, array in answer.items()}

    def _pixels(self, latents: Float) -> Bytes:
        if self.steps == 0 and self._inputs.pixels is not None:
            return self._inputs.pixels
        for frame, latent in zip(self.patch.frames, latents, strict=True):
            self._layers[frame] = self._decode(frame, latent[None])
        return self._layers[self.patch.frames[0]]

    def _decode(self, frame: str, latents: Float) -> Bytes:
        """(H, W, 4) of a transparent frame, (H, W, 3) of another."""
        pipe = self._pipe
        if frame not in self.patch.decoded:
            return decode_latents(pipe.engine("vae_decoder").predict, latents, latent_scale=pipe.manifest.latent_scale)
        passes: Passes = 1 if self.request.passes == 1 else 8
        decoded = decode_transparent(pipe, latents, passes)
        self._health, self._grey = decoded.health, decoded.grey
        if self.n is None or self._inputs.pixels is None:
            return decoded.rgba
        return composite_rgba(decoded.rgba, self._inputs.pixels, self.n[0, 0])

    def _model_record(self) -> dict[str, str]:
        return {**super()._model_record(), "patch": self.patch.name, "patch_sha256": self.patch.sha256}


def patch_of(pipe: Pipeline, kind: str) -> Patch:
    """Return what the model's patched UNet of this kind does.

    Raises:
        PackageError: the model has none, or its manifest does not say what it does.
    """
    role = f"{kind}_unet"
    part = needed(pipe, role)
    about = {"control": None, "patch": "", "patch_sha256": "", **part.about}
    lists = [about.get(name) for name in ("frames", "decoded", "conditions")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise PackageError(f"{pipe.folder}: its {role} does not say which pictures it draws; convert the patch again")
    frames, decoded, conditions = (tuple(str(name) for name in names or ()) for names in lists)
    return Patch(role, frames, decoded, conditions, about["control"], str(about["patch"]), str(about["patch_sha256"]))


def needed(pipe: Pipeline, role: str) -> Part:
    """Return a part that transparency needs.

    Raises:
        PackageError: the model has no such part; the message says which file to add, and how.
    """
    part = pipe.manifest.part(role, pipe.size)
    if part is not None:
        return part
    files = {
        "transparent_decoder": "the transparent VAE decoder (layer_sd15_vae_transparent_decoder.safetensors, "
        "vae_transparent_decoder.safetensors for SDXL)",
        "transparent_encoder": "the transparent VAE encoder (layer_sd15_vae_transparent_encoder.safetensors, "
        "vae_transparent_encoder.safetensors for SDXL)",
        "transparent_unet": "LayerDiffuse's patch (layer_sd15_transparent_attn.safetensors, "
        "layer_xl_transparent_attn.safetensors for SDXL)",
    }
    kind = role.removesuffix("_unet").removesuffix("_control")
    what = files.get(role, f"LayerDiffuse's {kind} model (layer_sd15_{kind} or layer_xl_{kind}.safetensors)")
    width, height = pipe.size
    raise PackageError(
        f"{pipe.folder}: this model has no {role} for {width}x{height}; add {what} with: "
        f"glassine convert FILE --base {pipe.folder}"
    )


def transparent_latents(pipe: Pipeline, rgba: Bytes) -> Float:
    """Return the transparent latents (1, 4, h, w) of a picture (H, W, 4) of the model's size; remembered."""
    part = needed(pipe, "transparent_encoder")
    scale = part.about.get("offset_scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise PackageError(
            f"{pipe.folder}: its transparent encoder does not say its offset_scale (1 or 300); convert it again"
        )

    def encode() -> Float:
        return encode_rgba(
            pipe.engine("vae_encoder").predict,
            pipe.engine("transparent_encoder").predict,
            rgba,
            latent_scale=pipe.manifest.latent_scale,
            offset_scale=float(scale),
        )

    return pipe.remembered(rgba.tobytes(), encode)


def decode_transparent(pipe: Pipeline, latents: Float, passes: Passes) -> Transparent:
    """Decode transparent latents (1, 4, h, w) with the model's own decoders."""
    return decode_rgba(
        pipe.engine("vae_decoder").predict,
        alpha_decoder(pipe),
        latents,
        latent_scale=pipe.manifest.latent_scale,
        passes=passes,
    )


def alpha_decoder(pipe: Pipeline) -> AlphaDecoder:
    """Return the model's transparent decoder, with its turned twin where there is one."""
    width, height = pipe.size
    shape = needed(pipe, "transparent_decoder").inputs["pixel"][0]
    turned = None
    if width != height and pipe.manifest.part("transparent_decoder", (height, width)) is not None:
        turned = pipe.engine("transparent_decoder", (height, width)).predict
    grey = grey_latent(pipe) if shape[2:] != (height, width) else None
    return AlphaDecoder(
        pipe.engine("transparent_decoder").predict, (shape[3], shape[2]), turned=turned, grey_latent=grey
    )


def grey_latent(pipe: Pipeline) -> Float | None:
    """Return the latent (4,) of plain grey, unscaled; None if the model has no VAE encoder."""
    if pipe.manifest.part("vae_encoder", pipe.size) is None:
        return None
    width, height = pipe.size
    plain = pipe.posterior_mean(np.zeros((1, 3, height, width), np.float32))
    return np.asarray(np.median(plain[0], axis=(1, 2)), np.float32)


def stop_step(schedule: NoiseSchedule, sigmas: Sigmas, stop_at: float) -> int:
    """Return the first step that belongs to the base UNet: the first whose timestep is below (1 - stop_at) * 999.

    1 never hands over, 0 at once. As sd-forge-layerdiffuse counts it.

    Args:
        sigmas: (S + 1,) of the run. stop_at: in [0, 1].
    """
    steps = len(sigmas) - 1
    if stop_at <= 0 or stop_at >= 1:
        return 0 if stop_at <= 0 else steps
    cutoff = (1 - stop_at) * (len(schedule.sigmas) - 1)
    # A level made of a whole timestep is that timestep but for rounding.
    return sum(schedule.t_of_sigma(float(sigma)) >= cutoff - 1e-6 for sigma in sigmas[:-1])


def _not_behind(inputs: Inputs, frames: tuple[str, ...]) -> Inputs:
    """Keep controls out of the background of a picture with layers, unless they weigh each frame themselves.

    What steers the object would otherwise appear in the background too.
    """
    if len(frames) == 1 or "bg" not in frames:
        return inputs
    controls = []
    for ready in inputs.controls:
        weights = ready.control.weights
        if len(weights) == 1:
            weights = tuple(0.0 if frame == "bg" else weights[0] for frame in frames)
        controls.append(dataclasses.replace(ready, control=dataclasses.replace(ready.control, weight=weights)))
    return dataclasses.replace(inputs, controls=tuple(controls))


def _check(pipe: Pipeline, patch: Patch, inputs: Inputs) -> None:
    """Refuse before drawing what would be refused after it."""
    for role in ("vae_decoder", *(["transparent_decoder"] if patch.decoded else [])):
        needed(pipe, role)
    if patch.control is not None:
        needed(pipe, patch.role.removesuffix("_unet") + "_control")
    wanted = {*patch.conditions, *([patch.control] if patch.control is not None else [])}
    if set(inputs.layers) != wanted:
        raise RequestError(
            f"{patch.role}: got the layers {sorted(inputs.layers)}, expected {sorted(wanted)}"
            + ("" if wanted else "; it draws from words alone")
        )
    if pipe.refiner is not None:
        raise RequestError(f"{patch.role}: a refiner knows nothing of transparency or layers; leave it out")
    if inputs.image is not None:
        if len(patch.frames) > 1 or patch.frames[0] not in patch.decoded:
            raise RequestError(f"{patch.role}: draws {', '.join(patch.frames)} from noise; leave the image out")
        needed(pipe, "transparent_encoder")
