"""Source names -> canonical names, as tables. A new family is new lines here, not code.

Canonical are the names of diffusers (UNet, VAE) and of Hugging Face's CLIP with its `text_model.`.

A line maps the beginning of a key; what follows is mapped by the first matching line of `tails`, or kept. Placeholders
stand for a number: `{n}` is kept; `{down}` counts LDM's input blocks, `{up}` its output blocks (both become block `{b}`
and layer `{l}`); `{flip}` counts the decoder's levels from the other end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]
Lines = tuple[tuple[str, str], ...]

RESNET_LDM: Lines = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
)

UNET_LDM: Lines = (
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("time_embed.cond_proj.", "time_embedding.cond_proj."),  # LCM
    ("label_emb.0.0.", "add_embedding.linear_1."),  # SDXL
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("input_blocks.{down}.0.op.", "down_blocks.{b}.downsamplers.0.conv."),
    ("input_blocks.{down}.0.", "down_blocks.{b}.resnets.{l}."),
    ("input_blocks.{down}.1.", "down_blocks.{b}.attentions.{l}."),
    ("middle_block.0.", "mid_block.resnets.0."),
    ("middle_block.1.", "mid_block.attentions.0."),
    ("middle_block.2.", "mid_block.resnets.1."),
    ("output_blocks.{up}.0.", "up_blocks.{b}.resnets.{l}."),
    ("output_blocks.{up}.1.conv.", "up_blocks.{b}.upsamplers.0.conv."),  # a level without attention
    ("output_blocks.{up}.2.conv.", "up_blocks.{b}.upsamplers.0.conv."),
    ("output_blocks.{up}.1.", "up_blocks.{b}.attentions.{l}."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
)

VAE_LDM: Lines = (
    ("encoder.down.{n}.block.{n}.", "encoder.down_blocks.{}.resnets.{}."),
    ("encoder.down.{n}.downsample.conv.", "encoder.down_blocks.{}.downsamplers.0.conv."),
    ("decoder.up.{flip}.block.{n}.", "decoder.up_blocks.{}.resnets.{}."),
    ("decoder.up.{flip}.upsample.conv.", "decoder.up_blocks.{}.upsamplers.0.conv."),
    ("encoder.mid.block_1.", "encoder.mid_block.resnets.0."),
    ("encoder.mid.block_2.", "encoder.mid_block.resnets.1."),
    ("encoder.mid.attn_1.", "encoder.mid_block.attentions.0."),
    ("decoder.mid.block_1.", "decoder.mid_block.resnets.0."),
    ("decoder.mid.block_2.", "decoder.mid_block.resnets.1."),
    ("decoder.mid.attn_1.", "decoder.mid_block.attentions.0."),
    ("encoder.norm_out.", "encoder.conv_norm_out."),
    ("decoder.norm_out.", "decoder.conv_norm_out."),
)
VAE_TAILS: Lines = (  # the first four are those of older diffusers
    ("query.", "to_q."),
    ("key.", "to_k."),
    ("value.", "to_v."),
    ("proj_attn.", "to_out.0."),
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
    ("nin_shortcut.", "conv_shortcut."),
)
VAE_DIFFUSERS: Lines = (
    ("encoder.mid_block.attentions.0.", "encoder.mid_block.attentions.0."),
    ("decoder.mid_block.attentions.0.", "decoder.mid_block.attentions.0."),
)

CLIP_BARE: Lines = (("", "text_model."),)

OPEN_CLIP: Lines = (
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("transformer.resblocks.{n}.", "text_model.encoder.layers.{}."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),  # stored transposed
)
OPEN_CLIP_TAILS: Lines = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.in_proj_weight", "self_attn.{qkv}_proj.weight"),  # three matrices, one on top of the other
    ("attn.in_proj_bias", "self_attn.{qkv}_proj.bias"),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)


@dataclass(frozen=True)
class Layout:
    """One way in which a file may hold a part: every key under `prefix`; it is this layout if `marker` is there."""

    part: Part
    origin: str
    prefix: str
    marker: str
    heads: Lines = ()
    tails: Lines = ()
    transposed: tuple[str, ...] = ()

    @cached_property
    def _heads(self) -> list[tuple[re.Pattern[str], list[str], str]]:
        return [(_pattern(source), re.findall(r"\{(\w+)\}", source), target) for source, target in self.heads]

    def canonical(self, tail: str, numbering: Numbering) -> str:
        """The canonical name of the key `prefix + tail`; a key that no line knows keeps its name."""
        for pattern, kinds, target in self._heads:
            if match := pattern.match(tail):
                numbers = [int(number) for number in match.groups()]
                rest = tail[match.end() :]
                return numbering.fill(target, kinds, numbers) + next(
                    (new + rest[len(old) :] for old, new in self.tails if rest.startswith(old)), rest
                )
        return tail


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{\w+\\\}", r"(\\d{1,4})", re.escape(source)))


@dataclass(frozen=True, slots=True)
class Numbering:
    """How LDM's flat block numbers become levels: blocks per level and levels of the VAE."""

    blocks: int = 3
    levels: int = 4

    def fill(self, target: str, kinds: list[str], numbers: list[int]) -> str:
        """Put the numbers found for the placeholders `kinds` into `target`."""
        for kind, number in zip(kinds, numbers, strict=True):
            if kind in {"down", "up"}:
                block, layer = divmod(number - (kind == "down"), self.blocks)
                return target.format(b=block, l=layer)
        return target.format(*(self.levels - 1 - n if k == "flip" else n for k, n in zip(kinds, numbers, strict=True)))


CLIP_PREFIXES: tuple[tuple[Part, str], ...] = (
    ("text_encoder", "cond_stage_model.transformer."),
    ("text_encoder", "conditioner.embedders.0.transformer."),  # SDXL
    ("text_encoder", "text_encoder/"),
    ("text_encoder_2", "text_encoder_2/"),
    ("text_encoder", ""),
)
OPEN_CLIP_ORIGIN = "OpenCLIP"
OPEN_CLIP_PREFIXES: tuple[tuple[Part, str, str], ...] = (
    ("text_encoder", "cond_stage_model.model.", "token_embedding.weight"),  # Stable Diffusion 2
    ("text_encoder_2", "conditioner.embedders.1.model.", "token_embedding.weight"),  # SDXL
    ("text_encoder_2", "conditioner.embedders.0.model.", "token_embedding.weight"),  # its refiner
    ("text_encoder", "", "transformer.resblocks.0.ln_1.weight"),
)

LAYOUTS = (
    Layout("unet", "LDM", "model.diffusion_model.", "input_blocks.0.0.weight", UNET_LDM, RESNET_LDM),
    Layout("unet", "diffusers folder", "unet/", "conv_in.weight"),
    Layout("unet", "LDM, bare", "", "input_blocks.0.0.weight", UNET_LDM, RESNET_LDM),
    Layout("unet", "LDM, bare", "diffusion_model.", "input_blocks.0.0.weight", UNET_LDM, RESNET_LDM),
    Layout("unet", "diffusers, bare", "", "time_embedding.linear_1.weight"),
    Layout("vae", "LDM", "first_stage_model.", "decoder.mid.block_1.norm1.weight", VAE_LDM, VAE_TAILS),
    Layout("vae", "LDM", "vae.", "decoder.mid.block_1.norm1.weight", VAE_LDM, VAE_TAILS),
    Layout("vae", "diffusers folder", "vae/", "decoder.mid_block.resnets.0.norm1.weight", VAE_DIFFUSERS, VAE_TAILS),
    Layout("vae", "LDM, bare", "", "decoder.mid.block_1.norm1.weight", VAE_LDM, VAE_TAILS),
    Layout("vae", "diffusers, bare", "", "decoder.mid_block.resnets.0.norm1.weight", VAE_DIFFUSERS, VAE_TAILS),
    *(
        Layout(part, "CLIP", prefix, f"{inner}embeddings.token_embedding.weight", heads)
        for part, prefix in CLIP_PREFIXES
        for inner, heads in (("text_model.", ()), ("", CLIP_BARE))
    ),
    *(
        Layout(part, OPEN_CLIP_ORIGIN, prefix, marker, OPEN_CLIP, OPEN_CLIP_TAILS, ("text_projection.weight",))
        for part, prefix, marker in OPEN_CLIP_PREFIXES
    ),
)

# Keys that mean nothing for drawing, with the reason. Everything else must be used.
IGNORED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"model_ema\.", "running average of the weights (EMA)"),
        (
            r"((alphas_cumprod(_prev)?|betas|(sqrt|log)_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor)$)",
            "schedule",
        ),
        (r"denoiser\.sigmas$", "schedule"),
        (r"(v_pred|ztsnr)$", "marker of the prediction type"),
        (r"(first_stage_model\.|vae\.)?(loss|model_ema)\.", "training loss of the VAE"),
        (r"(.*[./])?embeddings\.position_ids$", "a count from 0 to 76"),
        (r"(.*[./])?(logit_scale|attn_mask)$", "used in the training of CLIP"),
        (
            r"((cond_stage_model|conditioner\.embedders\.0)\.transformer\.|text_encoder/)?(text|visual)_projection\.weight$",
            "CLIP's image side",
        ),
        (r"(cond_stage_model\.)?(transformer\.)?vision_model\.", "CLIP's image side"),
        (r"(cond_stage_model\.model\.|conditioner\.embedders\.\d\.model\.)?visual\.", "CLIP's image side"),
        (r"(global_step|epoch|state_dict)$", "training state"),
        (r"embedding_manager\.", "training state"),
    )
)


def ignored(key: str) -> str | None:
    """Why the key is left out on purpose, or None."""
    return next((reason for pattern, reason in IGNORED if pattern.match(key)), None)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical weight comes from: a key, or the `third` of it (0, 1, 2), read transposed or not."""

    key: str
    third: int | None = None
    transposed: bool = False


@dataclass(slots=True)
class Names:
    """The keys of a source by canonical name, part by part, and the keys that no part took."""

    parts: dict[Part, dict[str, Source]] = field(default_factory=dict)
    layouts: dict[Part, Layout] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    twice: list[tuple[str, str]] = field(default_factory=list)


def find_layouts(keys: Collection[str]) -> dict[Part, Layout]:
    """The layout of each part that is there: the first whose marker is a key."""
    found: dict[Part, Layout] = {}
    for layout in LAYOUTS:
        if layout.part not in found and layout.prefix + layout.marker in keys:
            found[layout.part] = layout
    return found


def map_names(keys: Collection[str], layouts: Mapping[Part, Layout]) -> Names:
    """Sort every key into its part under its canonical name."""
    names = Names(parts={part: {} for part in layouts}, layouts=dict(layouts))
    numbering = _numbering(keys, layouts)
    projection = _bare_projection(layouts)
    for key in keys:
        if key != projection and ignored(key) is not None:
            continue
        layout = next((layout for layout in layouts.values() if key.startswith(layout.prefix)), None)
        if layout is None:
            names.unknown.append(key)
            continue
        canonical = layout.canonical(key[len(layout.prefix) :], numbering)
        table = names.parts[layout.part]
        for third, name in enumerate([canonical.replace("{qkv}", letter) for letter in "qkv"]):
            if third and name == canonical:
                break
            if name in table:
                names.twice.append((table[name].key, key))
            table[name] = Source(key, third if name != canonical else None, name in layout.transposed)
    return names


def _bare_projection(layouts: Mapping[Part, Layout]) -> str | None:
    """The one key that a bare file of SDXL's second encoder has under the name of something CLIP-L does not use."""
    second = layouts.get("text_encoder_2")
    return "text_projection.weight" if second is not None and not second.prefix else None


def _numbering(keys: Collection[str], layouts: Mapping[Part, Layout]) -> Numbering:
    """Read blocks per level off the first downsampler, and the VAE's levels off its highest block."""
    blocks, levels = Numbering().blocks, Numbering().levels
    if (unet := layouts.get("unet")) is not None:
        downsampler = re.compile(re.escape(unet.prefix) + r"input_blocks\.(\d{1,4})\.0\.op\.weight$")
        found = [int(match[1]) for key in keys if (match := downsampler.match(key))]
        blocks = max(1, min(found, default=blocks))
    if (vae := layouts.get("vae")) is not None:
        level = re.compile(re.escape(vae.prefix) + r"decoder\.up\.(\d{1,4})\.")
        levels = max((int(match[1]) + 1 for key in keys if (match := level.match(key))), default=levels)
    return Numbering(blocks, levels)
