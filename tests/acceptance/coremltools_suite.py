"""Runs coremltools' own tests through the portable engine, the suite believing it is on macOS.

    python tests/acceptance/coremltools_suite.py                          # the operations, every file
    python tests/acceptance/coremltools_suite.py iOS14/test_conv.py -k conv_transpose
    python tests/acceptance/coremltools_suite.py --torch -k "TestConv or TestLayerNorm"
    python tests/acceptance/coremltools_suite.py --processes 4 --every 10 --device cuda --json result.json

A test is "not covered" if it failed because its program holds an operation, or an input or output of a type, that the
engine says it does not have; everything else that fails is a failure, and makes the exit code 1. Tests whose program
was really run are counted apart from those that only convert, and from those that fail before there is a program (a
library that is not installed, a newer PyTorch).

The suite compares float16 programs very loosely (atol 0.5), so its float32 variants (atol 1e-4, rtol 1e-5), which it
leaves out by default, run too. Only those on float16 data are left out here as well: they compare what was computed of
rounded weights with what was computed of unrounded ones, which cannot agree to 1e-4 on any engine.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

_NOT_COVERED = (
    re.compile(r"does not have these operations: (?P<what>.*?);"),
    re.compile(r"(?P<what>(?:input|output) \S+ is of type \w+; the portable engine takes arrays)"),
    re.compile(r"(?P<what>expected an ML Program.*?, got \w[\w ]*)"),
)


def _means_float16_alone(test: str) -> bool:
    # TestResample counts the casts of a float16 program.
    return "precision='fp32'" in test and re.search(r"fp16|float16|TestResample", test) is not None


class Collector:
    """A pytest plugin that sorts outcomes."""

    def __init__(self, shard: tuple[int, int], every: int) -> None:
        self.shard = shard
        self.every = every
        self.outcomes: Counter[str] = Counter()
        self.uncovered: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.broken: list[str] = []
        self.by_file: dict[str, Counter[str]] = {}
        self.predictions = 0
        self._before = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        number, count = self.shard
        chosen = items[:: self.every][number - 1 :: count]
        items[:] = [item for item in chosen if not _means_float16_alone(item.nodeid)]
        self.outcomes["left out: float32 variants of tests on float16"] = len(chosen) - len(items)

    def pytest_collection_finish(self) -> None:
        # ct.convert collects garbage every time; what is loaded by now need not be looked through again.
        gc.freeze()

    def pytest_runtest_setup(self, item: Any) -> None:
        self._before = self.predictions

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "expected to fail there too"
        elif outcome == "failed":
            outcome = self._failed(report)
        elif outcome == "passed":
            outcome = "passed, run" if self.predictions > self._before else "passed, converted only"
        self.outcomes[outcome] += 1
        self.by_file.setdefault(report.nodeid.split("::")[0], Counter())[outcome] += 1

    def _failed(self, report: Any) -> str:
        text = str(report.longrepr)
        # Lines of the source that raised stand in the text too; those of the error begin with E.
        lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-3:]
        for pattern in _NOT_COVERED:
            match = pattern.search("\n".join(lines))
            if match:
                # Operations are listed as "a x1, b x2".
                whole = match.group("what")
                kinds = {name for name, _ in re.findall(r"(\w+) x(\d+)", whole)}
                self.uncovered.update(kinds if kinds else {whole})
                return "not covered"
        if self.predictions == self._before and not any("glassine" in line for line in lines):
            self.broken.append(report.nodeid)
            return "failed before anything was run"
        self.failures.append({"test": report.nodeid, "error": "\n".join(lines[:12])})
        return "failed"

    def result(self) -> dict[str, Any]:
        return {
            "outcomes": dict(sorted(self.outcomes.items())),
            "not_covered": dict(self.uncovered.most_common()),
            "failures": self.failures,
            "failed_before_anything_was_run": self.broken,
            "files": {name: dict(sorted(counts.items())) for name, counts in sorted(self.by_file.items())},
        }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen tests in this process and return the sorted outcomes."""
    os.environ["PYMIL_TEST_TARGETS"] = "mlprogram"
    os.environ["INCLUDE_MIL_FP32_UNIT_TESTS"] = "1"
    os.environ["RUN_BACKWARD_COMPATIBILITY"] = "1" if arguments.all_opsets else "0"
    from glassine.runtime.engine.portable import proxy

    proxy.install(precision=arguments.precision, device=arguments.device)
    import pytest

    collector = Collector(arguments.shard, arguments.every)
    predict = proxy._MLModelProxy.predict

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        collector.predictions += 1
        return predict(self, *args, **kwargs)

    proxy._MLModelProxy.predict = counted  # type: ignore[method-assign]
    options = ["-q", "--no-header", "--no-summary", "--import-mode=importlib", "-W", "ignore", "-p", "no:cacheprovider"]
    options += ["-c", os.devnull, "--rootdir", str(_root())]
    options += ["-k", arguments.keyword] if arguments.keyword else []
    pytest.main([*options, *_files(arguments)], plugins=[collector])
    return collector.result()


def run_in_processes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the shards of the chosen tests in as many processes and return the sum of their outcomes."""
    others = [argument for argument in sys.argv[1:] if not argument.startswith("--json=")]
    with tempfile.TemporaryDirectory() as folder:
        shards = [
            (Path(folder) / f"{number}.json", f"{number}/{arguments.processes}")
            for number in range(1, arguments.processes + 1)
        ]
        running = [
            subprocess.Popen([sys.executable, __file__, *others, "--processes=1", f"--shard={shard}", f"--json={path}"])
            for path, shard in shards
        ]
        for process in running:
            process.wait()
        return _merge([json.loads(path.read_text(encoding="utf-8")) for path, _ in shards if path.is_file()])


def _merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    uncovered: Counter[str] = Counter()
    files: dict[str, Counter[str]] = {}
    for result in results:
        outcomes.update(result["outcomes"])
        uncovered.update(result["not_covered"])
        for name, counts in result["files"].items():
            files.setdefault(name, Counter()).update(counts)
    return {
        "outcomes": dict(sorted(outcomes.items())),
        "not_covered": dict(uncovered.most_common()),
        "failures": [failure for result in results for failure in result["failures"]],
        "failed_before_anything_was_run": [
            test for result in results for test in result["failed_before_anything_was_run"]
        ],
        "files": {name: dict(sorted(counts.items())) for name, counts in sorted(files.items())},
    }


def _root() -> Path:
    spec = importlib.util.find_spec("coremltools")
    if spec is None or spec.origin is None:
        raise SystemExit("coremltools is not installed")
    return Path(spec.origin).parent / "converters" / "mil"


def _files(arguments: argparse.Namespace) -> list[str]:
    operations = _root() / "mil" / "ops" / "tests"
    if arguments.torch:
        return [str(_root() / "frontend" / "torch" / "test" / "test_torch_ops.py")]
    if arguments.files:
        return [str(operations / name) for name in arguments.files]
    return [str(path) for path in sorted(operations.glob("iOS*/test_*.py"))]


def _shard(text: str) -> tuple[int, int]:
    number, count = (int(part) for part in text.split("/"))
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text}: expected 1/N to N/N")
    return number, count


def main() -> int:
    """Print the table; 1 if a covered test failed or none ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="test files of converters/mil/mil/ops/tests, as iOS14/test_conv.py")
    parser.add_argument("-k", dest="keyword", help="pytest's -k")
    parser.add_argument("--torch", action="store_true", help="test_torch_ops.py instead (thousands of tests: use -k)")
    parser.add_argument("--all-opsets", action="store_true", help="every test at every newer opset too")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the engine")
    parser.add_argument("--device", default="cpu", help="of the engine")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth test only")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    result = run_in_processes(arguments) if arguments.processes > 1 else run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print()
    for failure in result["failures"]:
        print(f"FAILED {failure['test']}\n{failure['error']}\n")
    for what, count in result["not_covered"].items():
        print(f"not covered: {what}: {count} tests")
    for outcome, count in result["outcomes"].items():
        print(f"{count:6d} {outcome}")
    return 1 if result["failures"] or not result["outcomes"].get("passed, run") else 0


if __name__ == "__main__":
    sys.exit(main())
