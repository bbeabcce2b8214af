"""Which engines are loaded at a time: all that have been used, or with little memory those of one stage of a picture.

prompts -> text | picture -> encode | steps -> denoise, and refine | latents -> decode
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glassine.runtime.engine import Engine

Stage = Literal["text", "encode", "denoise", "refine", "decode"]
_STAGES: tuple[tuple[str, Stage], ...] = (  # beginnings of roles
    ("text_encoder", "text"),
    ("vae_encoder", "encode"),
    ("transparent_encoder", "encode"),
    ("vae_decoder", "decode"),
    ("transparent_decoder", "decode"),
)


def stage_of(role: str) -> Stage:
    """The stage in which a part is needed; whatever the steps call is of one: UNets, control nets, previews."""
    return next((stage for beginning, stage in _STAGES if role.startswith(beginning)), "denoise")


@dataclass(slots=True)
class _Loaded:
    stage: Stage
    engine: Engine
    files: dict[tuple[int, int], int]


class Residents:
    """The engines that are loaded, of a model and its refiner.

    Attributes:
        one_stage: before an engine is loaded, those of other stages are closed.
        peak: bytes of the weights of all that was loaded at one time, at most; packages that share a file count once.
        used: the same of all that was loaded since the start, which is what lies in memory without one_stage.
    """

    def __init__(self, *, one_stage: bool) -> None:
        self.one_stage = one_stage
        self.peak = 0
        self._loaded: dict[str, _Loaded] = {}
        self._seen: dict[tuple[int, int], int] = {}

    @property
    def used(self) -> int:
        """Bytes of all weights that were loaded since the start."""
        return sum(self._seen.values())

    def get(self, key: str, stage: Stage, packages: tuple[Path, ...], load: Callable[[], Engine]) -> Engine:
        """Return the engine that `key` stands for; load it if it is not there.

        Args:
            packages: what it runs; only looked at for the size of the weights.
        """
        if key not in self._loaded:
            if self.one_stage:
                self._close([other for other, loaded in self._loaded.items() if loaded.stage != stage])
            self._loaded[key] = _Loaded(stage, load(), _weights(packages))
            files = {file: size for loaded in self._loaded.values() for file, size in loaded.files.items()}
            self._seen.update(files)
            self.peak = max(self.peak, sum(files.values()))
        return self._loaded[key].engine

    def close(self) -> None:
        """Close every engine."""
        self._close(list(self._loaded))

    def _close(self, keys: list[str]) -> None:
        for key in keys:
            self._loaded.pop(key).engine.close()


def _weights(packages: tuple[Path, ...]) -> dict[tuple[int, int], int]:
    """(device, inode) -> bytes of the weight files of packages."""
    seen = [path.stat() for package in packages for path in package.rglob("weight*.bin") if path.is_file()]
    return {(stat.st_dev, stat.st_ino): stat.st_size for stat in seen}
