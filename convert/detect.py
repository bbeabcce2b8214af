"""Names and shapes -> what is in the file: which family, which networks, and which tensor decided.

The names tell the kind of file, all sizes come from shapes (`shapes.py`). What leaves no trace in either (heads, groups
of GroupNorm, activations, the prediction type: `prediction.py`) comes from a diffusers config.json, else from the
header's `__metadata__`, else from the family:

    glassine.heads          heads of the UNet's attention, one number or one a level ("8" or "5,10,20,20")
    glassine.norm_groups    groups of every GroupNorm (32)
    glassine.text_heads     heads of the text encoder (width / 64); glassine.text_heads_2 of SDXL's second
    glassine.activation     "quick_gelu" or "gelu", of the text encoder; glassine.activation_2 of SDXL's second
    glassine.prediction_type, modelspec.prediction_type    "epsilon", "v" or "v_prediction"
    modelspec.resolution    the square it was trained at, "512x512": the size to convert for when none is asked for
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glassine.convert.checkpoint import CONTROL_ADVICE, Checkpoint, shorten
from glassine.convert.names import OPEN_CLIP_ORIGIN, Layout, Names, Part, find_layouts, map_names
from glassine.convert.prediction import Distilled, read_training
from glassine.convert.shapes import SUPPORTED, Shapes, read_text_encoder, read_unet, read_vae, time_id_count
from glassine.convert.weights import FileWeights, WeightSource
from glassine.errors import CheckpointError, ConversionError
from glassine.manifest import Embedding, Scheduler
from glassine.models.config import FAMILIES, SD2_BASE, SD15, SD21, SDXL, SDXL_REFINER, Family, Prediction

FamilyName = Literal["sd15", "sd2", "sdxl", "sdxl_refiner"]

# Files that are no checkpoint, and checkpoints of other families: the first key that matches tells.
EMBEDDING_ADVICE = "convert its checkpoint with --embedding FILE"
_OTHER_FILES = tuple(
    (re.compile(pattern), what, advice)
    for pattern, what, advice in (
        (
            r"lora_(unet|te\d?)_|.*\.lora_(down|up|A|B)\b|.*\.(hada_w|lokr_w)\d|.*\.(b?oft_[Rrs]|ia3_l)\b",
            "a LoRA",
            "put it into a model: glassine lora MODEL add FILE, or convert its checkpoint with --lora FILE",
        ),
        (
            r"control_model\.|input_hint_block\.0\.|controlnet_cond_embedding\.|zero_convs\.",
            "a ControlNet",
            CONTROL_ADVICE,
        ),
        (r"lora_controlnet$", "a Control-LoRA", CONTROL_ADVICE),
        (r"(ip_adapter|image_proj)\.", "an IP-Adapter", ""),
        (r"adapter\.body\.|body\.\d+\.(in_conv|block1)\.", "a T2I-Adapter", CONTROL_ADVICE),
        (r"emb_params$|string_to_param|clip_[gl]$", "a textual-inversion embedding", EMBEDDING_ADVICE),
        (r".*motion_modules\.", "an AnimateDiff motion module", ""),
        (r"conv_first\.weight$|model\.1\.sub\.", "an image upscaler", ""),
        (r".*distilled_guidance_layer\.", "Chroma", ""),
        (r".*(individual_token_refiner|token_refiner\.refiner_blocks)\.", "Hunyuan Video", ""),
        (r".*double_stream_modulation", "Flux 2", ""),
        (r".*double_stream_blocks\.", "HiDream", ""),
        (r".*(double_blocks|single_transformer_blocks)\.", "Flux", ""),
        (r".*(double_layers|joint_transformer_blocks)\.", "AuraFlow (Pony 7)", ""),
        (r".*transformer_blocks\.\d+\.(img|txt)_mod\.", "Qwen Image", ""),
        (r".*joint_blocks\.|.*transformer_blocks\.\d+\.attn\.add_k_proj\.", "Stable Diffusion 3", ""),
        (r".*patchify_proj\.", "LTX Video", ""),
        (r".*(conv_inverted|inverted_conv)\.", "Sana", ""),
        (r".*mlp_t5\.|.*text_embedding_padding$", "Hunyuan DiT", ""),
        (r".*(noise_refiner|context_refiner)\.", "Lumina 2 or Z-Image", ""),
        (r".*blocks\.\d+\.cross_attn\.norm_k\.", "Wan", ""),
        (r".*adaln_single\.|(.*\.)?t_block\.\d", "PixArt", ""),
        (r".*attentions\.\d+\.add_k_proj\.", "DeepFloyd IF or Kandinsky 2", ""),
        (r".*encoder_hid_proj\.weight$|.*\.query_key_value\.", "Kolors", ""),
        (r"conditioner\.embedders\.\d\.open_clip\.|.*\.time_stack\.", "Stable Video Diffusion", ""),
        (r".*clip_(txt_pooled|txt|img)_mapper\.", "Stable Cascade", ""),
        (r".*(caption_projection|cap_embedder|txt_in)\.", "a diffusion transformer", ""),
        (r"(model\.diffusion_model\.)?(transformer_blocks|blocks|single_blocks)\.\d", "a diffusion transformer", ""),
        (r"(.*[./])?(shared\.weight$|encoder\.block\.\d+\.layer\.)", "a T5 text encoder", ""),
        (
            r"edm_mean$|edm_std$|edm_vpred\.sigma_m",
            "a model of another noise schedule (EDM, as CosXL and Playground 2.5)",
            "Glassine draws on Stable Diffusion's own schedule alone",
        ),
        (r"(noise_augmentor|embedder)\.", "Stable Diffusion 2 unCLIP", ""),
        (r"depth_model\.", "Stable Diffusion 2 depth", ""),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What a checkpoint holds.

    family: the networks that are there, with their real sizes; those that are not keep the family's. reasons: what was
    decided -> by which tensor or word. defaults: settings this model is meant to be drawn with, where they are not
    everybody's. sources: the file of a part, where that is not the checkpoint. embeddings: words
    that were added to the text encoders.
    """

    family: Family
    scheduler: Scheduler
    parts: Mapping[Part, WeightSource]
    reasons: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[Part, Checkpoint] = field(default_factory=dict)
    embeddings: tuple[Embedding, ...] = ()


def detect(
    checkpoint: Checkpoint,
    prediction_type: Prediction | None = None,
    *,
    family: str | None = None,
    distilled: Distilled | None = None,
) -> Detected:
    """Recognise the checkpoint and read its networks' sizes.

    Args:
        checkpoint: from `open_checkpoint`.
        prediction_type: overrides what the file says.
        family: overrides what the tensors say, where they leave a choice.
        distilled: overrides what the name says of a model for few steps.

    Raises:
        CheckpointError: this is another kind of file, or another family.
        ConversionError: keys that belong to nothing, or shapes that make no network.
    """
    keys = checkpoint.tensors.keys()
    layouts = _named_encoders(checkpoint, find_layouts(keys))
    _refuse_other_files(checkpoint, keys)
    if not layouts:
        first = ", ".join(sorted(keys)[:3]) if keys else "none"
        raise CheckpointError(
            f"{checkpoint.path}: no Stable Diffusion network in here (the first of {len(keys)} keys: {first}); "
            "expected a checkpoint, a UNet, a VAE or a text encoder"
        )
    names = map_names(keys, layouts)
    _refuse_leftovers(checkpoint, names)
    _drop_unread_layer(names)
    parts: dict[Part, WeightSource] = {part: FileWeights(checkpoint, table) for part, table in names.parts.items()}
    shapes = {part: Shapes(part, weights, str(checkpoint.path)) for part, weights in parts.items()}
    base, why = _family(checkpoint, shapes, family)
    found = _described(checkpoint, shapes, base)
    training = read_training(checkpoint, found, parts.get("unet"), prediction_type=prediction_type, distilled=distilled)
    found = replace(found, prediction=training.prediction)
    size, size_reason = _size(checkpoint, found, turbo=training.reasons.get("few steps", "").startswith("turbo"))
    reasons = {reason: text for part in shapes.values() for reason, text in part.reasons.items()}
    return Detected(
        family=replace(found, size=size),
        scheduler=training.scheduler,
        parts=parts,
        reasons={"family": why, **training.reasons, "size": size_reason, **reasons},
        defaults=training.defaults,
    )


def _named_encoders(checkpoint: Checkpoint, layouts: dict[Part, Layout]) -> dict[Part, Layout]:
    """A text encoder in a file of its own says by its width alone that it is SDXL's second."""
    layout = layouts.get("text_encoder")
    if layout is None or layout.prefix or len(layouts) > 1:
        return layouts
    table = next((key for key in checkpoint.tensors if key.endswith("token_embedding.weight")), None)
    shape = checkpoint.tensors[table].shape if table is not None else ()
    if len(shape) != 2 or shape[1] != SDXL.text_encoder("text_encoder_2").width:
        return layouts
    return {"text_encoder_2": replace(layout, part="text_encoder_2")}


def _drop_unread_layer(names: Names) -> None:
    """Leave out what Stable Diffusion 2 does not read of its OpenCLIP: the last layer and the projection.

    Files that came from diffusers have neither, so a projection says that the last layer is there too.
    """
    layout, table = names.layouts.get("text_encoder"), names.parts.get("text_encoder", {})
    if layout is None or layout.origin != OPEN_CLIP_ORIGIN or "text_projection.weight" not in table:
        return
    layers = {int(match[1]) for name in table if (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    last = f"text_model.encoder.layers.{max(layers, default=0)}."
    unread = [name for name in table if name.startswith(last) or name == "text_projection.weight"]
    for name in unread:
        del table[name]


def _refuse_other_files(checkpoint: Checkpoint, keys: Collection[str]) -> None:
    for pattern, what, advice in _OTHER_FILES:
        key = next((key for key in keys if pattern.match(key)), None)
        if key is not None:
            raise CheckpointError(
                f'{checkpoint.path}: this is {what} (key "{key}"), expected a Stable Diffusion checkpoint; '
                + (advice if advice else SUPPORTED)
            )
    if len(keys) == 1:
        key = next(iter(keys))
        if len(checkpoint.tensors[key].shape) <= 2:
            raise CheckpointError(
                f'{checkpoint.path}: this is a single vector ("{key}"), an embedding; {EMBEDDING_ADVICE}'
            )


def _refuse_leftovers(checkpoint: Checkpoint, names: Names) -> None:
    if names.unknown:
        raise ConversionError(
            f"{checkpoint.path}: {len(names.unknown)} keys belong to no known network: {shorten(names.unknown)}; "
            "converting without them could draw something else than the model's author meant"
        )
    if names.twice:
        first, second = names.twice[0]
        raise ConversionError(f'{checkpoint.path}: "{first}" and "{second}" are the same weight under two names')


def _family(checkpoint: Checkpoint, shapes: Mapping[Part, Shapes], asked: str | None) -> tuple[Family, str]:
    """The family, and what decided: the UNet's make, else the text encoder's width, else the VAE's config."""
    if asked is not None and asked not in FAMILIES:
        raise ConversionError(f"{checkpoint.path}: the family {asked} is not known, only {', '.join(FAMILIES)}")
    found, why, sure = _likely_family(checkpoint, shapes)
    if asked is None or asked == found.name:
        return found, why if asked is None else "asked for"
    if not sure or {asked, found.name} == {"sdxl", "sdxl_refiner"}:
        return FAMILIES[asked], "asked for"
    raise ConversionError(
        f"{checkpoint.path}: the family {asked} is asked for, but {why} says {found.name}; leave --family out"
    )


def _likely_family(checkpoint: Checkpoint, shapes: Mapping[Part, Shapes]) -> tuple[Family, str, bool]:
    """The family, what decided, and whether that leaves no other choice."""
    if "unet" in shapes:
        return *_family_of_unet(shapes), True
    second, first = shapes.get("text_encoder_2"), shapes.get("text_encoder")
    table = "text_model.embeddings.token_embedding.weight"
    if second is not None:
        return SDXL, second.said(table), True
    if first is not None:
        wide = first.size("width", table, 1, rank=2) == SD2_BASE.text_encoders[0].width
        return (SD2_BASE if wide else SD15), first.said(table), True
    if "scaling_factor" in checkpoint.configs.get("vae", {}):
        near = abs(_latent_scale(checkpoint, SD15) - SDXL.latent_scale) < 1e-3
        return (SDXL if near else SD15), "vae/config.json: scaling_factor", False
    if checkpoint.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-xl"):
        return SDXL, "metadata modelspec.architecture", False
    return SD15, "a VAE alone does not tell: all families' have the same shapes (say --family sdxl for SDXL's)", False


def _family_of_unet(shapes: Mapping[Part, Shapes]) -> tuple[Family, str]:
    unet = shapes["unet"]
    for name, what in (
        ("class_embedding.linear_1.weight", "Stable Diffusion 2 unCLIP"),
        ("class_embedding.weight", "the x4 upscaler"),
    ):
        if unet.rank(name) is not None:
            raise CheckpointError(f"{unet.origin(name)}: this is a UNet of {what}; {SUPPORTED}")
    sizes = "add_embedding.linear_1.weight"
    if unet.rank(sizes) is not None:
        encoder = shapes.get("text_encoder_2")
        projection = "text_projection.weight"
        pooled = encoder.size("pooled text", projection, 0, rank=2) if encoder is not None else None
        return (SDXL if time_id_count(unet, pooled) == 6 else SDXL_REFINER), unet.said(sizes)
    matrix, context = unet.linear_projection(), unet.context()
    if matrix is not None and context != SD15.unet.context_dim:
        return SD2_BASE, unet.said(matrix)
    return SD15, unet.reasons.get("unet context", "no tensor says otherwise")


def _described(checkpoint: Checkpoint, shapes: Mapping[Part, Shapes], family: Family) -> Family:
    """The family with the networks that are there as they are."""
    if "unet" in shapes:
        family = replace(family, unet=read_unet(checkpoint, shapes["unet"], family))
    if "vae" in shapes:
        scale = _latent_scale(checkpoint, family)
        family = replace(family, vae=read_vae(checkpoint, shapes["vae"]), latent_scale=scale)
    unknown = {part for part in shapes if part.startswith("text_encoder")} - set(family.text_roles)
    if unknown:
        raise ConversionError(
            f"{checkpoint.path}: holds a {' and a '.join(sorted(unknown))}, which {family.name} does not have"
        )
    encoders = tuple(
        read_text_encoder(checkpoint, shapes[role], encoder) if role in shapes else encoder  # type: ignore[index]
        for role, encoder in zip(family.text_roles, family.text_encoders, strict=True)
    )
    family = replace(family, text_encoders=encoders)
    if {"unet", *family.text_roles} <= set(shapes):
        _check_context(checkpoint, shapes["unet"], family)
    return family


def _check_context(checkpoint: Checkpoint, unet: Shapes, family: Family) -> None:
    widths = [encoder.width for encoder in family.text_encoders]
    if family.unet.context_dim != sum(widths):
        raise ConversionError(
            f"{checkpoint.path}: the UNet reads a context of {family.unet.context_dim} numbers a token "
            f"({unet.reasons.get('unet context', 'no tensor says so')}), the text encoder gives "
            f"{' + '.join(map(str, widths))}; they are not of one model"
        )


def _latent_scale(checkpoint: Checkpoint, family: Family) -> float:
    scale = checkpoint.configs.get("vae", {}).get("scaling_factor", family.latent_scale)
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise ConversionError(f"{checkpoint.path}: vae/config.json: scaling_factor {scale!r} is no positive number")
    return float(scale)


def _size(checkpoint: Checkpoint, family: Family, *, turbo: bool) -> tuple[int, str]:
    match = re.fullmatch(r"(\d{2,4})x\1", checkpoint.metadata.get("modelspec.resolution", ""))
    if match and int(match[1]) % 64 == 0:
        return int(match[1]), "metadata modelspec.resolution"
    if turbo:
        return 512, "Turbo models were trained at 512"
    if family.name == "sd2" and family.prediction == "v_prediction":
        return SD21.size, "Stable Diffusion 2 with v-prediction was trained at 768"
    return family.size, f"the family {family.name}"
