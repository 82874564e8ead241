"""By what a file is known to be another than before, without reading it. Files here are replaced by rename."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Stamp", "file_version"]

Stamp = tuple[int, int, int]


def file_version(path: Path) -> Stamp:
    """Time of the last change (ns), size in bytes, and inode. Raises ``OSError``."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
