"""Detect that a file changed from its stat(), without reading it. macpipe replaces its files by rename."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Stamp", "file_version"]

Stamp = tuple[int, int, int]


def file_version(path: Path) -> Stamp:
    """Return the time of the last change (ns), the size (bytes) and the inode. Raises ``OSError``."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
