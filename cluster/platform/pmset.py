"""What macOS's ``pmset`` says about sleep, power and heat. Its reports are parsed here alone."""

from __future__ import annotations

import re
from typing import Final

from cluster.platform.macos import run_command

FULL_SPEED: Final = 100
"""Per cent; what ``parse_thermal_limit`` returns where heat limits nothing."""

_SETTING: Final = re.compile(r"^\s*(SleepDisabled|sleep|powermode|lowpowermode)\s+(\d{1,6})\b", re.MULTILINE)
_SOURCE: Final = re.compile(r"Now drawing from '([^'\n]{1,40})'")
_LIMIT: Final = re.compile(r"^\s*CPU_(?:Speed|Scheduler)_Limit\s*=\s*(\d{1,3})\s*$", re.MULTILINE)


def thermal_limit() -> int:
    """Return the percentage of full speed to which heat limits the processors; 100 if it does not, or not known."""
    return parse_thermal_limit(run_command("pmset", "-g", "therm"))


def parse_thermal_limit(report: str) -> int:
    """Parse ``pmset -g therm``: lines such as ``CPU_Speed_Limit = 80``; newer Macs print none at full speed."""
    return min((int(limit) for limit in _LIMIT.findall(report)), default=FULL_SPEED)


def parse_power_settings(report: str) -> dict[str, int]:
    """Parse ``pmset -g``: the settings that matter here, by name. ``sleep`` is in minutes; 0 means never."""
    return {name: int(value) for name, value in _SETTING.findall(report)}


def parse_power_source(report: str) -> str:
    """Parse ``pmset -g batt``: the source, such as ``AC Power`` or ``Battery Power``; empty if it names none."""
    found = _SOURCE.search(report)
    return found[1] if found else ""
