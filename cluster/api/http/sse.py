"""Server-sent events, with comments during silence. A stream ends with its events or when the client disconnects.

However a stream ends, its iterator is closed, which ends the request behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from cluster.api.http.json_response import compact
from cluster.core.errors import Aborted
from cluster.core.limits import STREAM_COMMENT_S, STREAM_WRITE_TIMEOUT_S

T = TypeVar("T")
DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": still working\n\n"
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def event(data: object, name: str = "") -> bytes:
    """Return one encoded event; ``name`` is for APIs that name their events."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {compact(data)}\n\n".encode()


class EventStream:
    """A streamed response with the given events. ``idle`` is sent after ``STREAM_COMMENT_S`` without an event."""

    def __init__(self, events: AsyncGenerator[bytes, None], idle: bytes = COMMENT) -> None:
        self._events = events
        self._idle = idle
        self._wrote = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await _run_while_connected(receive, lambda: self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        comments = asyncio.ensure_future(self._comment(send))
        try:
            async for piece in self._events:
                if not piece:
                    continue
                self._wrote = True
                async with asyncio.timeout(STREAM_WRITE_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            comments.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _comment(self, send: Send) -> None:
        """Send ``idle`` during silence. It never splits an event: each event is written in one send."""
        while True:
            self._wrote = False
            await asyncio.sleep(STREAM_COMMENT_S)
            if not self._wrote:
                await send({"type": "http.response.body", "body": self._idle, "more_body": True})


async def while_connected(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Return the result of ``work``. If the client disconnects, cancel it. Raises ``Aborted``."""
    done: list[T] = []

    async def run() -> None:
        done.append(await work())

    await _run_while_connected(request.receive, run)
    if not done:
        raise Aborted("the client disconnected")
    return done[0]


async def _run_while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` to its end, or until the client disconnects or stops reading."""
    working = asyncio.ensure_future(work())
    watching = asyncio.ensure_future(_wait_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
    except (TimeoutError, OSError):
        return  # a client that does not read is treated as disconnected
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
