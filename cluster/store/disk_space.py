"""Checks free disk space before the first byte is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from cluster.core.errors import DiskFull
from cluster.core.limits import GIB, MIB
from cluster.store.limits import DISK_MARGIN_BYTES


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of ``folder``, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


CHOOSE_DISK: Final = "choose another disk with --home or MACPIPE_HOME"


def require_room(folder: Path, needed: int, free: int, what: str, advice: str = CHOOSE_DISK) -> None:
    """Raise DiskFull unless ``needed`` bytes fit into ``free`` and leave ``DISK_MARGIN_BYTES`` free for the system.

    ``advice`` says what to do if nothing can be freed.
    """
    if needed and needed + DISK_MARGIN_BYTES > free:
        raise DiskFull(
            f"{what} needs {size_in_words(needed)} more on disk, but only {size_in_words(free)} are free at "
            f"{folder} (macpipe leaves {size_in_words(DISK_MARGIN_BYTES)} free). Free space, or {advice}",
            needed_bytes=str(needed),
            free_bytes=str(free),
            path=str(folder),
        )


def size_in_words(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.2f} MiB"
