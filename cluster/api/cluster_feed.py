"""Shares snapshots of the cluster among all who watch it: one a second, and none while nobody watches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from cluster.api.page_limits import FEED_S, MAX_VIEWERS
from cluster.core.errors import Busy

Take = Callable[[], Awaitable[bytes]]
_NEVER: Final = -1


class ClusterFeed:
    """Snapshots, encoded by whoever takes them. A viewer that reads slowly skips some. Use it from one event loop."""

    def __init__(self, interval_s: float = FEED_S) -> None:
        self._interval_s = interval_s
        self._taking = asyncio.Lock()
        self._closed = asyncio.Event()
        self._number = _NEVER
        self._latest = b""
        self._taken_at = -math.inf
        self._viewers = 0

    @contextmanager
    def join(self) -> Iterator[None]:
        """Count a viewer while the context is open. Raises ``Busy`` if there are ``MAX_VIEWERS``."""
        if self._viewers >= MAX_VIEWERS:
            raise Busy(f"{MAX_VIEWERS} pages watch this cluster; close some, or try again later")
        self._viewers += 1
        try:
            yield
        finally:
            self._viewers -= 1

    def close(self) -> None:
        """End all ``snapshots``, so that nobody waits for viewers when the coordinator ends."""
        self._closed.set()

    async def snapshots(self, take: Take) -> AsyncGenerator[bytes, None]:
        """Yield the present snapshot, then each new one, until the feed is closed. ``take`` makes one."""
        seen = _NEVER
        while await self._wait_news(seen, take):
            seen = self._number
            yield self._latest

    async def _wait_news(self, seen: int, take: Take) -> bool:
        """Wait for a snapshot other than number ``seen``; return False once the feed is closed.

        The first viewer to ask takes it, and the others wait for that.
        """
        if self._is_news(seen):
            return True
        async with self._taking:
            if not self._is_news(seen):
                await self._wait_due()
                if not self._closed.is_set():
                    self._latest = await take()
                    self._taken_at = _now()
                    self._number += 1
        return not self._closed.is_set()

    async def _wait_due(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(_now(), self._taken_at + self._interval_s)):
                await self._closed.wait()

    def _is_news(self, seen: int) -> bool:
        fresh = _now() - self._taken_at < self._interval_s
        return self._number != seen and fresh and not self._closed.is_set()


def _now() -> float:
    return asyncio.get_running_loop().time()
