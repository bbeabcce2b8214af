"""inspect: what a person and a program are told of models, files and pictures."""

import json
import math
import shutil
from pathlib import Path

from PIL import Image

from glassine.manifest import WEIGHT_FILE, Manifest
from glassine.runtime.engine.portable.program import read_package
from glassine.runtime.engine.portable.summary import summarise

TINY = Path(__file__).parents[2] / "models" / "tiny"


def test_placement_of_a_folder(glassine, tiny_folder):
    result = glassine("inspect", tiny_folder, "--placement", "--units", "cpu_and_ne", "--json")
    report = json.loads(result.stdout)
    assert set(report["parts"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    text = glassine("inspect", tiny_folder, "--placement", "--units", "cpu_and_ne").stdout
    assert "A prediction from rules, not from Core ML" in text
    for part in report["parts"].values():
        assert part["source"] == "prediction"
        left = [each for each in part["operations"] if each["unit"] != "neural_engine"]
        assert all(each["reason"] for each in left)
    # The text encoder looks its tokens up; its tokens are float32 at the door.
    gathers = [each for each in report["parts"]["text_encoder"]["operations"] if each["type"] == "gather"]
    assert {each["reason"] for each in gathers} == {"a gather (gather)"}
    assert "a gather (gather)" in text
    kinds = {each["type"] for each in report["parts"]["unet"]["operations"] if each["unit"] == "neural_engine"}
    assert {"conv", "softmax", "einsum"} & kinds


def test_placement_of_one_package(glassine, tiny_folder):
    result = glassine("inspect", tiny_folder / "Unet.mlpackage", "--placement", "--units", "cpu_and_gpu")
    assert "Unet (Unet.mlpackage), prediction: GPU" in result.stdout
    assert "Neural Engine" not in result.stdout


def test_a_checkpoint_has_no_placement(glassine, tiny_checkpoint):
    result = glassine("inspect", tiny_checkpoint, "--placement")
    assert result.exit_code == 2
    assert "convert the checkpoint first" in result.stderr


def test_memory_of_both_plans(glassine, tiny_folder):
    memory = json.loads(glassine("inspect", tiny_folder, "--json").stdout)["memory"]
    parts = Manifest.read(tiny_folder).parts
    drawn = ("text_encoder", "unet", "vae_decoder")
    stored = {role: (tiny_folder / parts[role].file / WEIGHT_FILE).stat().st_size for role in drawn}
    assert memory["coreml"] == {"all": sum(stored.values()), "low": max(stored.values())}
    numbers = {role: 4 * parts[role].parameters for role in drawn}
    assert memory["portable"] == {"all": sum(numbers.values()), "low": max(numbers.values())}
    text = glassine("inspect", tiny_folder).stdout
    assert f"weights {sum(stored.values()) / 1e6:.1f} MB, {max(stored.values()) / 1e6:.1f} MB with --low-memory" in text


def test_a_folder_of_downloads(glassine, tiny_checkpoint, tmp_path):
    folder = tmp_path / "downloads"
    (folder / "loras").mkdir(parents=True)
    shutil.copy(tiny_checkpoint, folder)
    shutil.copy(TINY / "tiny_lcm_lora.safetensors", folder / "loras")
    (folder / "page.safetensors").write_text("<html>")
    lines = glassine("inspect", folder).stdout.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "loras/tiny_lcm_lora.safetensors LoRA of an unknown family, rank 6",
        "page.safetensors not for Glassine: expected a safetensors file, this is a web page: the download gave a page "
        "instead of the file, probably one that asks to log in",
        "tiny.safetensors sd15, epsilon, 512 (unet, vae, text_encoder)",
        "3 files, 1 of them not for Glassine",
    ]
    files = json.loads(glassine("inspect", folder, "--json").stdout)["files"]
    assert {name: file.get("what") for name, file in files.items()} == {
        "loras/tiny_lcm_lora.safetensors": "LoRA",
        "page.safetensors": None,
        "tiny.safetensors": "checkpoint",
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    result = glassine("inspect", empty)
    assert result.exit_code == 1
    assert "no weights files in it" in result.stderr


def test_a_lora_alone(glassine):
    text = glassine("inspect", TINY / "tiny_lcm_lora.safetensors").stdout
    assert "tiny_lcm_lora.safetensors: LoRA of an unknown family, rank 6" in text
    assert "use: glassine lora MODEL add tiny_lcm_lora.safetensors" in text


def test_a_picture_says_how_it_was_drawn(glassine, tiny_folder, tmp_path):
    glassine("generate", tiny_folder, "a boat, (red:1.2)", "--steps", "2", "--seed", "7", "-o", "boat.png")
    text = glassine("inspect", "boat.png").stdout
    assert {"  prompt: a boat, (red:1.2)", "  steps: 2", "  seed: 7", "  size: 64x64"} <= set(text.splitlines())
    assert text.endswith("use: glassine generate MODEL --from boat.png\n")
    assert json.loads(glassine("inspect", "boat.png", "--json").stdout)["request"]["seed"] == 7
    Image.new("RGBA", (32, 32), "red").save(tmp_path / "red.png")
    project = {"prompt": "a red star", "steps": 2, "seed": 7, "layers": [{"image": "red.png", "change": 0.5}]}
    (tmp_path / "star.json").write_text(json.dumps(project))
    glassine("collage", "star.json", "--model", tiny_folder, "-o", "star.png")
    text = glassine("inspect", "star.png").stdout
    assert "red.png" in text
    assert text.endswith("use: glassine collage --model MODEL --from star.png\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    result = glassine("inspect", "plain.png")
    assert result.exit_code == 1
    assert "holds no settings" in result.stderr


def test_results_alive_at_once(tiny_folder):
    for package in sorted(tiny_folder.glob("*.mlpackage")):
        program = read_package(package)
        assert summarise(program).activations == most_alive(program.function().body)


def most_alive(block):
    """At every operation: its results, and those before it that are still to be read, one by one."""
    work = [op for op in block.operations if op.type != "const" and not op.type.startswith("constexpr_")]
    made = {variable.name: variable for variable in block.inputs}
    most = 0
    for index, op in enumerate(work):
        made.update({variable.name: variable for variable in op.outputs})
        later = {item for after in work[index:] for bound in after.inputs.values() for item in bound}
        alive = [v for name, v in made.items() if name in later or name in block.outputs or v in op.outputs]
        most = max(most, sum(math.prod(v.type.shape) * (2 if v.type.dtype == "float16" else 4) for v in alive))
    return most


def test_a_model_with_palettes_says_what_they_cost(glassine, tiny_checkpoint, tmp_path):
    small = tmp_path / "small"
    glassine("convert", tiny_checkpoint, small, "--part", "unet", "--size", "64x64", "--palette", "4/16")
    lost = Manifest.read(small).parts["unet"].about["palette"]
    text = glassine("inspect", small).stdout
    assert f"{lost['weights']['4/16']} weights as 4/16; signal to noise of the weights {lost['snr_db']:.1f} dB" in text
    assert f"the worst, {lost['worst']['name']}, at {lost['worst']['snr_db']:.1f} dB" in text
    assert "output: not measured yet (glassine verify)" in text
    glassine("verify", small, tiny_checkpoint)
    lost = Manifest.read(small).parts["unet"].about["palette"]
    assert f"output: {lost['output_psnr_db']:.1f} dB (PSNR) beside its source" in glassine("inspect", small).stdout
    assert json.loads(glassine("inspect", small, "--json").stdout)["parts"]["unet"]["palette"] == lost
