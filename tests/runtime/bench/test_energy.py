"""powermetrics: property lists as several versions write them, intervals within windows, and a stand-in for it."""

from __future__ import annotations

import os
import sys
import time

import pytest

from glassine.errors import EngineError
from glassine.runtime.bench import energy
from glassine.runtime.bench.energy import Interval, Meter, interval, mean_watts

HEAD = b"""<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
<key>is_delta</key><true/>
<key>elapsed_ns</key><integer>%d</integer>
<key>hw_model</key><string>Mac14,9</string>
<key>kern_osversion</key><string>24F74</string>
<key>timestamp</key><date>2026-11-22T14:00:00Z</date>
"""
PROCESSOR = b"""<key>processor</key>
<dict>
<key>clusters</key><array><dict><key>name</key><string>E-Cluster</string><key>freq_hz</key><real>1.2e+09</real></dict></array>
<key>ane_energy</key><integer>%d</integer>
<key>ane_power</key><real>1</real>
<key>cpu_energy</key><integer>%d</integer>
<key>cpu_power</key><real>2</real>
<key>gpu_energy</key><integer>%d</integer>
<key>gpu_power</key><real>3</real>
<key>combined_power</key><real>6</real>
</dict>
"""
TAIL = b"<key>gpu</key><dict><key>freq_hz</key><real>444</real></dict>\n</dict>\n</plist>\n"


def sample(nanoseconds: int, ane: int, cpu: int, gpu: int) -> bytes:
    return HEAD % nanoseconds + PROCESSOR % (ane, cpu, gpu) + TAIL


def test_energies_are_millijoules():
    found = interval(b"\0" + sample(200_000_000, 700, 150, 30), 5.0)
    assert found == Interval(5.0, 0.2, {"cpu": 0.15, "gpu": 0.03, "ane": 0.7})


def test_powers_stand_in_for_energies():
    text = (
        HEAD % 500_000_000 + b"<key>processor</key><dict><key>cpu_power</key><real>4000</real></dict>"
        b"<key>gpu</key><dict><key>gpu_power</key><real>600.5</real></dict></dict></plist>"
    )
    assert interval(text, 1.0) == Interval(1.0, 0.5, {"cpu": pytest.approx(2.0), "gpu": pytest.approx(0.30025)})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0\n",
        sample(200_000_000, 1, 1, 1)[:400],
        b"Machine model: Mac14,9\n",
        b"<plist version='1.0'><array/></plist>",
        HEAD % 200_000_000 + b"</dict></plist>",
        sample(0, 1, 1, 1),
        b"<plist version='1.0'><dict><key>elapsed_ns</key><string>x</string></dict></plist>",
    ],
)
def test_what_says_nothing_is_left_out(text):
    assert interval(text, 1.0) is None


def test_only_intervals_wholly_within_a_window_count():
    intervals = [Interval(float(end), 1.0, {"cpu": float(end), "ane": 2.0}) for end in range(1, 9)]
    # Windows of 2 to 4.5 and 6 to 8: the intervals that end at 3, 4, 7 and 8.
    watts, count = mean_watts(intervals, [(2.0, 4.5), (6.0, 8.0)])
    assert (watts, count) == ({"cpu": pytest.approx(5.5), "ane": pytest.approx(2.0)}, 4)
    assert mean_watts(intervals, [(2.5, 3.2)]) == ({}, 0)


def test_the_meter_reads_what_comes_in_pieces(tmp_path, monkeypatch):
    written = tmp_path / "samples"
    written.write_bytes(b"\0".join([sample(200_000_000, 700, 150, 30)] * 3) + b"\0" + sample(200_000_000, 1, 1, 1)[:99])
    program = tmp_path / "powermetrics.py"
    program.write_text(
        f"import os, time\ntext = open({str(written)!r}, 'rb').read()\n"
        "for at in range(0, len(text), 777):\n    os.write(1, text[at:at + 777])\n    time.sleep(0.001)\n"
    )
    monkeypatch.setattr(energy, "_command", lambda: [sys.executable, str(program)])
    with Meter(clock=lambda: 42.0) as meter:
        until = time.monotonic() + 60
        while len(meter.intervals) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert meter.intervals == [Interval(42.0, 0.2, {"cpu": 0.15, "gpu": 0.03, "ane": 0.7})] * 3


def test_it_says_what_to_do_where_it_may_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="there is none here"), Meter():
        pass
    for name, code in (("powermetrics", 0), ("sudo", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    with pytest.raises(EngineError, match="needs root: run 'sudo -v'"), Meter():
        pass
    (tmp_path / "sudo").write_text("#!/bin/sh\nexit 0\n")
    assert energy._command()[:3] == [str(tmp_path / "sudo"), "-n", "powermetrics"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert energy._command()[0] == "powermetrics"
