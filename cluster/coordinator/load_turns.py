"""Let one load after another place its model and read its weights, so that no two plans count the same memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cluster.coordinator.reporter import LoadWatch


class LoadTurns:
    """The order of all loads of a coordinator. Requests and recoveries do not wait for them."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._model = ""
        self._waiting: list[LoadWatch] = []
        self._give_way: Callable[[], object] | None = None

    @asynccontextmanager
    async def take(self, watch: LoadWatch, give_way: Callable[[], object] | None = None) -> AsyncIterator[bool]:
        """Wait until no other load has its turn; ``watch`` says for which model. Yield whether it had to wait.

        ``give_way`` is called if another load has to wait for this one: it should end.
        """
        waits = self._lock.locked() or bool(self._waiting)  # the turn of one that waits may be about to begin
        if waits:
            if self._give_way:
                self._give_way()
            watch.wait_for(self._model)
            self._waiting.append(watch)
        try:
            await self._lock.acquire()
        finally:
            if waits:
                self._waiting.remove(watch)
        self._model, self._give_way = watch.model, give_way
        watch.go_on()
        for other in self._waiting:
            other.wait_for(self._model)
        try:
            yield waits
        finally:
            self._give_way = None
            self._lock.release()
