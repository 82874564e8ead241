"""Let one load after another place its model and read its weights, so that no two plans count the same memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.coordinator.reporter import LoadWatch


class LoadTurns:
    """The order of all loads of a coordinator. Requests and recoveries do not wait for them."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._model = ""
        self._waiting: list[LoadWatch] = []

    @asynccontextmanager
    async def take(self, watch: LoadWatch) -> AsyncIterator[bool]:
        """Wait until no other load has its turn; ``watch`` says for which model. Yield whether it had to wait."""
        waits = self._lock.locked()
        if waits:
            watch.wait_for(self._model)
            self._waiting.append(watch)
        try:
            await self._lock.acquire()
        finally:
            if waits:
                self._waiting.remove(watch)
        self._model = watch.model
        watch.go_on()
        for other in self._waiting:
            other.wait_for(self._model)
        try:
            yield waits
        finally:
            self._lock.release()
