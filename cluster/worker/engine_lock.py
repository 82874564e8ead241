"""Know whether engines of an earlier daemon of this worker still run: they hold a lock as long as they live.

A daemon that is killed leaves its engines a last step to compute. The lock belongs to an open file, which engines
inherit, so the system ends it with the last of them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.platform.private_files import not_written

__all__ = ["EngineLock"]


class EngineLock:
    """The lock of one daemon and of its engines, which must be started with ``file``, a descriptor."""

    def __init__(self, file: int) -> None:
        self.file = file
        self._held = False

    def acquire(self) -> bool:
        """Return whether no engine of an earlier daemon runs any more."""
        if not self._held:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._held = True
        return True

    @staticmethod
    @contextmanager
    def open(folder: Path) -> Iterator[EngineLock]:
        """Open the lock of the worker whose state is in ``folder``. Raises ``DiskFull`` or ``InvalidOption``."""
        path = folder / "engines.lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise not_written(e, path, "a lock") from e
        try:
            yield EngineLock(file)
        finally:
            os.close(file)
