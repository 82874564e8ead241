"""A small JSON file that several processes share: read again when it has changed, written whole under a lock.

A damaged file is an error, not an empty file: the list of removed members must not be forgotten. Earlier versions wrote
msgpack; such a file is read until the first edit, which replaces it with JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Final, Generic, TypeVar

import msgpack

from cluster.core.errors import Busy, ClusterDamaged
from cluster.platform.json_file import decode_json, encode_json, read_json
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.limits import MAX_STATE_BYTES

FORMAT: Final = 2
OLD_FORMAT: Final = 1
"""msgpack of ``[1, rows]``, each row the list of its values in the order of ``FORMAT`` 2's names."""
T = TypeVar("T")


class Edit(Generic[T]):
    """Rows of a file under edit. ``rows`` holds the rows that were read; its value at the end is written."""

    def __init__(self, rows: tuple[T, ...]) -> None:
        self.rows = rows


class StateFile(Generic[T]):
    """Rows of one kind in ``path``, a file of ``folder``. ``rows`` and ``edit`` may be called from any thread.

    ``pack`` turns a row into plain values by name. ``unpack`` takes them by name, or in order from an old file.
    """

    def __init__(
        self, folder: ClusterFolder, path: Path, pack: Callable[[T], dict[str, Any]], unpack: Callable[..., T]
    ) -> None:
        self._folder, self._path, self._pack, self._unpack = folder, path, pack, unpack
        self._old = path.with_suffix(".msgpack")
        self._guard = Lock()
        self._found: tuple[Path, Stamp] | None = None
        self._rows: tuple[T, ...] = ()

    def rows(self) -> tuple[T, ...]:
        """Return what the file holds, nothing if there is no file. Raises ``ClusterDamaged``."""
        with self._guard:
            found = self._find()
            if found is None:
                self._rows = ()
            elif found != self._found:
                self._rows = self._read(found[0])
            self._found = found
            return self._rows

    @contextmanager
    def edit(self, *, locked: bool = False) -> Iterator[Edit[T]]:
        """Hold the lock and yield the rows for editing. They are written at the end unless the block raises.

        ``locked`` says that the caller already holds the folder's lock, to edit two files in one step.
        """
        with nullcontext() if locked else self._folder.lock():
            found = self._find()
            before = self._read(found[0]) if found else ()
            edit = Edit(before)
            yield edit
            if edit.rows != before:
                self._write(edit.rows)

    def _write(self, rows: tuple[T, ...]) -> None:
        content = encode_json({"format": FORMAT, "rows": [self._pack(row) for row in rows]})
        if len(content) > MAX_STATE_BYTES:
            raise Busy(f"{self._path} has reached its maximum size; remove entries that are not needed any more")
        self._folder.write(self._path, content)
        with suppress(OSError):  # it is not read any more
            self._old.unlink(missing_ok=True)

    def _find(self) -> tuple[Path, Stamp] | None:
        """Return the file to read and its version; None if there is none. An edit may replace the old one meanwhile."""
        try:
            for path in (self._path, self._old, self._path):
                with suppress(FileNotFoundError):
                    return path, file_version(path)
        except OSError as e:
            raise ClusterDamaged(f"cannot read {path}: {e.strerror}; check who owns it, and its disk") from e
        return None

    def _read(self, path: Path) -> tuple[T, ...]:
        try:
            return self._read_json() if path == self._path else self._read_old()
        except OSError as e:
            raise ClusterDamaged(f"cannot read {path}: {e.strerror}; check who owns it, and its disk") from e
        except Exception as e:  # msgpack and the rows' own checks raise errors of many kinds
            raise ClusterDamaged(f"{path} is damaged ({type(e).__name__}); put back a copy of it") from e

    def parse(self, content: bytes) -> tuple[T, ...]:
        """Return the rows of the file of another machine. Raises ``ClusterDamaged``."""
        try:
            return self._unpack_rows(decode_json(content))
        except Exception as e:  # the rows' own checks raise errors of many kinds
            raise ClusterDamaged(f"another Mac's {self._path.name} is damaged ({type(e).__name__})") from e

    def _read_json(self) -> tuple[T, ...]:
        return self._unpack_rows(read_json(self._path, MAX_STATE_BYTES))

    def _unpack_rows(self, content: Any) -> tuple[T, ...]:
        if content["format"] != FORMAT:
            raise ValueError("of another version of macpipe")
        return tuple(self._unpack(**row) for row in content["rows"])

    def _read_old(self) -> tuple[T, ...]:
        try:
            with self._old.open("rb") as file:
                content = file.read(MAX_STATE_BYTES + 1)
        except FileNotFoundError:  # an edit has replaced it since it was found
            return self._read_json()
        if len(content) > MAX_STATE_BYTES:
            raise ValueError("too long")
        version, rows = msgpack.unpackb(content)
        if version != OLD_FORMAT:
            raise ValueError("of another version of macpipe")
        return tuple(self._unpack(*row) for row in rows)


def bytes_of(value: str | bytes) -> bytes:
    """Return bytes that a row has as hex digits, or as they are in an old file. Raises ValueError or TypeError."""
    if isinstance(value, bytes):
        return value
    return bytes.fromhex(value)
