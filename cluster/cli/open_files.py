"""How many files and connections this process may have open: as many as it needs, where the system lets it."""

from __future__ import annotations

import contextlib
import resource

from cluster.limits import OPEN_FILES

__all__ = ["allow_open_files"]


def allow_open_files() -> int:
    """Raise this process's own limit to ``OPEN_FILES``, or as far as the system allows; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a bound of its own below an infinite one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
