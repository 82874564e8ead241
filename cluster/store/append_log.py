"""A record that only grows: one JSON list a line. A line that was cut off by a crash counts as not written.

Several processes may append to one file: each line goes out in one write.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.platform.private_files import make_private_folder, not_written

Entry = list[str | int]


class AppendLog:
    """The file ``path``, made with its first entry."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> Iterator[Entry]:
        """What was appended, oldest first; lines that are no entries are left out."""
        if not self._path.is_file():
            return
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, list) and entry and all(isinstance(field, str | int) for field in entry):
                yield entry

    def append(self, entries: Iterable[Entry]) -> None:
        """Write entries at the end. Raises DiskFull, or InvalidOption, where not all of them could be written."""
        text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
        if not text:
            return
        try:
            make_private_folder(self._path.parent)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._write(file, self._heal() + text.encode())
            finally:
                os.close(file)
        except OSError as e:
            raise not_written(e, self._path, "a model's records") from e

    def _write(self, file: int, lines: bytes) -> None:
        """One write: a second one could come behind another process's lines."""
        if os.write(file, lines) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _heal(self) -> bytes:
        """A line end, where a crash has cut the last line off."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return b""
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"
