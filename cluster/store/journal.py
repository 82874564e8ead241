"""A record that only grows: one JSON list a line. A line that was cut off by a crash counts as not written.

Several processes may append to one file: each line goes out in one write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

Entry = list[str | int]


class Journal:
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
        """Write entries at the end."""
        text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
        if not text:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, self._heal() + text.encode())
        finally:
            os.close(file)

    def _heal(self) -> bytes:
        """A line end, where a crash has cut the last line off."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return b""
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"
