"""Helpers for asyncio futures beyond the standard library."""

from __future__ import annotations

import asyncio
from typing import Any


def ignore_error(future: asyncio.Future[Any]) -> None:
    """Mark the error of a future as retrieved. Add it as a callback if nobody may be left to await the future.

    Without it, asyncio logs the error with a traceback once the future is garbage.
    """
    if not future.cancelled():
        future.exception()
