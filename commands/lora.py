"""LoRAs: the verb that puts them into a finished model and takes them out, and what other verbs say about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glassine.commands.options import FOLDER, as_json, bar, give, options, say

if TYPE_CHECKING:
    from glassine.convert.extras import Extras
    from glassine.convert.network import Further
    from glassine.convert.weights import WeightSource
    from glassine.manifest import MergedLora
    from glassine.runtime.prompt import NetworkTag

extras_options = options(
    click.option("--lora", "loras", multiple=True, metavar="FILE[=S]",
                 help="Merge a LoRA at strength S (1), or UNET,TEXT; may be repeated."),
    click.option("--vae", type=click.Path(path_type=Path), help="Take the VAE of this file."),
    click.option("--ema", is_flag=True, help="Take the UNet's running average, where the file has one."),
    click.option("--embedding", "embeddings", multiple=True, metavar="FILE[=WORD]",
                 help="Teach the text encoder a textual inversion; WORD is the file's name.  May be repeated."),
    click.option("--taesd", type=click.Path(path_type=Path), help="TAESD's decoder, which --preview draws with then."),
    click.option("--allow-pickle", is_flag=True,
                 help="Read .ckpt, .pt and .bin too, with torch's weights-only loader; prefer .safetensors."),
)  # fmt: skip
prompt_loras = options(
    click.option("--lora-dir", "lora_dirs", type=FOLDER, multiple=True,
                 help="Where <lora:NAME:0.8> in a prompt finds NAME.safetensors, besides MODEL/loras.  "
                      "May be repeated."),
    click.option("--source", "lora_source", type=click.Path(path_type=Path), metavar="CHECKPOINT",
                 help="What a MODEL with palettes was made of, for LoRAs in the prompt.  [default: where it lay then]"),
)  # fmt: skip
_PACKED_A_SECOND = 3e7  # numbers that are merged and get palettes, on two cores
_HASHED_A_SECOND = 1e9  # bytes


def extras_of(asked: dict[str, Any]) -> Extras:
    """Take the extras out of the convert verb's parameters."""
    from glassine.convert.embeddings import EmbeddingFile
    from glassine.convert.extras import Extras
    from glassine.convert.lora import LoraFile, refuse_twins

    loras = tuple(LoraFile.parse(words) for words in asked.pop("loras"))
    refuse_twins(loras)
    return Extras(
        loras=loras,
        embeddings=tuple(EmbeddingFile.parse(words) for words in asked.pop("embeddings")),
        **{name: asked.pop(name) for name in ("vae", "ema", "allow_pickle")},
    )


def refuse_extras(asked: dict[str, Any]) -> None:
    """Refuse what is laid over a checkpoint where a file is added to a folder that has been converted."""
    given = [name for name in ("loras", "vae", "ema", "embeddings", "taesd", "allow_pickle") if asked.pop(name)]
    if given:
        words = ", ".join(f"--{name.replace('_', '-').removesuffix('s')}" for name in given)
        raise click.UsageError(f"{words}: goes with a checkpoint, not with --base; LoRAs go in with 'glassine lora'")


def previews_of(asked: dict[str, Any]) -> tuple[Further, ...]:
    """Take the preview decoder out of the convert verb's parameters."""
    from functools import partial

    from glassine.convert.previews import preview_networks

    path = asked.pop("taesd")
    return () if path is None else (partial(preview_networks, path, allow_pickle=asked["allow_pickle"]),)


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("action", type=click.Choice(["add", "remove", "list"]))
@click.argument("names", nargs=-1, metavar="[FILE[=S] | NAME]...")
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="The checkpoint that MODEL was made of; merging into a UNet with palettes needs its weights.",
)
@click.option(
    "--with",
    "given",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A LoRA that went into MODEL with the checkpoint, or a folder that has it; may be repeated.",
)
@click.option("--allow-pickle", is_flag=True, help="SOURCE may be a PyTorch pickle; see convert.")
@as_json
def lora(
    model: Path,
    action: str,
    names: tuple[str, ...],
    source: Path | None,
    given: tuple[Path, ...],
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Put LoRAs into a model, or take them out.

    MODEL's weights are changed in place, in seconds: `add` merges FILE at strength S (1; or UNET,TEXT), a LoRA that is
    in already changes its strength; `remove` takes out those named. The model keeps a copy of each file in
    MODEL/loras, and its weights as they were: the checkpoint is not needed, and taking all LoRAs out gives the old
    bytes back. Interrupted, it leaves the old model or the new one. A model whose UNet has palettes changes from the
    weights of its checkpoint, --source, and its layers get palettes again.

    \b
    Example:
      glassine lora dreamshaper add ink.safetensors=0.8
      glassine lora dreamshaper add detail.safetensors=0.5,0 light.safetensors
      glassine lora dreamshaper remove ink
      glassine lora dreamshaper list
      glassine lora small add ink.safetensors=0.8 --source dreamshaper_8.safetensors
    """
    from glassine.convert.ingredients import exact_unet
    from glassine.convert.lora import LoraFile
    from glassine.convert.swap import add_loras, remove_loras
    from glassine.manifest import Manifest

    if (action == "list") == bool(names):
        raise click.UsageError("'list' takes no names" if names else f"'{action}' takes at least one LoRA")
    if source is None and (given or allow_pickle):
        raise click.UsageError("--with and --allow-pickle are about --source")
    manifest = Manifest.read(model)
    if action == "remove":
        _check_removable(model, manifest.loras, names)
    exact = None if source is None else exact_unet(model, source, given, allow_pickle=allow_pickle)
    if action == "add":
        manifest = add_loras(model, [LoraFile.parse(words) for words in names], exact)
    elif action == "remove":
        manifest = remove_loras(model, names, exact)
    lines = [_line(merged) for merged in manifest.loras]
    result = {"folder": str(model), "loras": [dataclasses.asdict(merged) for merged in manifest.loras]}
    give(result, "\n".join(lines) if lines else f"{model}: no LoRAs", as_json)


def _check_removable(model: Path, loras: Sequence[MergedLora], names: Sequence[str]) -> None:
    removable = {merged.name for merged in loras if merged.removable}
    for name in names:
        if name in removable:
            continue
        if any(merged.name == name for merged in loras):
            raise click.ClickException(f"{name}: was merged when {model} was converted; convert it again without it")
        raise click.ClickException(f"{name}: is not in {model}; it has {', '.join(sorted(removable)) or 'no LoRAs'}")


def _line(merged: MergedLora) -> str:
    how = "" if merged.removable else "   merged at conversion"
    return f"{merged.name:24} unet {merged.unet:g}, text {merged.text:g}   sha256 {merged.sha256[:12]}{how}"


def with_prompt_loras(model: Path, prompt: str, asked: Mapping[str, Any]) -> Path:
    """Return the model to draw a prompt with: `model`, or a variant of it with the LoRAs that the prompt names.

    Args:
        asked: what was said to `prompt_loras`.

    Raises:
        RequestError: a tag cannot be read, or no file, or more than one, has its name.
        PackageError: `model` is none, or has palettes and its checkpoint is not found.
    """
    from glassine.convert.lora import LoraFile
    from glassine.convert.swap import LORAS, variant
    from glassine.errors import RequestError
    from glassine.manifest import Manifest
    from glassine.runtime.prompt import network_tags

    tags = {found: tag for found, tag in network_tags(prompt).items() if not found.startswith("<hypernet:")}
    if not tags:
        return model
    Manifest.read(model)  # or it is no model, and nothing is looked for in it
    files = []
    for found, tag in tags.items():
        if tag is None:
            raise RequestError(
                f"prompt: {found} cannot be read; expected <lora:NAME>, <lora:NAME:0.8> or <lora:NAME:TEXT:UNET>"
            )
        files.append(LoraFile(_found(tag, [*asked["lora_dirs"], model / LORAS]), tag.unet, tag.text))
        say(f"LoRA {files[-1].path}: unet {tag.unet:g}, text {tag.text:g}")
    exact = partial(_exact, model, asked["lora_source"], asked["lora_dirs"])
    with bar("") as advance:
        return variant(model, files, exact, lambda done, total: advance(done, total, "merging LoRAs"))


def _exact(model: Path, given: Path | None, lora_dirs: Sequence[Path], count: int) -> WeightSource:
    """The weights that a UNet with palettes was made of, and how long it takes to make them anew of `count` numbers."""
    from glassine.convert.ingredients import exact_unet
    from glassine.convert.source import find_source, remember_source

    source = find_source(model, given)
    files = [source] if source.is_file() else source.glob("unet/*.safetensors")
    seconds = count / _PACKED_A_SECOND + sum(file.stat().st_size for file in files) / _HASHED_A_SECOND
    say(f"{model} has palettes: the LoRAs go into the weights of {source} and {count / 1e6:.0f} million numbers get "
        f"palettes anew, in about {seconds:.0f} s; the two last such variants are kept")  # fmt: skip
    weights = exact_unet(model, source, lora_dirs)
    if given is not None:
        remember_source(model, given)
    return weights


def _found(tag: NetworkTag, folders: Sequence[Path]) -> Path:
    from glassine.convert.extras import file_sha256
    from glassine.errors import RequestError

    there = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    same = [path for path in there if path.stem == tag.name]
    if same and len({file_sha256(path) for path in same}) == 1:
        return same[0]
    where = ", ".join(map(str, folders))
    if same:
        raise RequestError(f"prompt: the LoRA {tag.name!r} is {' and '.join(map(str, same))}; rename one of them")
    names = sorted({path.stem for path in there})
    known = f"there are {', '.join(names[:20])}" if names else "there are no .safetensors files"
    raise RequestError(f"prompt: no LoRA {tag.name!r} in {where}; {known}; say where with --lora-dir")
