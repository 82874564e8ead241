"""Checks of the system itself: macOS, the MLX build, memory and disk."""

from __future__ import annotations

import re
from typing import Final

from cluster.core.examination import Finding, Severity
from cluster.core.limits import GIB
from cluster.core.text import gib_in_words
from cluster.doctor.readings import Readings
from cluster.platform.macos import parse_pressure, parse_wired_limit

OLDEST_MACOS: Final = (14, 0)
"""The oldest system for which MLX has wheels."""
NEURAL_MACOS: Final = (26, 2)
"""MLX uses the neural accelerators of an M5 only if its wheel was built for this system or a newer one."""
PANICKING_MACOS: Final = ((26, 3), (26, 4))
"""Systems whose kernel panics were reported under MLX (mlx issues 3186 and 3346)."""
LOW_DISK: Final = 20 * GIB
"""A stage of a large model needs more than this."""
DEFAULT_WIRED_SHARE: Final = 0.75
"""What macOS lets the GPU have of the memory unless a limit is set."""
WIRED_REST: Final = 8 * GIB
"""What a suggested limit leaves to macOS."""
LEAST_FOR_LIMIT: Final = 32 * GIB
"""On smaller Macs a higher limit gains little and takes memory that macOS needs."""

_TARGET: Final = re.compile(r"macosx_(\d{1,3})_(\d{1,3})_")
_M5: Final = re.compile(r"\bM5\b")


def check_macos(readings: Readings) -> list[Finding] | None:
    """Find a macOS that MLX does not support, or that is known to panic."""
    version = readings.macos
    if not version:
        return None
    written = ".".join(map(str, version))
    if version < OLDEST_MACOS:
        what = f"macOS {written} is older than 14.0"
        return [Finding(Severity.PROBLEM, what, "MLX runs on macOS 14 and newer.", "softwareupdate --list")]
    if version[:2] in PANICKING_MACOS:
        why = "Kernel panics under GPU load were reported for macOS 26.3 and 26.4: the whole Mac restarts."
        return [Finding(Severity.WARNING, f"macOS {written} is known to panic", why, "softwareupdate --list")]
    return []


def check_mlx(readings: Readings) -> list[Finding] | None:
    """Find a missing MLX, or on an M5 a build that leaves its neural accelerators unused."""
    if not readings.versions.mlx:
        why = "A worker computes with MLX; without it no layers can be loaded."
        return [Finding(Severity.PROBLEM, "MLX is not installed", why, "python -m pip install mlx mlx-lm")]
    targets = [(int(a), int(b)) for tag in readings.versions.mlx_targets for a, b in _TARGET.findall(tag)]
    chip = readings.outputs.chip.strip()
    if not (chip and targets):
        return None if readings.is_mac else []
    if not _M5.search(chip) or max(targets) >= NEURAL_MACOS:
        return []
    built = ".".join(map(str, max(targets)))
    why = f"{chip} has neural accelerators; MLX uses them for prompts only in its build for macOS 26.2."
    update = "" if readings.macos >= NEURAL_MACOS else "update macOS to 26.2 or newer, then "
    remedy = f"{update}python -m pip install --force-reinstall --no-deps mlx-metal"
    return [Finding(Severity.WARNING, f"MLX is the build for macOS {built}", why, remedy)]


def check_memory(readings: Readings) -> list[Finding] | None:
    """Find memory pressure, a limit that is too high, and memory that the GPU may not use."""
    memory = readings.outputs.memory.strip()
    if not memory.isdigit():
        return None
    found = _check_pressure(readings)
    total, limit = int(memory), parse_wired_limit(readings.outputs.wired_limit)
    if limit > total - WIRED_REST / 2:
        what = f"the GPU may wire {gib_in_words(limit)} of {gib_in_words(total)}"
        why = "macOS has too little left: the Mac may freeze or restart while a model is loaded."
        found.append(Finding(Severity.PROBLEM, what, why, "sudo sysctl iogpu.wired_limit_mb=0"))
    elif not limit and total >= LEAST_FOR_LIMIT:
        megabytes = int(total - WIRED_REST) >> 20
        what = f"the GPU may use about {gib_in_words(DEFAULT_WIRED_SHARE * total)} of {gib_in_words(total)}"
        why = "This is the default. A higher limit makes room for more layers; it is lost at a restart."
        found.append(Finding(Severity.NOTE, what, why, f"sudo sysctl iogpu.wired_limit_mb={megabytes}"))
    return found


def _check_pressure(readings: Readings) -> list[Finding]:
    pressure = parse_pressure(readings.outputs.pressure)
    if pressure not in ("warning", "critical"):
        return []
    severity = Severity.PROBLEM if pressure == "critical" else Severity.WARNING
    why = "macOS compresses and swaps memory, so every token waits, or ends processes."
    return [Finding(severity, f"memory pressure is {pressure}", why, "top -o mem -n 10 -l 1; end what you can spare")]


def check_disk(readings: Readings) -> list[Finding] | None:
    """Find a disk with too little room for the layers of a model."""
    if readings.disk_free is None:
        return None
    if readings.disk_free >= LOW_DISK:
        return []
    what = f"{gib_in_words(readings.disk_free)} are free on the disk of {readings.disk_path}"
    severity = Severity.PROBLEM if readings.disk_free < GIB else Severity.WARNING
    why = "The layers of a large model are stored there before they are loaded."
    return [Finding(severity, what, why, f"du -sh '{readings.disk_path}'/* | sort -h")]
