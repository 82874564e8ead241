"""The log of a daemon: lines with time and level on standard error."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from typing import Final

LEVEL_VARIABLE: Final = "MACPIPE_LOG_LEVEL"
_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"


class LogLevel(StrEnum):
    """The least important lines that are logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class _StderrHandler(logging.Handler):
    """Writes lines to the current ``sys.stderr``, which is replaced while progress bars are drawn below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. An error in it is reported and does not reach the caller."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # any error: a failed log line must not end what it is about
            self.handleError(record)


def configure_logging(level: LogLevel) -> None:
    """Log macpipe's lines of ``level`` and above, and libraries' warnings. Does nothing if the root has a handler."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    root.addHandler(handler)
    least = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("cluster").setLevel(least)
