"""The verbs that make and check models: convert, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from glassine.commands.further import check_places, further_of, further_of_file, further_options
from glassine.commands.inspect import decisions
from glassine.commands.locate import show_faults
from glassine.commands.lora import extras_of, extras_options, previews_of, refuse_extras
from glassine.commands.options import FOLDER, as_json, bar, engine_of, engine_options, give, overwrite, read_size, say


@click.command()
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.argument("out", type=FOLDER, required=False)
@click.option(
    "--part",
    type=click.Choice(["unet", "vae", "vae_encoder", "vae_decoder", "text_encoder", "text_encoder_2"]),
    help="Convert this part alone.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    callback=lambda _, __, values: tuple(read_size(value) for value in values),
    metavar="WxH",
    help="Pixels; may be repeated.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 16),
    help="Rows a UNet call: 2 = with guidance at once, 1 = one after the other.  [default: 2; 1 for models without]",
)
@click.option(
    "--tokens", type=click.Choice(["77", "154", "231"]), default="77", show_default=True, help="Room for the prompt."
)
@click.option(
    "--attention",
    type=click.Choice(["split", "einsum", "sdpa"]),
    default="split",
    show_default=True,
    help="split: Neural Engine and GPU; einsum: GPU and CPU; sdpa: the fused operation of macOS 15.",
)
@click.option(
    "--functions",
    is_flag=True,
    help="Several sizes in one package, for macOS 15.  [default: a package each, weights shared by hard links]",
)
@click.option(
    "--chunks",
    type=click.IntRange(1, 8),
    help="Packages to cut the UNet into.  [default: with split attention the fewest that the Neural Engine can load]",
)
@click.option(
    "--layout",
    type=click.Choice(["channels_first", "channels_last"]),
    help="Of the tokens.  [default: channels_first for split, channels_last for the others]",
)
@click.option(
    "--palette",
    metavar="8|6|4|int8|FILE",
    help="Bits a weight of UNet and control networks; 6/16: a table for every 16 channels (macOS 15); or a recipe.  "
    "[default: fp16]",
)
@click.option("--name", help="The model's name.  [default: the file's]")
@click.option(
    "--family",
    type=click.Choice(["sd15", "sd2", "sdxl", "sdxl_refiner"]),
    help="Where the tensors leave a choice: a VAE alone.  [default: what the tensors say]",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="[default: what the file says]",
)
@click.option(
    "--distilled",
    type=click.Choice(["turbo", "lightning", "hyper", "lcm", "none"]),
    help="For few steps, and how it is drawn then.  [default: by the file's name]",
)
@click.option(
    "--vae-precision",
    type=click.Choice(["float16", "float32"]),
    help="[default: float32 where float16 would overflow: SDXL]",
)
@click.option("--tokenizer", type=FOLDER, help="vocab.json and merges.txt, for a vocabulary other than CLIP's.")
@extras_options
@further_options
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@overwrite
@as_json
def convert(source: Path | None, out: Path | None, base: Path | None, as_json: bool, **asked: Any) -> None:
    """Convert a checkpoint, or add networks to a model folder.

    SOURCE is a .safetensors file or a diffusers folder; OUT becomes a folder of .mlpackage files. Needs no network, no
    torch and less than 300 MB of memory, and takes seconds. With --base, SOURCE is a file that adds to that folder.

    \b
    Example:
      glassine convert dreamshaper_8.safetensors dreamshaper
      glassine convert dreamshaper_8.safetensors ink --lora ink.safetensors=0.8 --lora lcm.safetensors
      glassine convert dreamshaper_8.safetensors small --palette 6
      glassine convert unet.safetensors parts --part unet --size 768x512 --attention einsum
      glassine convert control_v11p_sd15_canny.safetensors --base dreamshaper --name canny
      glassine convert vae_transparent_decoder.safetensors --base dreamshaper
      glassine convert --base dreamshaper --collage
    """
    from glassine.convert.folder import ConvertOptions, convert_checkpoint
    from glassine.convert.imports import import_coremltools_quietly_later
    from glassine.convert.palettize import Palette

    check_places(source, base, out, asked)
    import_coremltools_quietly_later()
    if asked["palette"] is not None:
        asked["palette"] = Palette.read(asked["palette"])
    if base is not None:
        refuse_extras(asked)
        _add(source, base, as_json, asked)
        return
    assert source is not None
    assert out is not None
    asked["tokens"] = int(asked["tokens"])
    if asked["layout"] is None:
        asked["layout"] = "channels_first" if asked["attention"] == "split" else "channels_last"
    further = (*further_of(asked), *previews_of(asked))
    options = ConvertOptions(extras=extras_of(asked), further=further, **asked)
    with bar("reading") as advance:
        manifest = convert_checkpoint(
            source, out, options, lambda at: advance(at.done, at.total, f"{at.stage} {at.package}")
        )
    if not as_json:
        say(f"{manifest.name}: {manifest.family}, {manifest.width}x{manifest.height}, {', '.join(manifest.parts)}")
        say("\n".join(decisions(manifest.decided)))
    parts = {role: part.file for role, part in manifest.parts.items()}
    give({"folder": str(out), "parts": parts, "decided": manifest.decided}, str(out), as_json)


def _add(source: Path | None, base: Path, as_json: bool, asked: dict[str, Any]) -> None:
    """Add the networks of one file to a folder, or a UNet for collages."""
    from glassine.convert.addition import add_networks

    further = further_of_file(source, asked)
    how = {name: asked[name] for name in ("palette", "overwrite", "dry_run")}
    with bar("reading") as advance:
        manifest = add_networks(base, further, lambda at: advance(at.done, at.total, f"{at.stage} {at.package}"), **how)
    if not as_json:
        say(f"{manifest.name}: {manifest.family}, {manifest.width}x{manifest.height}, {', '.join(manifest.parts)}")
    parts = {role: part.file for role, part in manifest.parts.items()}
    give({"folder": str(base), "parts": parts}, str(base), as_json)


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--with",
    "given",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A LoRA, embedding or VAE that went into MODEL, or a folder that has them; may be repeated.",
)
@click.option("--part", multiple=True, help="Check this part alone; may be repeated.")
@click.option("--threshold", type=float, default=60.0, show_default=True, help="PSNR in dB below which a part fails.")
@click.option("--locate", is_flag=True, help="Find the first operation that goes wrong, in the portable engine.")
@click.option("--allow-pickle", is_flag=True, help="The files may be PyTorch pickles; see convert.")
@engine_options
@as_json
def verify(
    model: Path,
    source: Path,
    given: tuple[Path, ...],
    part: tuple[str, ...],
    threshold: float,
    locate: bool,
    allow_pickle: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Compare a model with the weights it was made of.

    Every part of MODEL runs on an engine, and its SOURCE weights in PyTorch in fp32, on the same inputs. SOURCE is the
    checkpoint, or a file that was added to MODEL: a control network, one of LayerDiffuse's, TAESD. LoRAs, embeddings
    and another VAE are laid over the checkpoint as they were; those that do not lie in MODEL/loras come --with.
    Parts with palettes have to reach what their weights have kept; what they do reach is noted in glassine.json. With
    --locate, operation by operation: against a fresh conversion of SOURCE, and in fp16 against fp32 (docs/diagnose.md).

    \b
    Example:
      glassine verify dreamshaper dreamshaper_8.safetensors
      glassine verify ink dreamshaper_8.safetensors --with loras --with vae-ft-mse-840000-ema-pruned.safetensors
      glassine verify dreamshaper dreamshaper_8.safetensors --locate --part unet
    """
    if locate:
        show_faults(model, source, part, threshold, as_json, given=given, allow_pickle=allow_pickle)
        return
    from glassine.convert.verify import note_palettes, verify_folder

    with bar("verifying") as advance:
        reports = verify_folder(
            model,
            source,
            given=given,
            allow_pickle=allow_pickle,
            parts=part,
            options=engine_of(asked),
            report=advance,
        )
    width = max((len(r.role) for r in reports), default=0)
    lines = [f"{r.role:{width}} {r.psnr:6.1f} dB   largest error {r.max_error:.2e}" for r in reports]
    give({r.role: {"psnr": r.psnr, "max_error": r.max_error} for r in reports}, "\n".join(lines), as_json)
    needed = note_palettes(model, reports, threshold)
    failed = [f"{r.role} is below {needed[r.role]:g} dB" for r in reports if not r.psnr >= needed[r.role]]
    if failed:
        raise click.ClickException(f"{', '.join(failed)}; convert the model again")
