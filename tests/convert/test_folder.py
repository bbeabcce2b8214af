"""Checkpoint -> folder, end to end, and with little but NumPy in reach."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest

from glassine.convert import folder as folder_module
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.weights import FileWeights
from glassine.errors import CheckpointError, ConversionError, GlassineError, PackageError
from glassine.manifest import Manifest

SMALL = ConvertOptions(sizes=((64, 64),), attention="einsum")
PACKAGES = ["TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage", "VAEEncoder.mlpackage"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def blob(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


def constants(package: Path) -> dict[str, np.ndarray]:
    """Every fp16 constant of a package's weight.bin that an operation of the reloaded program holds."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(package))
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(blob(package).parent))
    operations = program.functions["main"].operations
    return {op.name: op.outputs[0].val for op in operations if op.op_type == "const"}


def test_the_folder_is_what_apples_pipeline_looks_for(tiny_folder, tiny_checkpoint):
    own = ["TextEncoder.weights.json", "Unet.weights.json", "glassine.json", "merges.txt", "vocab.json"]
    assert names(tiny_folder) == sorted([*PACKAGES, *own])
    manifest = Manifest.read(tiny_folder)
    assert (manifest.family, manifest.width, manifest.height, manifest.batch) == ("sd15", 64, 64, 2)
    assert {role: part.file for role, part in manifest.parts.items()} == {
        "text_encoder": "TextEncoder.mlpackage",
        "unet": "Unet.mlpackage",
        "vae_decoder": "VAEDecoder.mlpackage",
        "vae_encoder": "VAEEncoder.mlpackage",
    }
    digest = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    for role, part in manifest.parts.items():
        spec = ct.models.MLModel(str(tiny_folder / part.file), skip_model_load=True).get_spec()
        described = {
            feature.name: tuple(feature.type.multiArrayType.shape)
            for feature in (*spec.description.input, *spec.description.output)
        }
        assert described == {name: shape for name, (shape, _) in (*part.inputs.items(), *part.outputs.items())}
        assert all(feature.shortDescription for feature in (*spec.description.input, *spec.description.output))
        assert part.source_sha256 == digest
        assert spec.description.metadata.userDefined["glassine.role"] == role
        assert spec.description.metadata.versionString == "tiny"


def test_every_weight_of_the_source_is_in_a_package_bit_for_bit(tiny_folder, tiny_checkpoint, checkpoints):
    """The records of the four files, as multisets of bytes, are the source's tensors (scaled ones apart)."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    source = tiny_checkpoint.read_bytes()
    stored = b"".join(blob(tiny_folder / package).read_bytes() for package in PACKAGES)
    absent = [
        key
        for key, tensor in checkpoint.tensors.items()
        if tensor.dtype == "F16" and source[tensor.offset : tensor.offset + tensor.nbytes] not in stored
    ]
    # The factor 1/sqrt(head width) is folded into the queries.
    assert all("to_q" in key or "q_proj" in key or ".mid.attn_1.q." in key for key in absent)


def test_weights_are_where_the_graph_expects_them(tiny_folder, tiny_checkpoint):
    """By name: the convolution called down_blocks_1_resnets_0_conv1 holds that tensor, and so on."""
    detected = detect(open_checkpoint(tiny_checkpoint))
    checked = 0
    for package, part in zip(PACKAGES, ("text_encoder", "unet", "vae", "vae"), strict=True):
        weights = detected.parts[part]
        held = constants(tiny_folder / package)
        for name, shape in weights.shapes.items():
            constant = name.replace(".", "_")
            if constant in held and not any(q in name for q in ("to_q", "q_proj")):
                expected = weights.read(name, 0, int(np.prod(shape)))
                np.testing.assert_array_equal(held[constant].reshape(-1), expected, err_msg=name)
                checked += 1
    assert checked > 400


def test_a_diffusers_folder_converts_to_the_same_networks(tiny_folder, tiny_diffusers, tmp_path):
    convert_checkpoint(tiny_diffusers, tmp_path / "out", dataclasses.replace(SMALL, name="tiny"))
    ours, theirs = tree(tiny_folder), tree(tmp_path / "out")
    assert {name: data for name, data in ours.items() if name != "glassine.json"} == {
        name: data for name, data in theirs.items() if name != "glassine.json"
    }


@pytest.mark.parametrize("bare", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_bare_files_in_either_naming(checkpoints, tiny_folder, tmp_path, bare, naming):
    values = checkpoints.values(checkpoints.ldm_checkpoint(checkpoints.TINY))
    prefix = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    }[bare]
    own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    if naming == "diffusers" and bare != "text_encoder":
        renamed = checkpoints.diffusers_names(bare, checkpoints.TINY)
        own = {renamed[key]: value for key, value in own.items()}
    elif naming == "diffusers":
        own = {key.removeprefix("text_model."): value for key, value in own.items()}
    path = checkpoints.write_safetensors(tmp_path / "p.safetensors", own, metadata=checkpoints.TINY.header())
    manifest = convert_checkpoint(path, tmp_path / "out", dataclasses.replace(SMALL, part=bare, name="tiny"))
    for part in manifest.parts.values():
        assert tree(tmp_path / "out" / part.file) == tree(tiny_folder / part.file)
    expected = {"unet": ["unet"], "vae": ["vae_decoder", "vae_encoder"], "text_encoder": ["text_encoder"]}[bare]
    assert sorted(manifest.parts) == expected
    assert ("vocab.json" in names(tmp_path / "out")) == (bare == "text_encoder")
    with pytest.raises(CheckpointError, match=r"there is no .* in here, only .*--part"):
        convert_checkpoint(path, tmp_path / "all", SMALL)


@pytest.mark.parametrize("role", ["vae_decoder", "vae_encoder"])
def test_one_part_of_a_whole_checkpoint(tiny_checkpoint, tiny_folder, tmp_path, role):
    manifest = convert_checkpoint(tiny_checkpoint, tmp_path / "out", dataclasses.replace(SMALL, part=role))
    assert list(manifest.parts) == [role]
    file = manifest.parts[role].file
    assert tree(tmp_path / "out" / file) == tree(tiny_folder / file)


def test_further_sizes_share_their_weights(tiny_checkpoint, tmp_path):
    options = dataclasses.replace(SMALL, sizes=((64, 64), (128, 64)), part="unet")
    manifest = convert_checkpoint(tiny_checkpoint, tmp_path / "out", options)
    first, second = tmp_path / "out" / "Unet.mlpackage", tmp_path / "out" / "Unet_128x64.mlpackage"
    assert manifest.parts["unet"].inputs["sample"] == ((2, 4, 8, 8), "float16")
    assert manifest.parts["unet_128x64"].inputs["sample"] == ((2, 4, 8, 16), "float16")
    assert (manifest.width, manifest.height) == (64, 64)
    assert blob(first).samefile(blob(second))
    assert len(ct.utils.load_spec(str(second)).mlProgram.functions) == 1


def test_where_the_disk_has_no_hard_links_the_file_is_written_again(tiny_checkpoint, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    options = dataclasses.replace(SMALL, sizes=((64, 64), (128, 64)), part="vae_decoder")
    convert_checkpoint(tiny_checkpoint, tmp_path / "out", options)
    first, second = tmp_path / "out" / "VAEDecoder.mlpackage", tmp_path / "out" / "VAEDecoder_128x64.mlpackage"
    assert not blob(first).samefile(blob(second))
    assert blob(first).read_bytes() == blob(second).read_bytes()


def test_options_reach_the_graph(tiny_checkpoint, tmp_path):
    options = ConvertOptions(
        sizes=((128, 64),), batch=1, tokens=154, attention="sdpa", layout="channels_last", name="Mine", part="unet"
    )
    manifest = convert_checkpoint(tiny_checkpoint, tmp_path / "out", options)
    part = manifest.parts["unet"]
    assert part.inputs["encoder_hidden_states"][0] == (1, 64, 1, 154)
    assert (part.attention, part.layout, manifest.name, manifest.tokens) == ("sdpa", "channels_last", "Mine", 154)
    spec = ct.utils.load_spec(str(tmp_path / "out" / part.file))
    assert spec.specificationVersion == ct.target.iOS18


def test_a_dry_run_checks_everything_and_writes_nothing(tiny_checkpoint, tmp_path):
    manifest = convert_checkpoint(tiny_checkpoint, tmp_path / "out", dataclasses.replace(SMALL, dry_run=True))
    assert sorted(manifest.parts) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_graphs_then_bytes(tiny_checkpoint, tmp_path):
    seen = []
    convert_checkpoint(tiny_checkpoint, tmp_path / "out", SMALL, seen.append)
    stages = [progress.stage for progress in seen]
    assert stages == sorted(stages)
    graphs = [(progress.done, progress.total) for progress in seen if progress.stage == "graphs"]
    assert graphs == [(i, 4) for i in range(5)]
    for package in PACKAGES:
        own = [p for p in seen if p.stage == "weights" and f"{p.package}.mlpackage" == package]
        written = sum(record.stat().st_size for record in [blob(tmp_path / "out" / package)])
        assert own[-1].done <= own[-1].total == written
        assert own[-1].done > 0.9 * written  # headers and padding are not counted


# What goes wrong.


def broken(checkpoints, tmp_path, change):
    sizes = checkpoints.Sizes(unet=(32, 64), attention=(True, False))
    tensors = checkpoints.values(checkpoints.ldm_checkpoint(sizes))
    change(tensors)
    return checkpoints.write_safetensors(tmp_path / "m.safetensors", tensors, metadata=sizes.header())


UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UNET}out.2.bias"), "1 weights are missing: conv_out.bias (4,)"),
        (
            lambda t: t.update({f"{UNET}out.2.bias": np.ones(5)}),
            "1 weights have another shape: conv_out.bias is (5,), expected (4,)",
        ),
        (
            lambda t: t.update({f"{UNET}input_blocks.1.0.extra.weight": np.ones(5)}),
            f"1 keys of the unet are of no use to it: {UNET}input_blocks.1.0.extra.weight",
        ),
        (
            lambda t: t.update({"first_stage_model.decoder.extra": np.ones(5)}),
            "1 keys of the vae_decoder are of no use to it: first_stage_model.decoder.extra",
        ),
        (lambda t: t.update(extra=np.ones(5)), "1 keys belong to no known network: extra"),
        (
            lambda t: t[f"{UNET}out.2.weight"].__setitem__((3, 1, 2, 2), np.nan),
            f'tensor "{UNET}out.2.weight": the value at (3, 1, 2, 2) is nan; the file is damaged',
        ),
        (
            lambda t: t[f"{UNET}out.2.weight"].__setitem__((3, 1, 2, 2), np.inf),
            f'tensor "{UNET}out.2.weight": the value at (3, 1, 2, 2) is inf',
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(checkpoints, tmp_path, change, message):
    source = broken(checkpoints, tmp_path, change)
    part = "vae_decoder" if "vae" in message else "unet"
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(source, tmp_path / "out", dataclasses.replace(SMALL, part=part))
    assert message in str(caught.value)
    assert names(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ((100, 64),)}, "size 100x64: width and height are multiples of 8"),
        ({"sizes": ((64, 0),)}, "size 64x0"),
        ({"sizes": ((64, 64), (64, 64))}, "the same size is asked for twice"),
        ({"batch": 0}, "batch 0"),
        ({"tokens": 0}, "tokens 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConversionError, match=message):
        ConvertOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100}, "tokens 100: expected a multiple of the text encoder's 77"),
        ({"sizes": ((2048, 1024),), "attention": "split"}, "ends at 16384: use --attention einsum or sdpa"),
    ],
)
def test_options_that_the_model_cannot_have(tiny_checkpoint, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tiny_checkpoint, tmp_path / "out", dataclasses.replace(SMALL, **options))


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_it_is_ours(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    text = dataclasses.replace(SMALL, part="text_encoder")
    over = dataclasses.replace(text, overwrite=True)
    out.mkdir()
    convert_checkpoint(tiny_checkpoint, out, text)  # an empty folder is no obstacle
    with pytest.raises(PackageError, match=r"exists; choose another folder or pass --overwrite"):
        convert_checkpoint(tiny_checkpoint, out, text)
    convert_checkpoint(tiny_checkpoint, out, dataclasses.replace(over, name="again"))
    assert Manifest.read(out).name == "again"
    (out / "Control.mlpackage").mkdir()
    (out / "picture.png").write_text("mine")
    with pytest.raises(PackageError, match=r"also holds Control\.mlpackage, picture\.png, which would be lost"):
        convert_checkpoint(tiny_checkpoint, out, over)
    (out / "glassine.json").unlink()
    with pytest.raises(PackageError, match="Glassine did not make it and does not replace it"):
        convert_checkpoint(tiny_checkpoint, out, over)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PackageError, match="does not replace it"):
        convert_checkpoint(tiny_checkpoint, tmp_path / "file", over)
    assert (tmp_path / "file").read_text() == (out / "picture.png").read_text() == "mine"


def test_everything_that_a_folder_lists_is_replaced_with_it(tiny_checkpoint, tmp_path):
    pieces = dataclasses.replace(SMALL, part="unet", chunks=2, overwrite=True)
    for options in (pieces, dataclasses.replace(SMALL, part="vae_encoder", overwrite=True)):
        convert_checkpoint(tiny_checkpoint, tmp_path / "out", options)
    assert names(tmp_path / "out") == ["VAEEncoder.mlpackage", "glassine.json"]


def test_a_link_stays_a_link(tiny_checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    convert_checkpoint(tiny_checkpoint, tmp_path / "out", dataclasses.replace(SMALL, part="vae_encoder"))
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "elsewhere") == ["VAEEncoder.mlpackage", "glassine.json"]


@pytest.mark.parametrize(
    "stage", ["open_checkpoint", "detect", "tokenizer_files", "plan_packages", "check_space", "write_packages", "parts"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_at_any_stage_leaves_what_was_there(
    tiny_checkpoint, tiny_folder, tmp_path, monkeypatch, stage, overwrite
):
    out = tmp_path / "out"
    options = dataclasses.replace(SMALL, part="text_encoder", overwrite=overwrite)
    if overwrite:
        convert_checkpoint(tiny_checkpoint, out, dataclasses.replace(options, name="before"))
    before = tree(tmp_path)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tiny_checkpoint, out, options)
    assert tree(tmp_path) == before
    assert names(tmp_path) == (["out"] if overwrite else [])


BARE = """
import builtins, resource, socket, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Refuse(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        refused = {"coremltools", "torch", "diffusers", "transformers", "sklearn", "scipy", "safetensors"}
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())

def blocked(*args, **kwargs):
    raise AssertionError("the network was used")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = blocked
from glassine.convert.folder import ConvertOptions, convert_checkpoint
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BARE + code], check=False, capture_output=True, text=True)


def test_no_torch_no_coremltools_no_network(tiny_checkpoint, tiny_folder, tmp_path):
    done = run(
        f"""
options = ConvertOptions(sizes=((64, 64),), attention="einsum")
convert_checkpoint(Path({str(tiny_checkpoint)!r}), Path({str(tmp_path / "out")!r}), options)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert tree(tmp_path / "out") == tree(tiny_folder)


def test_memory_does_not_grow_with_the_weights(checkpoints, tmp_path):
    """A text encoder with a table of 205 MB in float32, whose one tensor is larger than the memory allowed."""
    sizes = checkpoints.Sizes(context=1024, text_layers=1, vocabulary=50_000)
    values = checkpoints.values({k: s for k, s in checkpoints.clip_text(sizes).items() if "token_embedding" not in k})
    values["text_model.embeddings.token_embedding.weight"] = np.ones((50_000, 1024), np.float32)
    path = checkpoints.write_safetensors(tmp_path / "m.safetensors", values, dtype="F32")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    done = run(
        f"""
convert_checkpoint(Path({str(path)!r}), Path({str(tmp_path / "out")!r}), ConvertOptions(part="text_encoder"))
if sys.platform == "darwin":
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:  # there getrusage counts the parent's memory up to exec too
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(int(line.split()[1]) * 1024)
"""
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200e6  # measured 129e6
    path.unlink()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_conversion_leaves_nothing_that_looks_done(tiny_checkpoint, tmp_path, how):
    out = tmp_path / "out"
    code = f"""
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to it
def slow(progress):
    if progress.stage == "weights":
        print("writing", flush=True)
        time.sleep(60)
convert_checkpoint(Path({str(tiny_checkpoint)!r}), Path({str(out)!r}), ConvertOptions(part="text_encoder"), slow)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", BARE + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "writing\n"
    time.sleep(0.2)
    child.send_signal(how)
    child.communicate(timeout=60)
    assert not out.exists()
    assert names(tmp_path) == ([] if how == signal.SIGINT else [".out.partial"])
    convert_checkpoint(tiny_checkpoint, out, dataclasses.replace(SMALL, part="text_encoder"))
    assert names(tmp_path) == ["out"]


def test_every_refusal_is_a_glassine_error(tmp_path):
    for content in (b"", b"\x00" * 100, b"{}"):
        (tmp_path / "m.safetensors").write_bytes(content)
        with pytest.raises(GlassineError):
            convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out")


def test_the_manifest_is_plain_json(tiny_folder):
    raw = json.loads((tiny_folder / "glassine.json").read_text())
    assert raw["parts"]["unet"]["inputs"]["sample"] == [[2, 4, 8, 8], "float16"]
    assert Manifest.read(tiny_folder).parts["unet"].inputs["sample"] == ((2, 4, 8, 8), "float16")


def test_file_weights_answer_by_canonical_name(tiny_checkpoint):
    weights = detect(open_checkpoint(tiny_checkpoint)).parts["unet"]
    assert isinstance(weights, FileWeights)
    assert weights.key("conv_out.bias") == f"{UNET}out.2.bias"
    assert weights.origin("conv_out.bias") == f'{tiny_checkpoint}: tensor "{UNET}out.2.bias"'
