"""Names and shapes -> what is in the file: which networks, how wide and deep, and which tensor decided.

The names tell the kind of file; all sizes come from shapes, so a small network of the same layout is read by the same
code. Three numbers leave no trace in shapes: attention heads, groups of GroupNorm and the prediction type. They come
from a diffusers config.json, else from the header's `__metadata__`, else from the family:

    glassine.heads         heads of the UNet's attention, one number or one a level ("8" or "5,10,20,20")
    glassine.norm_groups   groups of every GroupNorm (32)
    glassine.text_heads    heads of the text encoder (width / 64)
    glassine.activation    "quick_gelu" or "gelu", of the text encoder
    glassine.prediction_type, modelspec.prediction_type    "epsilon", "v" or "v_prediction"
    modelspec.resolution   the square it was trained at, "512x512": the size to convert for when none is asked for
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from glassine.convert.checkpoint import Checkpoint, shorten
from glassine.convert.names import Names, Part, find_layouts, map_names
from glassine.convert.weights import FileWeights, WeightSource
from glassine.errors import CheckpointError, ConversionError
from glassine.manifest import Scheduler
from glassine.models.config import SD15, Family, Prediction, TextEncoderConfig, UNetConfig, VAEConfig

# Files that are no checkpoint, and checkpoints of other families: the first key that matches tells.
_OTHER_FILES = tuple(
    (re.compile(pattern), what, advice)
    for pattern, what, advice in (
        (
            r"lora_(unet|te\d?)_|.*\.lora_(down|up|A|B)\b|.*\.(hada_w|lokr_w)\d",
            "a LoRA",
            "a LoRA changes a checkpoint and is none itself",
        ),
        (r"control_model\.|input_hint_block\.0\.|controlnet_cond_embedding\.|zero_convs\.", "a ControlNet", ""),
        (r"lora_controlnet$", "a Control-LoRA", ""),
        (r"(ip_adapter|image_proj)\.", "an IP-Adapter", ""),
        (r"adapter\.body\.|body\.\d+\.(in_conv|block1)\.", "a T2I-Adapter", ""),
        (r"emb_params$|string_to_param|clip_[gl]$", "a textual-inversion embedding", ""),
        (r".*motion_modules\.", "an AnimateDiff motion module", ""),
        (r"conv_first\.weight$|model\.1\.sub\.", "an image upscaler", ""),
        (r".*joint_blocks\.", "Stable Diffusion 3", ""),
        (r".*double_blocks\.", "Flux", ""),
        (r"conditioner\.embedders\.1\.", "Stable Diffusion XL", ""),
        (r"conditioner\.embedders\.0\.model\.", "the Stable Diffusion XL refiner", ""),
        (r"conditioner\.embedders\.0\.", "Stable Diffusion XL", ""),
        (r"(noise_augmentor|embedder)\.", "Stable Diffusion 2 unCLIP", ""),
        (r"depth_model\.", "Stable Diffusion 2 depth", ""),
        (r"cond_stage_model\.model\.", "Stable Diffusion 2", ""),
    )
)
_EXTRA_CHANNELS = {
    9: "an inpainting model",
    8: "an instruct-pix2pix model",
    7: "the x4 upscaler",
    5: "a depth model",
    12: "an IC-Light model",
}
_SUPPORTED = "this Glassine converts Stable Diffusion 1.x"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What a checkpoint holds.

    family: the networks that are there, with their real sizes; those that are not keep the family's. reasons: what was
    decided -> by which tensor.
    """

    family: Family
    scheduler: Scheduler
    parts: Mapping[Part, WeightSource]
    reasons: Mapping[str, str]


def detect(checkpoint: Checkpoint, prediction_type: Prediction | None = None) -> Detected:
    """Recognise the checkpoint and read its networks' sizes.

    Args:
        checkpoint: from `open_checkpoint`.
        prediction_type: overrides what the file says.

    Raises:
        CheckpointError: this is another kind of file, or another family.
        ConversionError: keys that belong to nothing, or shapes that make no network.
    """
    keys = checkpoint.tensors.keys()
    layouts = find_layouts(keys)
    _refuse_other_files(checkpoint, keys)
    if not layouts:
        first = ", ".join(sorted(keys)[:3]) if keys else "none"
        raise CheckpointError(
            f"{checkpoint.path}: no Stable Diffusion network in here (the first of {len(keys)} keys: {first}); "
            "expected a checkpoint, a UNet, a VAE or a text encoder"
        )
    names = map_names(keys, layouts)
    _refuse_leftovers(checkpoint, names)
    parts = {part: FileWeights(checkpoint, table) for part, table in names.parts.items()}
    shapes = {part: Shapes(part, weights) for part, weights in parts.items()}
    family = SD15
    if "unet" in shapes:
        family = replace(family, unet=_unet(checkpoint, shapes["unet"]))
    if "vae" in shapes:
        family = replace(family, vae=_vae(checkpoint, shapes["vae"]), latent_scale=_latent_scale(checkpoint))
    if "text_encoder" in shapes:
        family = replace(family, text_encoders=(_text_encoder(checkpoint, shapes["text_encoder"]),))
    if "unet" in shapes and "text_encoder" in shapes:
        _check_context(checkpoint, shapes["unet"], family)
    scheduler, prediction, why = _schedule(checkpoint, prediction_type)
    reasons = {reason: text for part in shapes.values() for reason, text in part.reasons.items()}
    return Detected(
        family=replace(family, prediction=prediction, size=_size(checkpoint)),
        scheduler=scheduler,
        parts=parts,
        reasons=reasons | {"prediction type": why},
    )


def _refuse_other_files(checkpoint: Checkpoint, keys: Collection[str]) -> None:
    for pattern, what, advice in _OTHER_FILES:
        key = next((key for key in keys if pattern.match(key)), None)
        if key is not None:
            raise CheckpointError(
                f'{checkpoint.path}: this is {what} (key "{key}"), expected a Stable Diffusion 1.x checkpoint; '
                + (advice if advice else _SUPPORTED)
            )
    if checkpoint.path.is_dir() and (checkpoint.path / "text_encoder_2").is_dir():
        raise CheckpointError(
            f"{checkpoint.path}: this is Stable Diffusion XL (it has text_encoder_2/), "
            f"expected Stable Diffusion 1.x; {_SUPPORTED}"
        )
    if len(keys) == 1:
        key = next(iter(keys))
        if len(checkpoint.tensors[key].shape) <= 2:
            raise CheckpointError(f'{checkpoint.path}: this is a single vector ("{key}"), an embedding; {_SUPPORTED}')


def _refuse_leftovers(checkpoint: Checkpoint, names: Names) -> None:
    if names.unknown:
        raise ConversionError(
            f"{checkpoint.path}: {len(names.unknown)} keys belong to no known network: {shorten(names.unknown)}; "
            "converting without them could draw something else than the model's author meant"
        )
    if names.twice:
        first, second = names.twice[0]
        raise ConversionError(f'{checkpoint.path}: "{first}" and "{second}" are the same weight under two names')


class Shapes:
    """Shapes of one part by canonical name, remembering which tensor decided what."""

    def __init__(self, part: Part, weights: FileWeights) -> None:
        self.part = part
        self.reasons: dict[str, str] = {}
        self._weights = weights

    def size(self, what: str, name: str, axis: int, rank: int | None = None) -> int:
        """The size of `name` along `axis`, which decides `what`."""
        shape = self._weights.shapes.get(name)
        if shape is None:
            raise ConversionError(f"{self.part}: the source has no {name}, which tells the {what}; it is incomplete")
        if len(shape) <= axis or (rank is not None and len(shape) != rank):
            raise ConversionError(f"{self._weights.origin(name)} has shape {shape}, which tells no {what}")
        self.reasons.setdefault(f"{self.part} {what}", f"{self._weights.origin(name)} {shape}")
        return shape[axis]

    def rank(self, name: str) -> int | None:
        """How many dimensions `name` has, or None."""
        shape = self._weights.shapes.get(name)
        return None if shape is None else len(shape)

    def origin(self, name: str) -> str:
        """File and key of `name`."""
        return self._weights.origin(name)

    def count(self, pattern: str) -> int:
        """How many numbers 0, 1, 2 ... stand at the place of {} in names that begin so."""
        head, _, tail = pattern.partition("{}")
        number = 0
        while any(name.startswith(f"{head}{number}{tail}") for name in self._weights.shapes):
            number += 1
        return number


def _unet(checkpoint: Checkpoint, shapes: Shapes) -> UNetConfig:
    config = checkpoint.configs.get("unet", {})
    levels = shapes.count("down_blocks.{}.resnets.")
    layers = shapes.count("down_blocks.0.resnets.{}.")
    in_channels = shapes.size("input channels", "conv_in.weight", 1, rank=4)
    _refuse_other_unets(checkpoint, shapes, in_channels)

    def depths(side: str, level: int, count: int) -> tuple[int, ...]:
        return tuple(
            shapes.count(f"{side}_blocks.{level}.attentions.{i}.transformer_blocks.{{}}.") for i in range(count)
        )

    down = tuple(depths("down", level, layers) for level in range(levels))
    mid = shapes.count("mid_block.attentions.0.transformer_blocks.{}.")
    context = next(
        (
            shapes.size(
                "context", f"down_blocks.{level}.attentions.{i}.transformer_blocks.0.attn2.to_k.weight", 1, rank=2
            )
            for level in range(levels)
            for i in range(layers)
            if down[level][i]
        ),
        UNetConfig().context_dim,
    )
    channels = tuple(
        shapes.size(f"channels {level}", f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels)
    )
    # diffusers calls the number of heads attention_head_dim in every config older than num_attention_heads.
    said = config.get("num_attention_heads")
    said = config.get("attention_head_dim") if said is None else said
    heads = _numbers(checkpoint, "heads", said, UNetConfig().heads[0])
    heads = heads * levels if len(heads) == 1 else heads
    groups = _number(checkpoint, "norm_groups", config.get("norm_num_groups"), UNetConfig().norm_groups)
    _check_divisible(checkpoint, "UNet channels", channels, "heads", heads)
    _check_divisible(checkpoint, "UNet channels", channels, "norm_groups", [groups] * levels)
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes.size("output channels", "conv_out.weight", 0),
        channels=channels,
        layers=layers,
        down_depths=down,
        mid_depth=mid if shapes.count("mid_block.resnets.{}.") else None,
        up_depths=tuple(depths("up", level, layers + 1) for level in range(levels)),
        heads=tuple(heads),
        context_dim=context,
        norm_groups=groups,
    )


def _refuse_other_unets(checkpoint: Checkpoint, shapes: Shapes, in_channels: int) -> None:
    for name, what in (
        ("add_embedding.linear_1.weight", "Stable Diffusion XL"),
        ("class_embedding.linear_1.weight", "Stable Diffusion 2 unCLIP"),
        ("class_embedding.weight", "the x4 upscaler"),
        ("time_embedding.cond_proj.weight", "a latent consistency model (LCM)"),
    ):
        if shapes.rank(name) is not None:
            raise CheckpointError(f"{shapes.origin(name)}: this is a UNet of {what}; {_SUPPORTED}")
    if in_channels != 4:
        what = _EXTRA_CHANNELS.get(in_channels, "a model with extra inputs")
        raise CheckpointError(
            f"{shapes.origin('conv_in.weight')} takes {in_channels} channels: this is {what}, expected 4; {_SUPPORTED}"
        )
    projections = (
        f"down_blocks.{level}.attentions.0.proj_in.weight" for level in range(shapes.count("down_blocks.{}.resnets."))
    )
    for name in projections:
        if shapes.rank(name) == 2:
            raise CheckpointError(
                f"{shapes.origin(name)} is a matrix, in Stable Diffusion 1.x it is a convolution: "
                f"this is a UNet of Stable Diffusion 2 or XL; {_SUPPORTED}"
            )


def _vae(checkpoint: Checkpoint, shapes: Shapes) -> VAEConfig:
    config = checkpoint.configs.get("vae", {})
    levels = shapes.count("encoder.down_blocks.{}.resnets.")
    channels = tuple(
        shapes.size(f"channels {level}", f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0)
        for level in range(levels)
    )
    groups = _number(checkpoint, "norm_groups", config.get("norm_num_groups"), VAEConfig().norm_groups)
    _check_divisible(checkpoint, "VAE channels", channels, "norm_groups", [groups] * levels)
    if levels != len(VAEConfig().channels):
        raise ConversionError(f"{checkpoint.path}: a VAE of {levels} levels; one of Stable Diffusion 1.x has 4 (8x)")
    return VAEConfig(
        channels=channels,
        layers=shapes.count("encoder.down_blocks.0.resnets.{}."),
        latent_channels=shapes.size("latent channels", "post_quant_conv.weight", 0),
        norm_groups=groups,
    )


def _latent_scale(checkpoint: Checkpoint) -> float:
    scale = checkpoint.configs.get("vae", {}).get("scaling_factor", SD15.latent_scale)
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise ConversionError(f"{checkpoint.path}: vae/config.json: scaling_factor {scale!r} is no positive number")
    return float(scale)


def _text_encoder(checkpoint: Checkpoint, shapes: Shapes) -> TextEncoderConfig:
    config = checkpoint.configs.get("text_encoder", {})
    table = "text_model.embeddings.token_embedding.weight"
    width = shapes.size("width", table, 1, rank=2)
    heads = _number(checkpoint, "text_heads", config.get("num_attention_heads"), max(1, width // 64))
    _check_divisible(checkpoint, "text encoder width", [width], "text_heads", [heads])
    activation = config.get("hidden_act", checkpoint.metadata.get("glassine.activation", "quick_gelu"))
    if activation not in {"quick_gelu", "gelu"}:
        raise ConversionError(f"{checkpoint.path}: activation {activation!r}, expected quick_gelu or gelu")
    return TextEncoderConfig(
        vocab_size=shapes.size("vocabulary", table, 0),
        tokens=shapes.size("tokens", "text_model.embeddings.position_embedding.weight", 0),
        width=width,
        layers=shapes.count("text_model.encoder.layers.{}."),
        heads=heads,
        intermediate=shapes.size("inner width", "text_model.encoder.layers.0.mlp.fc1.weight", 0),
        activation=activation,
    )


def _check_context(checkpoint: Checkpoint, unet: Shapes, family: Family) -> None:
    width = family.text_encoders[0].width
    if family.unet.context_dim != width:
        raise ConversionError(
            f"{checkpoint.path}: the UNet reads a context of {family.unet.context_dim} numbers a token "
            f"({unet.reasons.get('unet context', 'no tensor says so')}), the text encoder gives {width}; "
            "they are not of one model"
        )


def _schedule(checkpoint: Checkpoint, override: Prediction | None) -> tuple[Scheduler, Prediction, str]:
    """The training schedule, the prediction type, and what said so."""
    config = checkpoint.configs.get("scheduler", {})
    known = {
        ours: config[theirs]
        for ours, theirs in (
            ("train_timesteps", "num_train_timesteps"),
            ("beta_start", "beta_start"),
            ("beta_end", "beta_end"),
            ("beta_schedule", "beta_schedule"),
            ("zero_terminal_snr", "rescale_betas_zero_snr"),
        )
        if theirs in config
    }
    scheduler = Scheduler(**known)
    if "ztsnr" in checkpoint.tensors or _ends_in_noise(checkpoint):
        scheduler = replace(scheduler, zero_terminal_snr=True)
    if override is not None:
        return scheduler, override, "asked for"
    spoken: Iterable[tuple[Any, str]] = (
        *((checkpoint.metadata.get(f"{who}.prediction_type"), f"metadata {who}") for who in ("glassine", "modelspec")),
        ("v" if "v_pred" in checkpoint.tensors else None, "the key v_pred"),
        (config.get("prediction_type"), "scheduler_config.json"),
    )
    words: dict[str, Prediction] = {
        **{"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}
    }
    for word, where in spoken:
        if word is not None:
            if word not in words:
                raise ConversionError(
                    f"{checkpoint.path}: {where} says prediction type {word!r}, expected one of {', '.join(words)}; "
                    "say which with --prediction-type"
                )
            return scheduler, words[word], where
    return scheduler, SD15.prediction, "Stable Diffusion 1.x"


def _size(checkpoint: Checkpoint) -> int:
    match = re.fullmatch(r"(\d{2,4})x\1", checkpoint.metadata.get("modelspec.resolution", ""))
    return int(match[1]) if match and int(match[1]) % 64 == 0 else SD15.size


def _ends_in_noise(checkpoint: Checkpoint) -> bool:
    """Whether the stored schedule ends in pure noise (zero terminal signal-to-noise ratio)."""
    tensor = checkpoint.tensors.get("alphas_cumprod")
    if tensor is None or len(tensor.shape) != 1 or tensor.shape[0] == 0:
        return False
    return float(tensor.read(tensor.shape[0] - 1)[0]) < 1e-6


def _number(checkpoint: Checkpoint, key: str, config: Any, default: int) -> int:
    numbers = _numbers(checkpoint, key, config, default)
    if len(numbers) != 1:
        raise ConversionError(f"{checkpoint.path}: {key} is {numbers}, expected one number")
    return numbers[0]


def _numbers(checkpoint: Checkpoint, key: str, config: Any, default: int) -> list[int]:
    """A config.json's value, else `glassine.<key>` of the header's metadata, else the default."""
    text = checkpoint.metadata.get(f"glassine.{key}")
    value: Any = config if config is not None else text.split(",") if text is not None else default
    try:
        numbers = [int(number) for number in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConversionError(f"{checkpoint.path}: {key} is {value!r}, expected a positive number or several")
    return numbers


def _check_divisible(checkpoint: Checkpoint, what: str, sizes: Collection[int], key: str, by: Collection[int]) -> None:
    if len(sizes) != len(by) or any(size % number for size, number in zip(sizes, by, strict=True)):
        raise ConversionError(
            f"{checkpoint.path}: {what} {tuple(sizes)} cannot be divided by {key} {tuple(by)}; "
            f'if the file is right, say what it is in its metadata ("glassine.{key}")'
        )
