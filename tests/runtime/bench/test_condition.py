"""What `pmset` and `system_profiler` print, as recorded and as documented."""

from __future__ import annotations

import pytest

from glassine.runtime.bench.condition import Condition, condition, doubts, gpu_cores, power_source, thermal

NOMINAL = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded"""
LIMITED = """2026-11-22 14:00:00 +0000 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= 70"""
BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=1234567)\t64%; discharging; 3:05 remaining present: true"""


def test_heat():
    assert thermal(NOMINAL) == "nominal"
    assert thermal(LIMITED) == "CPU_Speed_Limit = 70"
    assert thermal(LIMITED.replace("70", "100")) == "nominal"
    assert thermal("") is None


def test_power():
    assert power_source(BATTERY) == "Battery Power"
    assert power_source("Now drawing from 'AC Power'") == "AC Power"
    assert power_source("") is None


def test_gpu_cores():
    assert gpu_cores('{"SPDisplaysDataType": [{"_name": "Apple M2 Pro", "sppci_cores": "19"}]}') == 19
    for text in ("", "{}", "[]", '{"SPDisplaysDataType": [{"sppci_cores": "many"}]}', '{"SPDisplaysDataType": []}'):
        assert gpu_cores(text) is None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (Condition([0.1], "AC Power", "nominal"), Condition([2.0], "AC Power", "nominal"), []),
        (Condition([3.0], None, None), Condition([0.0], None, None), ["load average 3.00 on 8 cores"]),
        (Condition([0.0], "Battery Power", "nominal"), Condition([0.0], "Battery Power", "nominal"), ["battery"]),
        (Condition([0.0], None, "nominal"), Condition([0.0], None, "CPU_Speed_Limit = 70"), ["CPU_Speed_Limit = 70"]),
    ],
)
def test_doubts(before, after, said):
    found = doubts(before, after, 8)
    assert len(found) == len(said)
    assert all(word in words for word, words in zip(said, found, strict=True))


def test_the_condition_now_is_of_this_machine():
    now = condition()
    assert len(now.load) == 3
    assert all(load >= 0 for load in now.load)
