"""What each branch of guidance reads: the prompts, and whatever else this UNet has inputs for.

Families differ in what their UNet reads beside noise, time and text, never in the loop. Its inputs say what it is:

    time_ids, text_embeds    SDXL: six numbers about the picture (the refiner: five) and the pooled text
    timestep_cond            full LCM: the guidance scale as an embedding; there is one branch
    sample, 9 channels       inpainting: behind x the mask (1 = draw) and the latents of the picture outside it
    sample, 8 channels       instruct-pix2pix: behind x the picture's latents, unscaled; there are three branches
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError, PackageError, RequestError
from glassine.runtime.conditioning import EncodedPrompt
from glassine.runtime.decode import CELL
from glassine.runtime.denoiser import Conditioning, Guidance
from glassine.runtime.inputs import Inputs
from glassine.runtime.request import Request

if TYPE_CHECKING:
    from glassine.runtime.pipeline import Pipeline

Float = NDArray[np.float32]
Table = NDArray[np.integer[Any]]

LATENT_CHANNELS = 4
INPAINTING, PIX2PIX = 9, 8  # channels of `sample`
_BASE, _REFINER = 6, 5  # numbers of `time_ids`


def guidance_of(
    pipe: Pipeline, request: Request, inputs: Inputs, table: Table | None
) -> tuple[Guidance, tuple[str, ...]]:
    """Prepare the conditioning of every branch, and say what there is to say about the prompts.

    Args:
        table: (1, 1, h, w) the evaluations that may touch each latent cell; None = all may touch all.

    Raises:
        RequestError: the model needs a picture and there is none.
        PackageError: a UNet with inputs that no family has.
        EngineError: the text encoders do not fit the UNet.
    """
    shapes = pipe.unet_inputs
    further = _channels(pipe, inputs, table)
    pix2pix = shapes["sample"][1] == PIX2PIX
    cond, notices = _conditioning(pipe, request, inputs, negative=False, channels=further)
    if "timestep_cond" in shapes:
        return Guidance(cond=cond, scale=1.0), notices
    if request.guidance_scale == 1 and not pix2pix:
        return Guidance(cond=cond, scale=1.0), notices
    blank = np.zeros_like(further) if pix2pix and further is not None else further
    uncond, said = _conditioning(pipe, request, inputs, negative=True, channels=blank)
    image = Conditioning(context=uncond.context, extra=uncond.extra, channels=further) if pix2pix else None
    guidance = Guidance(
        cond=cond,
        uncond=uncond,
        image=image,
        scale=request.guidance_scale,
        image_scale=request.image_guidance,
        rescale=request.guidance_rescale,
    )
    zero = ("guidance 0 draws what the negative prompt says; 1 is without guidance",)
    return guidance, (*notices, *said, *(zero if request.guidance_scale == 0 else ()))


def _conditioning(
    pipe: Pipeline, request: Request, inputs: Inputs, *, negative: bool, channels: Float | None
) -> tuple[Conditioning, tuple[str, ...]]:
    """What one branch reads."""
    shapes = pipe.unet_inputs
    text = _text(pipe, request, inputs, negative=negative)
    extra: dict[str, NDArray[np.generic]] = {}
    if "time_ids" in shapes:
        if text.pooled is None:
            raise EngineError(f"{pipe.folder}: the text encoder has no pooled output, which SDXL reads")
        count = shapes["time_ids"][-1]
        extra = {"time_ids": time_ids(request, pipe.size, count, negative=negative), "text_embeds": text.pooled}
    if "timestep_cond" in shapes:
        extra["timestep_cond"] = guidance_embedding(request.guidance_scale, shapes["timestep_cond"][-1])
    context = np.ascontiguousarray(text.context.transpose(0, 2, 1)[:, :, None])
    if context.shape[1] != shapes["encoder_hidden_states"][1]:
        raise EngineError(
            f"{pipe.folder}: the text encoders make vectors of {context.shape[1]} numbers, the UNet reads "
            f"{shapes['encoder_hidden_states'][1]}; a text encoder is missing, or they are of another model"
        )
    return Conditioning(context=context, extra=extra, channels=channels), text.notices


def _text(pipe: Pipeline, request: Request, inputs: Inputs, *, negative: bool) -> EncodedPrompt:
    """One prompt, made elsewhere or encoded here."""
    context = inputs.negative_context if negative else inputs.context
    pooled = inputs.negative_pooled if negative else inputs.pooled
    if context is not None:
        return EncodedPrompt(context=context, pooled=pooled)
    prompt = request.negative_prompt if negative else request.prompt
    encoded = pipe.encode(prompt, request)
    if negative and not prompt and pipe.unet_inputs.get("time_ids", (0,))[-1] == _BASE:
        # SDXL was trained with zeros in the place of a prompt left out; the refiner was not.
        zero = None if encoded.pooled is None else np.zeros_like(encoded.pooled)
        return EncodedPrompt(context=np.zeros_like(encoded.context), pooled=zero, notices=encoded.notices)
    return encoded


def time_ids(request: Request, size: tuple[int, int], count: int, *, negative: bool) -> Float:
    """Return SDXL's micro-conditioning (1, count) float32 (fp16 counts no further than 2048 pixels one by one).

    count: 6 = original height and width, crop top and left, target height and width; 5 (the refiner) = an aesthetic
        score in the place of the target.

    Raises:
        PackageError: any other count.

    Source: SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.2); the order is that of its published code.
    """

    def pair(name: str, default: tuple[int, int]) -> tuple[int, int]:
        own: tuple[int, int] | None = getattr(request, name)
        given: tuple[int, int] | None = getattr(request, f"negative_{name}") if negative else own
        first = given if given is not None else own
        return default if first is None else first

    width, height = pair("original_size", size)
    left, top = pair("crop", (0, 0))
    target_width, target_height = pair("target_size", size)
    numbers = {
        _BASE: (height, width, top, left, target_height, target_width),
        _REFINER: (height, width, top, left, request.negative_aesthetic_score if negative else request.aesthetic_score),
    }
    if count not in numbers:
        raise PackageError(f"the UNet reads {count} time_ids; expected 6 (SDXL) or 5 (its refiner)")
    return np.array([numbers[count]], np.float32)


def guidance_embedding(scale: float, width: int) -> Float:
    """Return the guidance scale as a full LCM model reads it: (1, width) float32, sines then cosines of 1000 (w - 1).

    Source: latent consistency models (Luo et al. 2023, arXiv 2310.04378, section 4.2, and its published code).
    """
    half = width // 2
    angles = 1000.0 * (scale - 1.0) * np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    embedded = np.zeros((1, width), np.float32)
    embedded[0, : 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return embedded


def _channels(pipe: Pipeline, inputs: Inputs, table: Table | None) -> Float | None:
    """What the network reads behind the channels of x."""
    channels = pipe.unet_inputs["sample"][1]
    if channels == LATENT_CHANNELS:
        return None
    if channels == INPAINTING:
        return _inpainting(pipe, inputs, table)
    if channels != PIX2PIX:
        raise PackageError(
            f"{pipe.folder}: its UNet reads {channels} channels; expected 4, 9 (inpainting) or 8 (instruct-pix2pix)"
        )
    if inputs.image is None:
        raise RequestError("this model changes a picture as it is told; give the picture (--image)")
    return pipe.posterior_mean(inputs.image)


def _inpainting(pipe: Pipeline, inputs: Inputs, table: Table | None) -> Float:
    """The mask (1 where any evaluation may draw) and the latents of the picture, grey where the mask is: (1, 5, h, w).

    Without a picture or a map everything may be drawn: the mask is 1 and the picture grey.
    """
    width, height = pipe.size
    live = np.ones((1, 1, height // CELL, width // CELL), bool) if table is None else table > 0
    image = np.zeros((1, 3, height, width), np.float32) if inputs.image is None else inputs.image
    covered = live.repeat(CELL, axis=2).repeat(CELL, axis=3)
    masked = pipe.source_latents(np.where(covered, np.float32(0), image))
    return np.concatenate([live.astype(np.float32), masked], axis=1)
