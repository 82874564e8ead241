"""Keeps a daemon running when the disk that holds its standard error is full or fails."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_STDERR: Final = 2


class _LossyStderr(io.RawIOBase):
    """Standard error that drops data on disk errors. A broken pipe still raises."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return _STDERR

    def isatty(self) -> bool:
        return os.isatty(_STDERR)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write ``data``, or drop it on a disk error. Return the number of bytes written or dropped."""
        try:
            return os.write(_STDERR, data)
        except OSError as e:
            if e.errno in _DISK_ERRORS:
                return memoryview(data).nbytes
            raise


def survive_full_log() -> None:
    """Replace ``sys.stderr`` so that lines are dropped, not raised, when its disk is full or fails."""
    before = sys.stderr
    if isinstance(before, io.TextIOWrapper) and before.fileno() == _STDERR:  # otherwise it was already replaced
        before.flush()
        raw = io.BufferedWriter(_LossyStderr())
        sys.stderr = io.TextIOWrapper(raw, encoding=before.encoding, errors="replace", line_buffering=True)
