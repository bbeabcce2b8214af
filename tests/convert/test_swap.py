"""LoRAs in a finished folder: what is written, that it comes back, and that no moment shows a mix."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from glassine.convert import clone, rewrite, swap
from glassine.convert.control import Control, control_networks
from glassine.convert.extras import Extras
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.index import Index, Place, read_indices
from glassine.convert.lora import LoraFile, lora_patches
from glassine.convert.swap import applied, change_loras, keep_file, variant
from glassine.convert.weights import Arrays
from glassine.errors import ConversionError, GlassineError, PackageError
from glassine.manifest import Manifest

TINY = Path(swap.__file__).parents[1] / "models" / "tiny"
LCM = TINY / "tiny_lcm_lora.safetensors"
OPTIONS = ConvertOptions(sizes=((128, 128), (192, 128)), tokenizer=TINY)
RNG = np.random.default_rng(3)


def drawn(*shape: int) -> np.ndarray:
    return (0.1 * RNG.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tiny model at two sizes, whose packages share their weights; read only."""
    folder = tmp_path_factory.mktemp("swap") / "model"
    convert_checkpoint(TINY / "tiny.safetensors", folder, OPTIONS)
    return folder


@pytest.fixture(scope="module")
def loras(checkpoints, tmp_path_factory):
    """A LoRA for both networks, with a DoRA, an OFT, a convolution, a bias and a norm among its layers."""
    folder = tmp_path_factory.mktemp("loras")
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    text = "lora_te_text_model_encoder_layers_1"
    tensors = {
        f"{block}_attn1_to_q.lora_down.weight": drawn(4, 32),
        f"{block}_attn1_to_q.lora_up.weight": drawn(32, 4),
        f"{block}_attn2_to_k.lora_down.weight": drawn(4, 64),
        f"{block}_attn2_to_k.lora_up.weight": drawn(32, 4),
        f"{block}_attn2_to_k.dora_scale": np.abs(drawn(32, 1)) + 1,
        f"{block}_attn1_to_v.oft_blocks": drawn(4, 8, 8),
        f"{block}_norm1.w_norm": drawn(32),
        f"{block}_norm1.b_norm": drawn(32),
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": drawn(4, 64, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": drawn(64, 4, 1, 1),
        f"{text}_mlp_fc1.lora_down.weight": drawn(4, 64),
        f"{text}_mlp_fc1.lora_up.weight": drawn(256, 4),
        f"{text}_mlp_fc1.diff_b": drawn(256),
    }
    return checkpoints.write_safetensors(folder / "kinds.safetensors", tensors, dtype="F32")


@pytest.fixture
def model(converted, tmp_path):
    """A copy that may be changed; its hard links are kept."""
    folder = tmp_path / "model"
    shutil.copytree(converted, folder, copy_function=os.link)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file but Glassine's own store and the LoRA files: path -> sha256."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    inside = {path.relative_to(folder): path for path in files}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in inside.items()
        if name.parts[0] not in {".glassine", "loras"}
    }


def weights(folder: Path, package: str) -> dict[str, np.ndarray]:
    (index,) = [index for index in read_indices(folder) if index.package == f"{package}.mlpackage"]
    blob = (folder / index.package / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()
    return {
        place.name: np.frombuffer(blob, place.dtype, place.nbytes // np.dtype(place.dtype).itemsize, place.offset)
        for place in index.places
    }


def test_adding_is_converting_with_it(converted, model, loras, tmp_path):
    """Equal to `convert --lora` but for one rounding where the package holds a weight times a scale, or as fp16."""
    files = (LoraFile(LCM, 0.7), LoraFile(loras, 0.9, 0.4))
    change_loras(model, [LoraFile(keep_file(model, file.path), file.unet, file.text) for file in files])
    fresh = tmp_path / "fresh"
    convert_checkpoint(
        TINY / "tiny.safetensors",
        fresh,
        ConvertOptions(sizes=OPTIONS.sizes, tokenizer=TINY, extras=Extras(loras=files)),
    )
    for package in ("Unet", "Unet_192x128", "TextEncoder"):
        ours, theirs = weights(model, package), weights(fresh, package)
        before = weights(converted, package)
        assert ours.keys() == theirs.keys() == before.keys()
        for name, array in theirs.items():
            exact = not name.endswith((".to_q.weight", ".q_proj.weight", ".q_proj.bias"))
            # A step of fp16 at the larger of the weight and what it was: the sum of the two may be near 0.
            steps = np.spacing(np.maximum(np.abs(array), np.abs(before[name])).astype(np.float16)).astype(np.float32)
            apart = np.abs(array.astype(np.float32) - ours[name].astype(np.float32)) / steps
            assert apart.max() <= (0 if exact else 1), name  # measured 0, and 1 where a scale is folded in
    assert [(lora.name, lora.unet, lora.text, lora.removable) for lora in Manifest.read(model).loras] == [
        ("tiny_lcm_lora", 0.7, 1.0, True),
        ("kinds", 0.9, 0.4, True),
    ]
    assert [lora.removable for lora in Manifest.read(fresh).loras] == [False, False]


def test_taking_all_out_gives_the_bytes_back(model, loras):
    before = contents(model)
    linked = model / "Unet_192x128.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    lcm, kinds = keep_file(model, LCM), keep_file(model, loras)
    change_loras(model, [LoraFile(lcm)])
    one = contents(model)
    assert {name for name in one if one[name] != before[name]} == {
        "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        "Unet_192x128.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        "glassine.json",
    }
    assert linked.samefile(model / "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin")
    change_loras(model, [LoraFile(lcm, -0.4), LoraFile(kinds, 1.0)])
    assert contents(model).keys() == before.keys()
    change_loras(model, [LoraFile(lcm)])
    assert contents(model) == one  # the same whatever was there in between
    change_loras(model, [])
    assert contents(model) == before
    assert not (model / ".glassine").exists()


def test_a_copied_folder_whose_links_are_lost_still_comes_back(model, loras, tmp_path):
    before = contents(model)
    change_loras(model, [LoraFile(keep_file(model, loras))])
    other = tmp_path / "other"
    shutil.copytree(model, other)
    change_loras(other, [])
    assert contents(other) == before


@pytest.mark.parametrize("links", [True, False])
def test_a_disk_without_clones_or_links_is_written_in_full(links, model, loras, monkeypatch):
    change_loras(model, [LoraFile(keep_file(model, loras))])
    expected = contents(model)
    change_loras(model, [])
    before = contents(model)
    monkeypatch.setattr(clone, "cloned", lambda *_: False)
    monkeypatch.setattr(rewrite, "cloned", lambda *_: False)
    if not links:

        def refuse(*_):
            raise OSError(1, "no links here")

        monkeypatch.setattr(clone.os, "link", refuse)
    change_loras(model, [LoraFile(keep_file(model, loras))])
    assert contents(model) == expected
    change_loras(model, [])
    assert contents(model) == before


def test_what_cannot_be_merged_changes_nothing(model, checkpoints, tmp_path):
    before = contents(model)
    stranger = checkpoints.write_safetensors(tmp_path / "x.safetensors", {"lora_unet_x.lora_up.weight": drawn(2, 2)})
    huge = {
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": 3000 + drawn(4, 64, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": 3000 + drawn(64, 4, 1, 1),
    }
    overflowing = checkpoints.write_safetensors(tmp_path / "huge.safetensors", huge, dtype="F32")
    with pytest.raises(ConversionError, match="change nothing in this model"):
        change_loras(model, [LoraFile(stranger)])
    with pytest.raises(ConversionError, match=r"mid_block.*outside the range of float16; lower the strength"):
        change_loras(model, [LoraFile(overflowing)])
    assert contents(model) == before
    assert Manifest.read(model).loras == ()


def test_a_file_that_is_gone_or_another_is_named(model, loras):
    kept = keep_file(model, loras)
    change_loras(model, [LoraFile(kept)])
    kept.write_bytes(LCM.read_bytes())
    with pytest.raises(PackageError, match=r"the file of the LoRA 'kinds' .* is not there any more"):
        applied(model)
    with pytest.raises(PackageError, match="another LoRA of this name is there"):
        keep_file(model, loras)


def test_folders_that_cannot_be_changed_say_why(model, tmp_path, loras):
    compiled = model / "Unet.mlmodelc"
    compiled.mkdir()
    with pytest.raises(PackageError, match="was compiled from the weights as they are now"):
        change_loras(model, [LoraFile(LCM)])
    compiled.rmdir()
    for index in model.glob("*.weights.json"):
        index.unlink()
    with pytest.raises(PackageError, match=r"no \*\.weights\.json"):
        change_loras(model, [LoraFile(LCM)])
    with pytest.raises(PackageError, match=r"no glassine\.json here"):
        change_loras(tmp_path, [LoraFile(LCM)])


def test_damaged_indices_are_refused(model):
    """200 indices with characters turned over: a clear error, or the very same places."""
    path = model / "TextEncoder.weights.json"
    good, chance, refused = path.read_text(), random.Random(2), 0
    expected = read_indices(model)
    for _ in range(200):
        text = list(good)
        for _ in range(chance.randint(1, 3)):
            text[chance.randrange(len(text))] = chance.choice('0123456789[]{},:"-eE x')
        path.unlink()
        path.write_text("".join(text))
        try:
            read_indices(model)
        except GlassineError:
            refused += 1
    assert refused > 40  # measured 115: a digit of a shape or an offset, a letter of a name still make an index
    path.write_text(good)
    assert read_indices(model) == expected


def test_a_variant_is_made_once_and_leaves_the_model_alone(model, loras):
    before = contents(model)
    first = variant(model, [LoraFile(LCM, 0.5)])
    made = (first / "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_mtime_ns
    assert contents(model) == before
    assert variant(model, [LoraFile(LCM, 0.5)]) == first
    assert (first / "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_mtime_ns == made
    assert variant(model, [LoraFile(LCM, 0.6)]) != first
    change_loras(model, [LoraFile(keep_file(model, LCM), 0.5)])
    after = contents(model)
    assert {name: digest for name, digest in contents(first).items() if name != "glassine.json"} == {
        name: digest for name, digest in after.items() if name != "glassine.json"
    }
    on_top = variant(model, [LoraFile(loras)])
    assert [lora.name for lora in Manifest.read(on_top).loras] == ["tiny_lcm_lora", "kinds"]
    change_loras(model, [LoraFile(keep_file(model, LCM), 0.5), LoraFile(keep_file(model, loras))])
    assert (
        contents(model)["Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]
        == (contents(on_top)["Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin"])
    )
    assert len(list((model / ".glassine/variants").iterdir())) == 2  # the oldest was forgotten


def test_two_commands_at_once(model):
    with swap.locked(model), pytest.raises(PackageError, match="another command is changing"):
        change_loras(model, [LoraFile(LCM)])


SCRIPT = """
import sys
from pathlib import Path
from glassine.convert import swap
from glassine.convert.lora import LoraFile
files = sorted(Path(sys.argv[1], "loras").iterdir())
for i in range(10**6):
    swap.change_loras(Path(sys.argv[1]), [LoraFile(file, 1 - (i % 2) / 2) for file in files] if i % 3 else [])
    print(i, flush=True)
"""


@pytest.mark.parametrize("times", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_is_one_or_the_other(times, model, loras):
    """A process that changes the LoRAs again and again is killed at random moments."""
    files = [keep_file(model, LCM), keep_file(model, loras)]
    whole = {(): contents(model)}
    for strength in (1.0, 0.5):
        change_loras(model, [LoraFile(file, strength) for file in sorted(files)])
        whole[(strength, strength)] = contents(model)
    chance, seen = random.Random(4), set()
    for i in range(times):
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, model], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline(), "the child ended by itself"
        began = time.monotonic()
        assert child.stdout.readline()  # with LoRAs: the time that the next change will take
        for _ in range(i % 3):
            child.stdout.readline()
        time.sleep(chance.uniform(0, time.monotonic() - began) / (1 + i % 3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        state = tuple(lora.unet for lora in Manifest.read(model).loras)  # finishes what had been decided
        assert contents(model) == whole[state]
        seen.add(state)
    assert len(seen) > 1
    change_loras(model, [])
    assert contents(model) == whole[()]
    assert not (model / ".glassine").exists()


@pytest.mark.parametrize("step", range(12))
def test_stopped_between_any_two_renames_the_change_is_finished_by_the_next_reader(step, model, loras, monkeypatch):
    files = [LoraFile(keep_file(model, loras))]
    old = contents(model)
    renames = []
    original = Path.rename

    def rename(self, target):
        if len(renames) == step:
            raise KeyboardInterrupt
        renames.append(self.name)
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    stopped = False
    try:
        change_loras(model, files)
    except KeyboardInterrupt:
        stopped = True
    monkeypatch.undo()
    decided = "swap.partial" in renames
    loras_now = Manifest.read(model).loras
    assert bool(loras_now) == decided
    assert (contents(model) == old) == (not decided)
    if decided:
        finished = contents(model)
        change_loras(model, [])
        assert contents(model) == old
        change_loras(model, files)
        assert contents(model) == finished
    assert stopped == (step < 5)  # the commit, three weight files and the manifest


def test_a_big_weight_costs_a_few_megabytes(checkpoints, tmp_path):
    """The largest matrix of SD 1.5, 26 MB in its file, goes through in pieces."""
    name, shape = "down_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj", (10240, 1280)
    weight = (0.02 * RNG.standard_normal(shape)).astype(np.float16)
    base, place = tmp_path / "base.bin", Place(f"{name}.weight", shape, "float16", 1.0, 64)
    base.write_bytes(b"\0" * 64 + weight.tobytes() + b"end")
    down, up = drawn(32, 1280), drawn(10240, 32)
    key = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    path = checkpoints.write_safetensors(tmp_path / "l.safetensors", tensors, dtype="F32")
    patches = lora_patches(LoraFile(path), {"unet": Arrays({f"{name}.weight": weight})})
    tracemalloc.start()
    index = Index("Unet.mlpackage", "unet", base.stat().st_size, (place,))
    rewrite.write_changed(base, tmp_path / "new.bin", index, [patches["unet"]])
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert peak < 30  # measured 14 MB, of which the file's tensors are 3
    written = (tmp_path / "new.bin").read_bytes()
    assert (written[:64], written[-3:]) == (b"\0" * 64, b"end")
    expected = (weight.astype(np.float64) + up.astype(np.float64) @ down).astype(np.float16)
    found = np.frombuffer(written, np.float16, weight.size, 64).reshape(shape)
    # float32 sums, rounded: one in some thousand falls to the other side of a rounding
    assert (np.abs(found.astype(np.float32) - expected) <= np.spacing(np.abs(expected))).all()
    assert (found != expected).mean() < 2e-3


def test_chunks_and_networks_that_live_beside_the_unet_change_with_it(tmp_path):
    """Four packages of two weight files: after a change and after it is undone they share them still."""
    control = Control(TINY / "tiny_control_canny.safetensors")
    options = ConvertOptions(
        sizes=((128, 128),), tokenizer=TINY, chunks=2, further=(lambda base: control_networks([control], base),)
    )
    folder = tmp_path / "model"
    convert_checkpoint(TINY / "tiny.safetensors", folder, options)
    before = contents(folder)

    def files() -> list[tuple[str, ...]]:
        shared: dict[int, list[str]] = {}
        for path in sorted(folder.glob("*Unet*.mlpackage")):
            inode = (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_ino
            shared.setdefault(inode, []).append(path.stem)
        return [tuple(names) for names in shared.values()]

    together = [("ControlledUnetChunk1", "UnetChunk1"), ("ControlledUnetChunk2", "UnetChunk2")]
    assert files() == together
    change_loras(folder, [LoraFile(keep_file(folder, LCM))])
    assert files() == together
    assert sum(contents(folder)[name] != digest for name, digest in before.items()) == 5  # four, and glassine.json
    change_loras(folder, [])
    assert contents(folder) == before
