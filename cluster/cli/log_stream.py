"""A daemon's standard error, which a full disk must not turn into an error of the daemon."""

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
    """Standard error that drops what the disk does not take. A pipe that nobody reads is an error as ever."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return _STDERR

    def isatty(self) -> bool:
        return os.isatty(_STDERR)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write ``data``, or lose it; how many of its bytes are done with."""
        try:
            return os.write(_STDERR, data)
        except OSError as e:
            if e.errno in _DISK_ERRORS:
                return memoryview(data).nbytes
            raise


def survive_full_log() -> None:
    """From now on, lines on standard error are lost where it is a file on a disk that is full or fails."""
    before = sys.stderr
    if isinstance(before, io.TextIOWrapper) and before.fileno() == _STDERR:  # else somebody has replaced it
        before.flush()
        raw = io.BufferedWriter(_LossyStderr())
        sys.stderr = io.TextIOWrapper(raw, encoding=before.encoding, errors="replace", line_buffering=True)
