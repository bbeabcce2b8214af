"""What a LoRA file says beside its tensors: in diffusers' header, or in adapter_config.json beside PEFT's own files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from glassine.convert.checkpoint import Checkpoint
from glassine.errors import ConversionError


class Settings:
    """PEFT's configuration of a file; there is none in files of other makers.

    Raises:
        ConversionError: it is there and cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._configs = list(_configs(checkpoint))

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) where rank-stabilised (arXiv 2312.03732); 1 where nothing is said."""
        for config in self._configs:
            alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha")))
            if isinstance(alpha, (int, float)) and math.isfinite(alpha):
                return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        return 1.0

    def said(self, name: str, default: Any = None) -> Any:
        """Return what it says of `name`."""
        return next((config[name] for config in self._configs if name in config), default)

    def __bool__(self) -> bool:
        return bool(self._configs)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's pattern is the end of a module's name. (It may be a regular expression; none from a stranger is run.)"""
    for name, value in patterns.items() if isinstance(patterns, dict) else ():
        if module == name or module.endswith(f".{name}"):
            return value
    return default


def _configs(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    text = checkpoint.metadata.get("lora_adapter_metadata")
    where = f"{checkpoint.path}: lora_adapter_metadata"
    beside = checkpoint.path.parent / "adapter_config.json"
    from_peft = any(key.startswith("base_model.model.") for key in checkpoint.tensors)
    try:
        if text is None and from_peft and beside.is_file():
            where, text = str(beside), beside.read_text(encoding="utf-8")
        if text is None:
            return
        said = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{where} cannot be read ({error}); its strength would be wrong") from None
    if not isinstance(said, dict):
        raise ConversionError(f"{where} is no JSON object; its strength would be wrong")
    parts = {key.partition(".")[0] for key in said if key.startswith(("unet.", "text_encoder"))}
    yield from ({key[len(part) + 1 :]: said[key] for key in said if key.startswith(f"{part}.")} for part in parts)
    if not parts:
        yield said
