"""Lets gRPC's events of one test's event loop come after its end.

grpc.aio has one poller for all event loops of a process. An event that completes after its loop was closed, such as the
end of a call that a test cancelled, is handed to the loop of a later test, which must call back into the closed one and
fails with "Event loop is closed". A program has one loop, so this is about tests alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

GRPC = "grpc._cython"


@pytest.fixture(scope="session", autouse=True)
def late_events_are_dropped() -> Any:
    """Drop callbacks of gRPC into closed loops; all other callbacks into them raise RuntimeError as before."""
    schedule = asyncio.BaseEventLoop.call_soon_threadsafe

    def call_soon_threadsafe(
        loop: asyncio.BaseEventLoop, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle | None:
        if loop.is_closed() and str(getattr(callback, "__module__", "")).startswith(GRPC):
            return None
        return schedule(loop, callback, *args, context=context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", call_soon_threadsafe)
        yield
