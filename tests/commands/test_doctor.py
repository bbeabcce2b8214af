"""`glassine doctor` on machines made up here, and on this one."""

import importlib.metadata
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from glassine.commands import doctor
from glassine.runtime import machine as machine_module
from glassine.runtime.engine import cache
from glassine.runtime.engine.trial import Trial
from glassine.runtime.machine import Machine, reclaimable, this_machine

MAC = Machine(
    system="darwin", version=(15, 5), name="macOS 15.5 (24F74)", chip="Apple M2 Pro", cores=10, arm=True,
    translated=False, memory=16 << 30, available=9 << 30,
)  # fmt: skip

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            200000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        104871.
Pages purgeable:                            400.
"Translation faults":                 123456789.
Pages copy-on-write:                   20941316.
Pages zero filled:                    307410812.
File-backed pages:                       157211.
Pages stored in compressor:              591038.
Swapouts:                                     0.
"""
INTEL_VM_STAT = VM_STAT.replace("16384", "4096")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def found(monkeypatch):
    """found(machine, coremltools=..., numpy=...) -> findings by name, with Core ML's bridge in place."""

    def examine(machine=MAC, bridge=True, **versions):
        version = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or version(name))
        if bridge:
            monkeypatch.setattr(doctor, "_core_ml", lambda _: doctor.Finding("Core ML engine", "ok", ""))
        return {finding.name: finding for finding in doctor.examine(machine)}

    return examine


def test_a_mac_in_order(found):
    findings = found(coremltools="9.0", numpy="2.3.5")
    assert findings["machine"] == doctor.Finding("machine", "ok", "Apple M2 Pro, 10 cores, macOS 15.5 (24F74)")
    assert findings["memory"] == doctor.Finding("memory", "ok", "9.7 of 17.2 GB available")
    known = [name for name in findings if "coremltools " in name or "diffusion" in name]
    assert known == ["coremltools 2716", "coremltools 2367, 2247, 2758"]


@pytest.mark.parametrize(
    ("machine", "versions", "name", "words"),
    [
        (replace(MAC, chip="Apple M1 Max"), {}, "ml-stable-diffusion 251", "ControlNets"),
        (replace(MAC, memory=8 << 30), {}, "ml-stable-diffusion 271", "SDXL swaps"),
        (MAC, {"coremltools": "9.0", "numpy": "2.4.6"}, "coremltools 2632", "NumPy 2.4"),
        (replace(MAC, available=1 << 30), {}, "memory", "1.1 of 17.2 GB"),
    ],
)
def test_what_is_known_not_to_work(found, machine, versions, name, words):
    finding = found(machine, **versions)[name]
    assert finding.status == "note"
    assert words in finding.text
    assert finding.advice


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ({"translated": True}, "Rosetta"),
        ({"version": (12, 7)}, "need macOS 13"),
        ({"arm": False, "chip": "Intel(R) Core(TM) i7"}, "--units cpu_and_gpu"),
    ],
)
def test_macs_on_which_core_ml_is_not_what_it_could_be(found, changed, advice):
    assert advice in found(replace(MAC, **changed))["machine"].advice


def test_elsewhere_nothing_is_said_about_macs(found):
    linux = replace(MAC, system="linux", version=(), name="Linux-6", arm=False)
    findings = found(linux, bridge=False, coremltools="9.0", numpy="2.3.5")
    assert findings["Core ML engine"].status == "note"
    assert not [name for name in findings if name.startswith(("coremltools ", "ml-stable"))]


def test_a_coremltools_without_its_bridge(found, tmp_path, monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    assert doctor._core_ml(MAC).status == "missing"
    (tmp_path / "libcoremlpython.so").touch()
    assert doctor._core_ml(MAC).status == "ok"


def test_the_health_of_the_cache(found, tmp_path):
    package = tmp_path / "model" / "Unet.mlpackage"
    package.mkdir(parents=True)
    crashed = Trial(stage="load", ending="crashed", reason="it was ended by SIGKILL", seconds=140.0)
    now = cache.os_build()
    for number, (source, build) in enumerate([(package, now), (package, "22A1"), (tmp_path / "gone", now)]):
        folder = tmp_path / "cache" / f"{number}-x"
        (folder / "m.mlmodelc").mkdir(parents=True)
        entry = cache.Entry(source=str(source), build=build, model="m.mlmodelc", size=0, trials={"cpu_and_ne": crashed})
        entry.write(folder)
    (tmp_path / "cache" / "3-x").mkdir()  # unfinished
    findings = found()
    assert "4 compiled models" in findings["cache"].text
    assert "3 of no use any more" in findings["cache"].text
    assert findings["cache"].advice == "glassine cache clear --stale"
    failed = {name: finding for name, finding in findings.items() if name.startswith("failed")}
    assert failed == {
        f"failed: {package}": doctor.Finding(
            f"failed: {package}", "note", "cpu_and_ne crashed", f"glassine cache warm {package.parent} --retry"
        )
    }


def test_a_cache_that_cannot_be_written_is_named(found, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        monkeypatch.setenv("GLASSINE_CACHE", str(place))
        finding = found()["cache"]
        assert (finding.status, finding.text) == ("note", f"{place}: cannot be written")
        assert "GLASSINE_CACHE" in finding.advice


def test_memory_as_vm_stat_says():
    assert reclaimable(VM_STAT) == 16384 * 33400
    assert reclaimable("") is None


@pytest.fixture
def mac(monkeypatch):
    """mac({command: what it prints}, architecture of Python) -> the machine."""

    def ask(answers, architecture="arm64"):
        names = {"sysctl.proc_translated": "", "hw.memsize": "17179869184", "kern.osproductversion": "15.5", **answers}
        commands = {("/usr/sbin/sysctl", "-n", name): said for name, said in names.items()}
        commands[("/usr/bin/vm_stat",)] = names.get("vm_stat", VM_STAT)
        commands[("/usr/bin/arch", "-arm64", "/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")] = "Apple M2 Pro"
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(machine_module, "_output", lambda *command: commands[command])
        monkeypatch.setattr(machine_module.platform, "machine", lambda: architecture)
        monkeypatch.setattr(machine_module.platform, "mac_ver", lambda: ("10.16", ("", "", ""), architecture))
        monkeypatch.setattr(cache, "os_build", lambda: "24F74")
        for known in (machine_module.chip, machine_module._release):
            monkeypatch.setattr(machine_module, known.__name__, known.__wrapped__)
        return this_machine()

    return ask


@pytest.mark.parametrize("chip", ["Apple M1", "Apple M2 Pro", "Apple M3 Max", "Apple M4", "Apple M1 (Virtual)"])
def test_what_a_mac_says_of_itself(mac, chip):
    said = mac({"machdep.cpu.brand_string": chip})
    expected = replace(MAC, chip=chip, cores=said.cores, available=16384 * 33400)
    assert said == expected


def test_a_python_for_intel_under_rosetta(mac):
    """Rosetta hides the chip from what runs under it."""
    said = mac({"sysctl.proc_translated": "1", "machdep.cpu.brand_string": "VirtualApple @ 2.50GHz"}, "x86_64")
    assert (said.chip, said.arm, said.translated) == ("Apple M2 Pro", True, True)


def test_an_intel_mac(mac):
    name = "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz"
    said = mac({"machdep.cpu.brand_string": name, "vm_stat": INTEL_VM_STAT, "hw.memsize": "34359738368"}, "x86_64")
    assert (said.chip, said.arm, said.translated) == (name, False, False)
    assert (said.memory, said.available) == (32 << 30, 4096 * 33400)


def test_a_mac_that_does_not_answer(mac):
    """A sandbox, or a system under such load that no process starts in time."""
    silent = dict.fromkeys(("machdep.cpu.brand_string", "hw.memsize", "kern.osproductversion", "vm_stat"), "")
    said = mac(silent)
    assert (said.chip, said.memory, said.available, said.version) == ("arm64", None, None, (10, 16))


@pytest.mark.parametrize("command", [("sleep", "60"), ("false",), ("/nowhere/sysctl",), ("printf", "\\377")])
def test_a_command_that_hangs_or_fails_is_no_error(monkeypatch, command):
    monkeypatch.setattr(machine_module, "_PATIENCE", 0.2)
    assert machine_module._output(*command) in ("", "\N{REPLACEMENT CHARACTER}")


def test_this_machine(glassine):
    machine = this_machine()
    assert machine.chip
    assert machine.memory is not None
    assert machine.available is not None
    assert 0 < machine.available <= machine.memory
    result = glassine("doctor", "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert machine.chip in said["machine"]["text"]
    assert said["numpy"]["text"] == importlib.metadata.version("numpy")
    assert (said["Core ML engine"]["status"] == "ok") == (sys.platform == "darwin")


@pytest.mark.coreml
@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
def test_a_mac_is_examined(glassine):
    result = glassine("doctor", "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 0, result.stdout
    assert said["machine"]["text"].startswith("Apple ")
    assert "macOS" in said["machine"]["text"]
    assert "GB available" in said["memory"]["text"]
    assert said["Core ML engine"]["status"] == "ok"
