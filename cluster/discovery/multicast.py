"""Opens and closes the multicast sockets. A machine that has none to give gets a warning and a None, no exception."""

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
"""Leaving takes three packets, an eighth of a second apart; a network that is gone must not hold up an exit."""
FOLLOW_S: Final = 10.0
"""How often interfaces are looked at again: a cable plugged in, a network joined."""


def open_multicast(senders: Sequence[str] | None, purpose: str) -> AsyncZeroconf | None:
    """Sockets on the interfaces that have these addresses, or on all; None, with a warning, where that fails."""
    # The library logs every packet that a half-configured interface refuses, with a traceback; it is no news.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    attempts = [{"interfaces": list(senders)}] if senders else [{"ip_version": v} for v in _FAMILIES]
    for attempt in attempts:
        try:
            return AsyncZeroconf(**attempt)
        except (OSError, RuntimeError, Error) as error:
            reason = error
    log.warning(
        "cannot %s over Zeroconf on this machine (%s); name workers by --peer HOST:PORT instead", purpose, reason
    )
    return None


_FAMILIES: Final = (IPVersion.V4Only, IPVersion.V6Only)


async def close_multicast(zeroconf: AsyncZeroconf) -> None:
    """Say goodbye and close, within ``GOODBYE_S``, cancelled or not; a network that fails meanwhile is no news."""
    with contextlib.suppress(OSError, Error), anyio.move_on_after(GOODBYE_S, shield=True):
        await zeroconf.async_close()


async def follow_interfaces(zeroconf: AsyncZeroconf, senders: Sequence[str] | None) -> None:
    """Take up the sockets of interfaces that came, and let go of those that went."""
    with contextlib.suppress(OSError, RuntimeError, Error):
        await zeroconf.async_update_interfaces(list(senders) if senders else InterfaceChoice.All)


@contextlib.asynccontextmanager
async def alongside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``work`` for as long as the block lasts. What the block raises passes through as it is, in no group."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()
