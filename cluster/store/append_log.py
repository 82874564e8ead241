"""An append-only log file: one JSON list per line. A line that a crash cut off counts as not written.

Several processes may append to one file, because each ``append`` is a single write.
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
    """The log in the file ``path``, which the first ``append`` creates."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> Iterator[Entry]:
        """Yield the entries, oldest first. Skip invalid lines."""
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
        """Append entries. Raise DiskFull or InvalidOption if not all of them could be written."""
        text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
        if not text:
            return
        try:
            make_private_folder(self._path.parent)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._write(file, self._missing_newline() + text.encode())
            finally:
                os.close(file)
        except OSError as e:
            raise not_written(e, self._path, "a model's records") from e

    def _write(self, file: int, lines: bytes) -> None:
        """Write in one call: a second one could land behind another process's lines."""
        if os.write(file, lines) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _missing_newline(self) -> bytes:
        """Return a newline if a crash has cut off the last line, else nothing."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return b""
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"
