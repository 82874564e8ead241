"""Measures the memory of a process on this machine."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Final

__all__ = ["resident_bytes"]

PS_TIMEOUT_S: Final = 2.0
"""Timeout of ``ps``, in seconds."""


def resident_bytes(pid: int, platform: str = sys.platform) -> int:
    """Return the resident bytes of process ``pid``; 0 if it has ended or is unknown. May block for milliseconds."""
    try:
        return _from_proc(pid) if platform == "linux" else _from_ps(pid)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0


def _from_proc(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * resource.getpagesize()


def _from_ps(pid: int) -> int:
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    return int(subprocess.run(command, capture_output=True, timeout=PS_TIMEOUT_S, check=True).stdout) << 10
