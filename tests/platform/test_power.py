"""The power of a Mac as macmon tells it, in the form of its documentation."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import pytest

from cluster.platform.power import MAX_WATTS, STALE_S, PowerMeter, PowerReading, no_power, parse_power

FACTS: dict[str, Any] = {
    "temp": {"cpu_temp_avg": 43.73614, "gpu_temp_avg": 36.95167},
    "memory": {"ram_total": 25769803776, "ram_usage": 20985479168, "swap_total": 4294967296, "swap_usage": 2602434560},
    "ecpu_usage": [1181, 0.082656614],
    "pcpu_usage": [1974, 0.015181795],
    "gpu_usage": [461, 0.021497859],
    "cpu_power": 0.20486385,
    "gpu_power": 0.017451683,
    "ane_power": 0.0,
    "all_power": 0.22231553,
    "sys_power": 5.876533,
    "ram_power": 0.11635789,
    "gpu_ram_power": 0.0009615385,
}


def line(**more: Any) -> bytes:
    return json.dumps(FACTS | more).encode() + b"\n"


def test_the_power_is_the_whole_macs_or_else_the_chips() -> None:
    assert parse_power(line()) == 5.876533
    assert parse_power(line(sys_power=0.0)) == 0.22231553
    assert parse_power(line(sys_power="much", all_power=12)) == 12.0


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"{",
        b"[]\n",
        b"\xff\n",
        b"{}",
        line(sys_power=None, all_power=-1),
        line(sys_power=float("nan"), all_power=float("inf")),
        line(sys_power=MAX_WATTS + 1, all_power=0),
    ],
)
def test_a_line_without_a_plausible_power_tells_nothing(odd: bytes) -> None:
    assert parse_power(odd) is None


def test_energy_is_power_over_time_also_since_the_last_line() -> None:
    now = 100.0
    meter = PowerMeter(("no-such-program",), lambda: now)
    assert meter.read() == no_power() == PowerReading(0.0, 0.0)
    meter.note(line(sys_power=40.0))
    now = 101.0
    meter.note(line(sys_power=20.0))
    meter.note(b"garbage")
    now = 101.5
    assert meter.read() == PowerReading(20.0, 50.0)
    now = 101.0 + STALE_S + 1
    assert meter.read() == PowerReading(0.0, 40.0)  # macmon hangs: nothing is known of this time
    meter.note(line(sys_power=10.0))
    now += 2.0
    assert meter.read() == PowerReading(10.0, 60.0)
    meter.close()


def test_a_program_that_writes_lines_is_read_until_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    program = f"import time\nwhile True: print({line().decode().strip()!r}, flush=True); time.sleep(0.01)"
    meter = PowerMeter((sys.executable, "-c", program))
    until_known(meter)
    assert meter.read().watts == 5.876533
    meter.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "power"]
    assert not caplog.records


def test_a_program_that_ends_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    meter = PowerMeter((sys.executable, "-c", f"print({line().decode().strip()!r})"))
    ended = threading.Event()
    while "macmon ended" not in caplog.text:
        ended.wait(0.01)
    assert meter.read().watts == 5.876533
    meter.close()


def until_known(meter: PowerMeter) -> None:
    """Wait until the first line was read."""
    known = threading.Event()
    while not meter.read().watts:
        known.wait(0.01)
