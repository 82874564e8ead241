"""Where a daemon logs: standard error or a file. The daemon outlives a full disk."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.platform.logs import LogLevel, configure_logging
from cluster.platform.private_files import make_private_folder, not_written

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_STDERR: Final = 2
LogFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Log to this file, which is rotated at 10 MiB.", show_default="standard error"),
]


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


def open_log(level: LogLevel, file: Path | None) -> None:
    """Log from now on, to ``file`` if one is given. Raise a MacpipeError if that cannot be written."""
    survive_full_log()
    if file is None:
        configure_logging(level)
        return
    path = file.expanduser().absolute()
    sys.stderr.write(f"log: {path}\n")
    try:
        if not path.parent.exists():
            make_private_folder(path.parent)
        configure_logging(level, path)
    except OSError as e:
        raise not_written(e, path, "the log", "choose another file with --log-file") from None
