"""The log of a daemon: lines with time and level on standard error, or in a file that is rotated."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from enum import StrEnum
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

LEVEL_VARIABLE: Final = "MACPIPE_LOG_LEVEL"
LOG_BYTES: Final = 10 * 2**20
"""Size at which a log file is rotated."""
LOG_FILES: Final = 4
"""Older log files that are kept, as ``NAME.1`` to ``NAME.4``."""
_STDERR: Final = 2
_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"
_SPECIFIER: Final = re.compile(r"(?P<key>=)?%[-#0 +]*\d*(?:\.\d+)?(?P<type>[a-zA-Z%])")
_NEEDS_QUOTES: Final = re.compile(r"[\s\"=]")


class LogLevel(StrEnum):
    """The least important lines that are logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class _LineFormatter(logging.Formatter):
    """Quotes, as JSON does, the values of ``key=%s`` that have blanks, quotes or ``=``: a program can split the line.

    Only in macpipe's own lines. A value with a line break stays on one line.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        if record.name.partition(".")[0] == "cluster" and record.args and isinstance(record.args, tuple):
            record.message = record.msg % quote_values(record.msg, record.args)
        return super().formatMessage(record)


def quote_values(template: str, arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Return the arguments of a %-template; those behind ``=`` that need it are quoted."""
    follows_key = [bool(found["key"]) for found in _SPECIFIER.finditer(template) if found["type"] != "%"]
    pairs = zip(arguments, follows_key, strict=True)
    return tuple(_quote(one) if is_value else one for one, is_value in pairs)


def _quote(value: object) -> object:
    text = str(value)
    if text and not _NEEDS_QUOTES.search(text):
        return value
    return json.dumps(text, ensure_ascii=False)


class _StderrHandler(logging.Handler):
    """Writes lines to the current ``sys.stderr``, which is replaced while progress bars are drawn below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. An error in it is reported and does not reach the caller."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # any error: a failed log line must not end what it is about
            self.handleError(record)


class _RotatedLog(RotatingFileHandler):
    """A log file that is also standard error, so that it has tracebacks and what child processes write too.

    A child that inherited standard error goes on with its file when that is rotated.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=LOG_FILES, encoding="utf-8", errors="replace")
        self._become_stderr()

    def doRollover(self) -> None:
        """Rename the files and begin a new one."""
        super().doRollover()
        self._become_stderr()

    def _become_stderr(self) -> None:
        if self.stream:
            sys.stderr.flush()
            os.dup2(self.stream.fileno(), _STDERR)


def configure_logging(level: LogLevel, file: Path | None = None, max_bytes: int = LOG_BYTES) -> None:
    """Log macpipe's lines of ``level`` and above, and libraries' warnings. Does nothing if the root has a handler.

    With ``file``, they and all of standard error go to that file, which is rotated at ``max_bytes``. Raises OSError if
    it cannot be opened.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    handler = _RotatedLog(file, max_bytes) if file else _StderrHandler()
    handler.setFormatter(_LineFormatter(_FORMAT))
    root.addHandler(handler)
    least = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("cluster").setLevel(least)
