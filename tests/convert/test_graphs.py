"""Programs kept from one conversion to the next: the same bytes, nothing of the old model, and never a wrong one."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from coremltools.proto import Model_pb2

from glassine.cli import main
from glassine.convert import graphs, packages
from glassine.convert.addition import add_networks
from glassine.convert.control import Control, control_networks
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.network import Form
from glassine.convert.program import Description, Plan, Weight, described
from glassine.errors import ConversionError

SIZES = ((64, 64), (96, 64))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of the programs, empty."""
    monkeypatch.setenv("GLASSINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def written(monkeypatch) -> list[object]:
    """The programs that are written from now on."""
    programs: list[object] = []

    def lower(program, *args):
        programs.append(program)
        return original(program, *args)

    original = packages.lower
    monkeypatch.setattr(packages, "lower", lower)
    return programs


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("how", [{"sizes": SIZES}, {"chunks": 2}, {"sizes": SIZES, "functions": True}])
def test_a_conversion_of_known_programs_has_the_same_bytes(how, tiny_checkpoint, tmp_path, written):
    options = ConvertOptions(**{"sizes": SIZES[:1], **how})
    convert_checkpoint(tiny_checkpoint, tmp_path / "first", options)
    count = len(written)
    assert count == 1 + 3 * len(options.sizes)  # the text encoder has no size
    convert_checkpoint(tiny_checkpoint, tmp_path / "second", options)
    assert len(written) == count
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


def test_networks_that_share_a_weight_file_are_known_too(
    tiny_checkpoint, checkpoints, controls, tmp_path, written, folder
):
    net = {f"control_model.{k}": shape for k, shape in controls.ldm_control(checkpoints, checkpoints.TINY).items()}
    file = checkpoints.write_safetensors(tmp_path / "net.safetensors", checkpoints.values(net), dtype="F16")
    counts, trees = [], []
    for name in ("first", "second"):
        convert_checkpoint(tiny_checkpoint, tmp_path / name, ConvertOptions(sizes=SIZES, name="same"))
        add_networks(tmp_path / name, [partial(control_networks, [Control(file)])], lambda _: None)
        counts.append(len(written))
        trees.append(tree(tmp_path / name))
    assert counts == [7 + 4, 7 + 4]
    assert trees[0] == trees[1]


def test_another_model_of_the_architecture_has_its_own_words_and_weights(
    checkpoints, tiny_checkpoint, tmp_path, written
):
    options = ConvertOptions(sizes=SIZES[:1])
    other = checkpoints.write_checkpoint(tmp_path / "other.safetensors", seed=7)
    convert_checkpoint(tiny_checkpoint, tmp_path / "a", options)
    count = len(written)
    convert_checkpoint(other, tmp_path / "known", options)
    assert len(written) == count
    graphs.clear()
    convert_checkpoint(other, tmp_path / "anew", options)
    assert len(written) == 2 * count
    assert tree(tmp_path / "known") == tree(tmp_path / "anew")


def test_what_is_missing_is_named_as_ever(checkpoints, tiny_checkpoint, tmp_path):
    convert_checkpoint(tiny_checkpoint, tmp_path / "a", ConvertOptions(sizes=SIZES[:1]))
    shapes = checkpoints.ldm_checkpoint(checkpoints.TINY)
    del shapes["model.diffusion_model.out.2.bias"]
    said, tensors = checkpoints.TINY.header(), checkpoints.values(shapes)
    short = checkpoints.write_safetensors(tmp_path / "short.safetensors", tensors, dtype="F16", metadata=said)
    messages = []
    for _ in ("known", "anew"):
        with pytest.raises(ConversionError, match=r"1 weights are missing: conv_out\.bias") as error:
            convert_checkpoint(short, tmp_path / "b", ConvertOptions(sizes=SIZES[:1]))
        messages.append(str(error.value))
        graphs.clear()
    assert messages[0] == messages[1]


def test_a_conversion_needs_no_coremltools(tiny_checkpoint, tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom glassine.convert.folder import ConvertOptions, convert_checkpoint\n"
        "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(sizes=((64, 64),)))\n"
        "print('coremltools' in sys.modules)"
    )
    for out, expected in (("a", "False"), ("b", "False")):
        command = [sys.executable, "-W", "ignore", "-c", program, str(tiny_checkpoint), str(tmp_path / out)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.split()[-1] == expected


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "a folder"])
def test_a_damaged_entry_is_written_anew(damage, tiny_checkpoint, tmp_path, written, folder):
    options = ConvertOptions(sizes=SIZES[:1], part="vae_decoder")
    convert_checkpoint(tiny_checkpoint, tmp_path / "a", options)
    (entry,) = folder.iterdir()
    content = entry.read_bytes()
    middle = len(content) // 2
    entry.unlink()
    if damage == "a folder":
        (entry / "x").mkdir(parents=True)
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        entry.write_bytes({"cut": content[:middle], "flipped": flipped, "empty": b""}[damage])
    convert_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    assert len(written) == 2
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert (damage == "a folder") or entry.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_done_without(tiny_checkpoint, tmp_path, folder, written):
    folder.parent.write_bytes(b"a file")
    for out in ("a", "b"):
        convert_checkpoint(tiny_checkpoint, tmp_path / out, ConvertOptions(sizes=SIZES[:1], part="vae_decoder"))
    assert len(written) == 2
    assert graphs.kept() == (0, 0)


def write_something(form: Form, *rest: object) -> None:
    """A network's function; only its name matters."""


def test_a_key_says_all_that_decides_a_program(monkeypatch):
    write = partial(write_something, Form())
    key = graphs.key_of(write, Plan(), (64, 64), 1)
    assert key == graphs.key_of(partial(write_something, Form()), Plan(), (64, 64), 1)
    plan = Plan()
    plan.place(Weight("w", (2,), 1.0, "float16"), (2,), "float16")
    others = [
        graphs.key_of(partial(write_something, Form(tokens=154)), Plan(), (64, 64), 1),
        graphs.key_of(partial(folder_of, Form()), Plan(), (64, 64), 1),
        graphs.key_of(write, plan, (64, 64), 1),
        graphs.key_of(write, Plan(), (64, 72), 1),
        graphs.key_of(write, Plan(), (64, 64), None),
    ]
    monkeypatch.setattr(graphs, "_code", lambda: "other code")
    others.append(graphs.key_of(write, Plan(), (64, 64), 1))
    assert len({key, *others}) == 7
    assert graphs.key_of(partial(write_something, object()), Plan()) is None
    assert graphs.key_of(partial(write_something, {"a": [lambda: 0]}), Plan()) is None


def folder_of(form: Form, *rest: object) -> None:
    """Another network's function."""


def test_those_used_last_are_kept(folder, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 3000)
    folder.mkdir(parents=True)
    for age, name in enumerate(("new", "middle", "old")):
        (folder / name).write_bytes(b"x" * 1400)
        graphs.os.utime(folder / name, (100 - age, 100 - age))
    graphs._forget(graphs._MOST)
    assert sorted(path.name for path in folder.iterdir()) == ["middle", "new"]
    assert graphs.kept() == (2, 2800)


def test_the_command_lists_and_clears_them(tiny_checkpoint, tmp_path, folder):
    convert_checkpoint(tiny_checkpoint, tmp_path / "a", ConvertOptions(sizes=SIZES[:1]))
    listed = CliRunner().invoke(main, ["cache", "list"], catch_exceptions=False).stdout
    assert f"{folder}: programs of 4 networks" in listed
    assert CliRunner().invoke(main, ["cache", "clear", "--stale"], catch_exceptions=False).exit_code == 0
    assert graphs.kept()[0] == 4
    cleared = CliRunner().invoke(main, ["cache", "clear"], catch_exceptions=False).stdout
    assert cleared.endswith("removed 0 compiled models, 0.00 GB, and programs of 4 networks\n")
    assert graphs.kept() == (0, 0)


@pytest.mark.parametrize(
    "words",
    [
        Description(),
        Description(author="A", licence="L", version="1", summary="S" * 300),
        Description(version="ü", user_defined={"b": "2", "a": "", "c": "x" * 200}),
    ],
)
def test_words_are_written_as_protobuf_writes_them(words):
    model = Model_pb2.Model(specificationVersion=7)
    model.description.input.add(name="x")
    model.mlProgram.version = 1
    bare = model.SerializeToString(deterministic=True)
    metadata = model.description.metadata
    for field, text in (("author", words.author), ("license", words.licence), ("shortDescription", words.summary)):
        if text:
            setattr(metadata, field, text)
    if words.version:
        metadata.versionString = words.version
    for key, text in words.user_defined.items():
        metadata.userDefined[key] = text
    assert described(bare, words) == model.SerializeToString(deterministic=True)
