"""Checks of power: sleep, the battery, and low power mode."""

from __future__ import annotations

import re
from typing import Final

from cluster.core.examination import Finding, Severity
from cluster.doctor.readings import Readings

_SETTING: Final = re.compile(r"^\s*(SleepDisabled|sleep|powermode|lowpowermode)\s+(\d{1,6})\b", re.MULTILINE)
_SOURCE: Final = re.compile(r"Now drawing from '([^'\n]{1,40})'")


def parse_power_settings(report: str) -> dict[str, int]:
    """Parse ``pmset -g``: the settings that matter here, by name. ``sleep`` is in minutes; 0 means never."""
    return {name: int(value) for name, value in _SETTING.findall(report)}


def check_sleep(readings: Readings) -> list[Finding] | None:
    """Find a Mac that falls asleep when nobody uses it."""
    settings = parse_power_settings(readings.outputs.sleep)
    if "sleep" not in settings:
        return None
    if settings["sleep"] == 0 or settings.get("SleepDisabled"):
        return []
    minutes = settings["sleep"]
    what = f"the Mac sleeps after {minutes} idle {'minute' if minutes == 1 else 'minutes'}"
    why = "A sleeping Mac answers nothing: the cluster counts it as lost and moves its layers."
    return [Finding(Severity.WARNING, what, why, "sudo pmset -c sleep 0, or run `caffeinate -i macpipe worker`")]


def check_power(readings: Readings) -> list[Finding] | None:
    """Find a Mac on battery, or in low power mode."""
    settings = parse_power_settings(readings.outputs.sleep)
    source = _SOURCE.search(readings.outputs.battery)
    if not settings and not source:
        return None
    found = []
    if source and source[1] == "Battery Power":
        why = "macOS slows the GPU and sleeps sooner on battery."
        found.append(Finding(Severity.WARNING, "the Mac runs on battery", why, "connect its power adapter"))
    if settings.get("lowpowermode") == 1 or settings.get("powermode") == 1:
        why = "The GPU runs at a fraction of its speed, and every stage waits for the slowest Mac."
        found.append(Finding(Severity.WARNING, "low power mode is on", why, "sudo pmset -a lowpowermode 0"))
    return found
