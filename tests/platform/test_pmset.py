"""Parsing of what ``pmset`` writes. Written from documentation: its manual page."""

from __future__ import annotations

import pytest

from cluster.platform import pmset


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ("Note: No thermal warning level has been recorded\nNote: No CPU power status has been recorded\n", 100),
        ("CPU_Scheduler_Limit \t= 100\n\tCPU_Available_CPUs \t= 8\n\tCPU_Speed_Limit \t= 62\n", 62),
        ("", 100),
        ("CPU_Speed_Limit = none", 100),
    ],
)
def test_heat(said: str, limit: int) -> None:
    assert pmset.parse_thermal_limit(said) == limit


def test_elsewhere_heat_limits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert pmset.thermal_limit() == 100


def test_settings_and_source() -> None:
    assert pmset.parse_power_settings(" sleep                1 (sleep prevented by powerd)\n powermode 2\n") == {
        "sleep": 1,
        "powermode": 2,
    }
    assert pmset.parse_power_settings("displaysleep 10\n") == {}
    assert pmset.parse_power_source("Now drawing from 'AC Power'\n") == "AC Power"
    assert pmset.parse_power_source("No battery\n") == ""
