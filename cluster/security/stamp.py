"""By what a file is known to be another than before, without reading it. Files here are replaced by rename."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Stamp", "stamp_of"]

Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp:
    """Time of the last change (ns), size in bytes, and inode. Raises ``OSError``."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
