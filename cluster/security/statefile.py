"""A small file that several processes share: read again when it has changed, written whole, under the folder's lock.

A file that is damaged is an error and not an empty one: a list of who was removed must not be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any, Final, Generic, TypeVar

import msgpack

from cluster.core.errors import Busy, ClusterDamaged
from cluster.security.bounds import MAX_STATE_BYTES
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version

FORMAT: Final = 1
T = TypeVar("T")


class Edit(Generic[T]):
    """The rows as they were found; what is in ``rows`` at the end is written."""

    def __init__(self, rows: tuple[T, ...]) -> None:
        self.rows = rows


class StateFile(Generic[T]):
    """Rows of one kind in ``path``, a file of ``folder``. ``read`` and ``edit`` may be called from any thread."""

    def __init__(
        self, folder: ClusterFolder, path: Path, pack: Callable[[T], list[Any]], unpack: Callable[..., T]
    ) -> None:
        self._folder, self._path, self._pack, self._unpack = folder, path, pack, unpack
        self._guard = Lock()
        self._stamp: Stamp | None = None
        self._rows: tuple[T, ...] = ()

    def rows(self) -> tuple[T, ...]:
        """What the file holds, nothing where there is none; raises ``ClusterDamaged``."""
        with self._guard:
            stamp = self._look()
            if stamp is None:
                self._rows = ()
            elif stamp != self._stamp:
                self._rows = self._read()
            self._stamp = stamp
            return self._rows

    @contextmanager
    def edit(self, *, locked: bool = False) -> Iterator[Edit[T]]:
        """Change the rows: nobody else does meanwhile. They are written as the block ends, not where it raises.

        ``locked`` says that the caller holds the folder's lock already, to edit two files as one.
        """
        with nullcontext() if locked else self._folder.lock():
            found = self._read() if self._path.exists() else ()
            edit = Edit(found)
            yield edit
            if edit.rows != found:
                self._write(edit.rows)

    def _write(self, rows: tuple[T, ...]) -> None:
        content = bytes(msgpack.packb([FORMAT, [self._pack(row) for row in rows]]))
        if len(content) > MAX_STATE_BYTES:
            raise Busy(f"{self._path.name} of this cluster is full")
        self._folder.write(self._path, content)

    def _look(self) -> Stamp | None:
        try:
            return file_version(self._path)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise ClusterDamaged(f"cannot read {self._path}: {e.strerror}") from e

    def _read(self) -> tuple[T, ...]:
        try:
            with self._path.open("rb") as file:
                content = file.read(MAX_STATE_BYTES + 1)
            if len(content) > MAX_STATE_BYTES:
                raise ValueError("too long")
            version, rows = msgpack.unpackb(content)
            if version != FORMAT:
                raise ValueError("of another version of macpipe")
            return tuple(self._unpack(*row) for row in rows)
        except OSError as e:
            raise ClusterDamaged(f"cannot read {self._path}: {e.strerror}") from e
        except Exception as e:  # msgpack and the rows' own checks raise errors of many kinds
            raise ClusterDamaged(f"{self._path} is damaged ({type(e).__name__}); put back a copy of it") from e
