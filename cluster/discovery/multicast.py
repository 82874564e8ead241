"""Open and close the multicast sockets. A machine without multicast gets a warning and None, not an exception."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Final

import anyio
from zeroconf import Error, InterfaceChoice, IPVersion
from zeroconf.asyncio import AsyncZeroconf

log = logging.getLogger(__name__)

GOODBYE_S: Final = 1.0
"""A goodbye takes three packets, an eighth of a second apart. A broken network must not delay an exit for longer."""
FOLLOW_S: Final = 10.0
"""Interval at which interfaces are checked for changes, such as a plugged cable or a joined network."""


def open_multicast(senders: Sequence[str] | None, purpose: str) -> AsyncZeroconf | None:
    """Open sockets on the interfaces with these addresses, or on all. Logs a warning and returns None on failure."""
    # The library logs a traceback for every packet that a half-configured interface refuses. That is not worth a log.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    attempts = [{"interfaces": list(senders)}] if senders else [{"ip_version": v} for v in _FAMILIES]
    for attempt in attempts:
        try:
            return AsyncZeroconf(**attempt)
        except (OSError, RuntimeError, Error) as error:
            reason = error
    log.warning("multicast: not available, use --peer HOST:PORT reason=%s purpose=%s", reason, purpose)
    return None


_FAMILIES: Final = (IPVersion.V4Only, IPVersion.V6Only)


async def close_multicast(zeroconf: AsyncZeroconf) -> None:
    """Send a goodbye and close within ``GOODBYE_S``, cancelled or not. Network errors are ignored."""
    with contextlib.suppress(OSError, Error), anyio.move_on_after(GOODBYE_S, shield=True):
        await zeroconf.async_close()


async def follow_interfaces(zeroconf: AsyncZeroconf, senders: Sequence[str] | None) -> None:
    """Open sockets on new interfaces and close those of removed ones."""
    with contextlib.suppress(OSError, RuntimeError, Error):
        await zeroconf.async_update_interfaces(list(senders) if senders else InterfaceChoice.All)


@contextlib.asynccontextmanager
async def alongside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``work`` during the block. An exception of the block passes through unchanged, not in a group."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()
