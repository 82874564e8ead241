"""Facts that macOS tells about the machine. With ``mac_commands`` it is the only reader of sysctl, sw_vers,
system_profiler and networksetup. The module ``pmset`` reads that command.

Each fact is one command, and one function that parses its output. On another system every fact is "not known". The
module knows nothing of MLX.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

__all__ = [
    "MachineFacts",
    "hardware_ports",
    "machine_facts",
    "memory_pressure",
    "process_seconds",
    "run_command",
]

MIB: Final = 2**20
COMMAND_TIMEOUT_S: Final = 5.0
"""Time limit of a command; system_profiler takes about one second."""
PRESSURES: Final = {1: "normal", 2: "warning", 4: "critical"}
"""kern.memorystatus_vm_pressure_level, as the kernel's header names the levels (sys/event.h, NOTE_MEMORYSTATUS)."""

_VERSION: Final = re.compile(r"^ProductVersion:\s*(\d{1,4}(?:\.\d{1,4}){0,3})\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """``chip`` and ``macos_version`` are empty, ``gpu_cores`` and ``wired_limit`` are 0 if not known.

    ``wired_limit`` is the user's limit for the GPU, in bytes.
    """

    chip: str = ""
    gpu_cores: int = 0
    wired_limit: int = 0
    macos_version: str = ""


@lru_cache(maxsize=1)
def machine_facts() -> MachineFacts:
    """Return the machine's facts, read once: none of them changes while a worker runs."""
    if platform.system() != "Darwin":
        return MachineFacts()
    return MachineFacts(
        chip=run_command("sysctl", "-n", "machdep.cpu.brand_string").strip(),
        gpu_cores=parse_gpu_cores(run_command("system_profiler", "-json", "SPDisplaysDataType")),
        wired_limit=parse_wired_limit(run_command("sysctl", "-n", "iogpu.wired_limit_mb")),
        macos_version=parse_version(run_command("sw_vers")),
    )


def memory_pressure() -> str:
    """Return the kernel's name of the memory pressure; empty if not known."""
    return parse_pressure(run_command("sysctl", "-n", "kern.memorystatus_vm_pressure_level"))


def process_seconds(pid: int) -> float | None:
    """Return the processor time of a process in seconds; None if not known."""
    return parse_cpu_time(run_command("ps", "-o", "time=", "-p", str(pid)))


def parse_cpu_time(clock: str) -> float | None:
    """Parse ``ps -o time=``: ``[[hours:]minutes:]seconds``, with hundredths."""
    try:
        parts = [float(part) for part in clock.strip().split(":")]
    except ValueError:
        return None
    return sum(part * 60.0**i for i, part in enumerate(reversed(parts)))


@lru_cache(maxsize=1)
def hardware_ports() -> dict[str, str]:
    """Return the kind of each network device, such as ``en0``: ``Wi-Fi``."""
    return parse_hardware_ports(run_command("networksetup", "-listallhardwareports"))


def parse_hardware_ports(report: str) -> dict[str, str]:
    """Parse ``networksetup -listallhardwareports``: a line with the port's name, the next one with its device."""
    lines = [line.partition(": ") for line in report.splitlines()]
    pairs = pairwise(lines)
    return {b[2]: a[2] for a, b in pairs if a[0] == "Hardware Port" and b[0] == "Device"}


def parse_gpu_cores(report: str) -> int:
    """Parse ``system_profiler -json SPDisplaysDataType``; 0 if it has no core count."""
    try:
        displays = json.loads(report)["SPDisplaysDataType"]
        return max(int(display.get("sppci_cores", 0)) for display in displays)
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def parse_displays(report: str) -> tuple[str, ...] | None:
    """Parse ``system_profiler -json SPDisplaysDataType``: the names of displays that are on; None for other output."""
    try:
        cards = json.loads(report)["SPDisplaysDataType"]
        displays = [display for card in cards for display in card.get("spdisplays_ndrvs", ())]
        return tuple(str(one.get("_name", "")) for one in displays if _is_on(one))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_on(display: dict[str, object]) -> bool:
    """Return whether a display is connected and not asleep, as far as its description says."""
    asleep = any("asleep" in key and str(value).endswith("yes") for key, value in display.items())
    return not asleep and not str(display.get("spdisplays_online", "")).endswith("no")


def parse_wired_limit(value: str) -> int:
    """Parse ``sysctl -n iogpu.wired_limit_mb``, in bytes; 0 if it is not set."""
    return int(value) * MIB if value.strip().isdigit() else 0


def parse_version(report: str) -> str:
    """Parse ``sw_vers``: the version, such as 15.1; empty if it names none."""
    found = _VERSION.search(report)
    return found[1] if found else ""


def parse_pressure(value: str) -> str:
    """Parse ``sysctl -n kern.memorystatus_vm_pressure_level``."""
    return PRESSURES.get(int(value), "") if value.strip().isdigit() else ""


def run_command(*command: str) -> str:
    """Return a command's output; empty if it does not exist, fails or takes too long."""
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
