"""Damage real headers and configs and see what becomes of them: a clear error or a model, and nothing else.

    python fuzz.py FOLDER SEED COUNT DRY_RUNS    -> JSON: outcomes counted, and what should not have happened

A process of its own, so that its memory can be limited: a header that makes the reader ask for a gigabyte fails here.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import random
import resource
import signal
import struct
import sys
import traceback
from pathlib import Path

import checkpoints

from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.errors import GlassineError

GIGABYTE = 1 << 30
SECONDS = 20  # for one file: hundreds of times what one takes
ODD = [0, 1, -1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 70, 0.5, True, None, "4", [], {}, [[4]]]
WORDS = ["", "0", "-1", "x", "1,2", "8,8,8,8", "9" * 400, "nan", "gelu", "v", "flow", "\udcff", "a b", "[]"]
KEYS = [
    "lora_unet_down_blocks_0.lora_down.weight",
    "model_ema.x",
    "v_pred",
    "ztsnr",
    "edm_mean",
    "alphas_cumprod",
    "conditioner.embedders.1.model.ln_final.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "model.diffusion_model.input_blocks.99999.0.op.weight",
    "model.diffusion_model.input_blocks.0.0.op.weight",
    "first_stage_model.decoder.up.9999.block.0.norm1.weight",
    "first_stage_model.decoder.up.9.block.0.norm1.weight",
    "cond_stage_model.model.token_embedding.weight",
    "text_projection.weight",
    "conv_in.weight",
    "",
    "../../etc/passwd",
    "\x00",
]
Header = dict[str, object]


def real_headers() -> list[Header]:
    """Headers of every family, whole and in parts, with their offsets; small sizes, real names."""
    headers = []
    for sizes in checkpoints.TINY_FAMILIES.values():
        small = dataclasses.replace(sizes, vocabulary=512)
        for shapes in (checkpoints.ldm_checkpoint(small), checkpoints.ldm_unet(small), checkpoints.ldm_vae(small)):
            entries: Header = {key: {"dtype": "F16", "shape": list(shape)} for key, shape in shapes.items()}
            headers.append({"__metadata__": sizes.header(), **entries})
    return headers


def placed(header: Header) -> tuple[Header, int]:
    """Fill in the offsets of what has a shape that can be counted; the bytes of data it then takes."""
    offset = 0
    for entry in header.values():
        if isinstance(entry, dict) and "shape" in entry and "data_offsets" not in entry:
            size = {"F32": 4, "I64": 8, "U8": 1}.get(str(entry.get("dtype")), 2)
            shape = entry["shape"] if isinstance(entry["shape"], list) else []
            for dim in shape:
                size *= dim if type(dim) is int and dim >= 0 else 1
            entry["data_offsets"] = [offset, offset + size]
            offset += size
    return header, offset


def damaged(rng: random.Random, header: Header) -> Header:
    """Change names, shapes, dtypes and metadata of a header that was right."""
    header = copy.deepcopy(header)
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        key = rng.choice(keys)
        entry = header.get(key)
        if not isinstance(entry, dict):
            continue
        kind = rng.randrange(10)
        if kind == 0:
            for gone in rng.sample(keys, rng.choice([1, 3, len(keys) // 2])):
                header.pop(gone, None)
        elif kind == 1:
            header[rng.choice([key[:-1], key + "x", key.replace(".", "_"), key.replace("0", "1"), key.upper()])] = (
                header.pop(key)
            )
        elif kind == 2:
            entry["shape"] = rng.choice([[], [0], [1], [1 << 40], [3, 3], [8] * 5, rng.choice(ODD)])
        elif kind == 3 and isinstance(entry["shape"], list) and entry["shape"]:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(ODD)
        elif kind == 4:
            entry["dtype"] = rng.choice(["F32", "BF16", "I64", "U8", "F8_E4M3", "Q4", 3, None])
        elif kind == 5:
            other = header.get(rng.choice(keys))
            if isinstance(other, dict):
                entry["shape"], other["shape"] = other["shape"], entry["shape"]
        elif kind == 6:
            header[rng.choice(KEYS)] = {"dtype": "F16", "shape": rng.choice([[], [4], [4, 4], [1000]])}
        elif kind == 7:
            names = ["glassine.heads", "glassine.norm_groups", "glassine.text_heads", "glassine.activation"]
            names += ["modelspec.prediction_type", "modelspec.resolution", "modelspec.architecture"]
            header["__metadata__"] = {rng.choice(names): rng.choice(WORDS)}
        elif kind == 8:
            header[key] = rng.choice([None, [], {}, 3, {"dtype": "F16"}, {"shape": [1]}])
        else:
            entry["data_offsets"] = rng.choice([[0, 0], [5, 1], [0, 1 << 62], [-1, 1], "x", [0], [0.0, 2.0]])
    return header


def write(rng: random.Random, path: Path, header: Header) -> None:
    """Write the file, sparse; now and then damage its bytes as well."""
    header, size = placed(header)
    text = bytearray(json.dumps(header).encode("utf-8", "surrogatepass"))
    length = len(text)
    if rng.random() < 0.4:
        for _ in range(rng.choice([1, 3, 30])):
            text[rng.randrange(len(text))] = rng.randrange(256)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, length - 1, length + 1, 1 << 20, 1 << 33, (1 << 64) - 1])
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + text)
        file.truncate(max(0, 8 + len(text) + min(size, 1 << 40) + rng.choice([0] * 12 + [-1, 1, -1000, 1000])))
        if rng.random() < 0.1:
            file.truncate(rng.randrange(8 + len(text)))


def damage_configs(rng: random.Random, folder: Path, kept: dict[Path, str]) -> None:
    """Put another value, or none, or something that is no JSON, into some of a diffusers folder's configs."""
    for path, text in kept.items():
        config = json.loads(text)
        if rng.random() < 0.5:
            key = rng.choice([*config, "num_attention_heads", "prediction_type", "beta_start", "scaling_factor"])
            config[key] = rng.choice([*ODD, *WORDS[:-4], {"a": [1]}])
        new = json.dumps(config)
        path.write_text(new[: rng.randrange(len(new))] if rng.random() < 0.05 else new)


def judged(path: Path, dry_run: bool) -> str:
    """Open, recognise and perhaps convert; say what happened."""
    try:
        detected = detect(open_checkpoint(path))
        if not dry_run:
            return "recognised"
        from glassine.convert.folder import ConvertOptions, convert_checkpoint

        part = "unet" if "unet" in detected.parts else "vae"
        options = ConvertOptions(sizes=((64, 64),), part=part, attention="einsum", dry_run=True)
        convert_checkpoint(path, path.with_name("out"), options)
        return "convertible"
    except GlassineError as error:
        text = str(error)
        if path.name not in text or len(text) > 4000:
            return f"UNCLEAR {text[:300]}"
        return type(error).__name__


def too_slow(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    folder, seed, count, dry_runs = Path(sys.argv[1]), *map(int, sys.argv[2:])
    headers = real_headers()
    model = checkpoints.write_diffusers(folder / "diffusers", checkpoints.Sizes(vocabulary=512))
    configs = {path: path.read_text() for path in sorted(model.glob("*/*.json"))}
    path = folder / "damaged.safetensors"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, used + GIGABYTE))
    signal.signal(signal.SIGALRM, too_slow)
    outcomes: collections.Counter[str] = collections.Counter()
    wrong = []
    for number in range(count):
        rng = random.Random(seed + number)
        target = path
        if number % 5 == 4:
            damage_configs(rng, model, configs)
            target = model
        else:
            write(rng, path, damaged(rng, rng.choice(headers)))
        good = outcomes["recognised"] + outcomes["convertible"]  # a fifth, of which some are converted
        dry_run = bool(dry_runs) and good % max(1, count // (5 * dry_runs)) == 0
        signal.alarm(SECONDS)
        try:
            outcome = judged(target, dry_run)
        except BaseException:  # a crash of any kind, a hang, too much memory: all that is looked for here
            outcome = f"CRASH {traceback.format_exc()[-1500:]}"
        signal.alarm(0)
        outcomes[outcome.split(maxsplit=1)[0]] += 1
        if outcome.startswith(("CRASH", "UNCLEAR")):
            wrong.append(f"seed {seed + number}: {outcome}")
    print(json.dumps({"outcomes": outcomes, "wrong": wrong[:20]}))


if __name__ == "__main__":
    main()
