"""A clock that goes on while the machine sleeps."""

from __future__ import annotations

import sys
import time

_CLOCK = time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC
"""On macOS, ``CLOCK_MONOTONIC`` counts sleep, and what Python calls ``time.monotonic`` does not."""


def continuous_seconds() -> float:
    """Return seconds since some moment before this machine started. They never go back, and they count sleep."""
    return time.clock_gettime(_CLOCK)
