"""Run loads so that somebody else can end them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import anyio

from cluster.core.errors import LoadEnded
from cluster.core.futures import ignore_error


class LoadTasks:
    """The loads of a coordinator that run, wait for their turn, or wait for room, by the models' own names.

    A load may run others of the same name. All methods must be called on the coordinator's event loop.
    """

    def __init__(self) -> None:
        self._running: dict[str, set[asyncio.Task[None]]] = {}

    async def run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run a load of the model ``name``. It has ended when this returns, also if the caller is cancelled.

        Raises ``LoadEnded`` once ``end`` is called, and the errors of ``work``.
        """
        load = asyncio.create_task(work)
        load.add_done_callback(ignore_error)  # nobody awaits it if the caller is cancelled
        running = self._running.setdefault(name, set())
        running.add(load)
        try:
            await asyncio.wait((load,))
        finally:
            if load.cancel():
                with anyio.CancelScope(shield=True):
                    await asyncio.wait((load,))
            running.discard(load)
            if not running:
                self._running.pop(name, None)
        if load.cancelled():
            raise LoadEnded("the model was unloaded while it was being loaded")
        load.result()

    async def end(self, name: str) -> bool:
        """End all loads of the model ``name``. Return whether there was one."""
        loads = [load for load in self._running.get(name, ()) if load.cancel()]
        if loads:
            await asyncio.wait(loads)
        return bool(loads)
