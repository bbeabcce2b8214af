"""The rules of the house that a machine can hold: what ships, what imports what, what loads when."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import glassine

ROOT = Path(glassine.__file__).resolve().parent
PACKAGE_FOLDERS = ("commands", "convert", "models", "runtime")
ROOT_MODULES = {"__init__", "__main__", "cli", "errors", "manifest"}


def sources() -> list[Path]:
    files = [ROOT / f"{name}.py" for name in ROOT_MODULES]
    return files + [path for folder in PACKAGE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def declared_packages() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)
    assert block is not None
    return set(re.findall(r'"([\w.]+)"', block.group(1)))


def test_the_packages_list_equals_the_folders():
    folders = {"glassine"} | {
        "glassine." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in PACKAGE_FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert declared_packages() == folders


def test_no_stray_module_at_the_root():
    # Every *.py beside __init__.py would ship as glassine.<name>.
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # building in place would leave a build folder in the working tree
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    allowed = {package.replace(".", "/") for package in declared_packages()}
    outside = [name for name in names if not name.startswith("glassine/")]
    assert outside == []
    modules = {name for name in names if name.endswith(".py")}
    assert {str(Path(name).parent) for name in modules} == allowed
    assert modules == {f"glassine/{path.relative_to(ROOT).as_posix()}" for path in sources()}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("models", ("glassine.convert", "glassine.runtime", "glassine.cli", "glassine.commands")),
        ("runtime", ("glassine.convert", "glassine.models", "glassine.cli", "glassine.commands")),
        ("convert", ("glassine.cli", "glassine.commands", "glassine.runtime")),
    ],
)
def test_imports_go_one_way(folder, forbidden):
    for path in sorted((ROOT / folder).rglob("*.py")):
        # The one exception: verify.py compares a package with its weights, so it needs an engine.
        allowed = ("glassine.runtime.engine",) if path == ROOT / "convert" / "verify.py" else ()
        wrong = {m for m in imported_modules(path) if m.startswith(forbidden) and not m.startswith(allowed or ("\0",))}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_torch_is_imported_where_it_is_needed_and_nowhere_else():
    folders = (ROOT / "runtime" / "engine" / "portable", ROOT / "models" / "tiny")
    files = {
        *(
            ROOT / "convert" / f"{judge}.py"
            for judge in ("verify", "reference", "control_reference", "reference_layers")
        ),
        ROOT / "convert" / "pickles.py",
        ROOT / "commands" / "doctor.py",
    }
    for path in sources():
        if path in files or any(path.is_relative_to(folder) for folder in folders):
            continue
        wrong = {m for m in imported_modules(path) if m.split(".")[0] in {"torch", "diffusers", "transformers"}}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("statement", ["import glassine", "import glassine.cli"])
def test_help_answers_at_once_because_nothing_heavy_is_imported(statement):
    assert not modules_after(statement) & {"torch", "coremltools", "numpy", "PIL", "rich", "tokenizers"}


def test_the_converter_imports_coremltools_when_it_is_needed():
    # The command line hides PyTorch from it first, which costs seconds and 200 MB otherwise.
    assert not modules_after("import glassine.convert.folder, glassine.convert.addition") & {"torch", "coremltools"}


def test_drawing_imports_neither_torch_nor_coremltools():
    assert not modules_after("import glassine.runtime.pipeline") & {"torch", "coremltools", "scipy", "diffusers"}


def test_the_newest_changelog_entry_is_this_version():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert next(v for v in versions if v != "Unreleased") == glassine.__version__
