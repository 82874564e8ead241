"""Room on the disk: asked before the first byte is fetched, told with figures."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.core.errors import DiskFull
from cluster.core.limits import DISK_MARGIN_BYTES, GIB, MIB


def free_bytes(folder: Path) -> int:
    """What may still be written where ``folder`` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(folder: Path, needed: int, free: int, what: str) -> None:
    """Raise DiskFull unless ``needed`` bytes fit into ``free`` with the margin that a system disk needs."""
    if needed and needed + DISK_MARGIN_BYTES > free:
        raise DiskFull(
            f"{what} needs {size_in_words(needed)} more on disk, and {size_in_words(free)} are free at {folder} "
            f"({size_in_words(DISK_MARGIN_BYTES)} stay free). Free some, or set MACPIPE_HOME to another disk",
            needed_bytes=str(needed),
            free_bytes=str(free),
            path=str(folder),
        )


def size_in_words(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.2f} MiB"
