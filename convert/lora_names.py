"""LoRA keys -> which weight of the model they change, and what each tensor is to that change.

A key is a module's name and an ending. Trainers spell modules in their own ways: kohya with underscores for dots
(`lora_unet_down_blocks_0_...`, SDXL in LDM's names: `lora_unet_input_blocks_4_1_...`), diffusers and PEFT with dots
behind the part's name, ComfyUI in LDM's names. Underscores cannot be turned back into dots, so nothing is parsed: every
spelling of every module the model has is written down, and the file's keys are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from glassine.convert.names import RESNET_LDM, UNET_LDM

Shapes = Mapping[str, tuple[int, ...]]

# What a LoRA calls the parts: kohya's beginnings (underscores follow) and those of dotted names.
_UNDERSCORED = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
_DOTTED = {"unet": ("unet.", ""), "text_encoder": ("text_encoder.", ""), "text_encoder_2": ("text_encoder_2.",)}

_DOWN_UP = (
    ("lora_down", "lora_up"),  # kohya
    ("lora_A", "lora_B"),  # PEFT
    ("lora_A.default", "lora_B.default"),  # PEFT, a state dict as it is in memory
    ("lora.down", "lora.up"),  # older diffusers, UNet
    ("lora_linear_layer.down", "lora_linear_layer.up"),  # older diffusers, text encoder
)
_ENDINGS = {
    **{f"{down}.weight": "down" for down, _ in _DOWN_UP},
    **{f"{up}.weight": "up" for _, up in _DOWN_UP},
    **{"lora_mid.weight": "mid", "lora_B.bias": "up_bias", "alpha": "alpha"},
    **{"dora_scale": "dora", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"},
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{"diff": "diff", "w_norm": "diff", "diff_b": "bias", "b_norm": "bias"},
    **{"oft_blocks": "oft_blocks", "rescale": "rescale"},
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
    **{"oft_R.weight": "oft_R", "oft_r": "oft_r", "oft_s": "oft_s", "boft_R": "boft_R", "boft_s": "boft_s"},
    **{"ia3_l": "ia3_l", "on_input": "on_input"},
}
# LDM's names of the UNet's blocks, and patterns of the canonical ones: the lines of the converter read backwards.
_UNET_TARGETS = [
    (source, re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(target)))) for source, target in UNET_LDM
]
_LONGEST_FIRST = sorted(_ENDINGS, key=len, reverse=True)
# diffusers' attention processors name the projection inside the ending: "attn1.processor.to_q_lora.down.weight".
_PROCESSOR = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$")


class Module(NamedTuple):
    """A layer of the model: its part, and its canonical name without `.weight`."""

    part: str
    name: str


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module's spelling and the tensor's role ("down", "alpha" ...), or None for an unknown ending."""
    key = key.removeprefix("base_model.model.")
    if match := _PROCESSOR.search(key):
        projection = "to_out.0" if match[1] == "out" else f"to_{match[1]}"
        return f"{key[: match.start()]}.{projection}", match[2]
    for ending in _LONGEST_FIRST:
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], _ENDINGS[ending]
    return None


class Spellings:
    """Every way in which a LoRA file may spell the modules of these parts."""

    def __init__(self, parts: Mapping[str, Shapes]) -> None:
        self._found: dict[str, set[Module]] = {}
        for part, shapes in parts.items():
            if part not in _DOTTED:
                continue
            names = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
            blocks = 1 + sum(1 for name in names if re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1", name))
            for name in names:
                for spelling in _spellings(part, name, blocks):
                    self._found.setdefault(spelling, set()).add(Module(part, name))

    def find(self, spelling: str) -> Module | None:
        """Return the module, or None where none, or more than one, is spelt so."""
        found = self._found.get(spelling, set())
        return next(iter(found)) if len(found) == 1 else None

    def ambiguous(self, spelling: str) -> list[str]:
        """The modules that share this spelling."""
        return sorted(module.name for module in self._found.get(spelling, set()))


def _spellings(part: str, name: str, blocks: int) -> Iterator[str]:
    names = [name, *(ldm_names(name, blocks) if part == "unet" else ())]
    for prefix in _UNDERSCORED[part]:
        yield from (prefix + spelt.replace(".", "_") for spelt in names)
    for prefix in _DOTTED[part]:
        yield prefix + name
        if name.startswith("text_model.") and prefix:  # transformers 5.6 dropped it
            yield prefix + name.removeprefix("text_model.")
    yield from (f"{prefix}{spelt}" for prefix in ("diffusion_model.", "model.diffusion_model.") for spelt in names[1:])


def ldm_names(name: str, blocks: int) -> list[str]:
    """Return LDM's names of a UNet module given by its canonical name.

    Args:
        blocks: LDM's input blocks per level: the residual layers, and one for the downsampler.
    """
    found = []
    for source, target in _UNET_TARGETS:
        match = target.match(f"{name}.")
        if match is None:
            continue
        rest = f"{name}."[match.end() :]
        if ".resnets." in match.group():
            rest = next((ours for ours, theirs in RESNET_LDM if theirs == rest), rest)
        found.append((source.format(**_numbers(match.groupdict(), blocks)) + rest).removesuffix("."))
    return found


def _numbers(found: Mapping[str, str], blocks: int) -> dict[str, int]:
    """Count the blocks as LDM does; a sampler, which has no layer number, is the last block of its level."""
    if "b" not in found:
        return {}
    level, layer = int(found["b"]), int(found["l"]) if "l" in found else blocks - 1
    return {"down": blocks * level + layer + 1, "up": blocks * level + layer}
