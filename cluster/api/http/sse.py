"""Streams an answer as server-sent events or JSON lines.

During silence it sends comments, or events that say nothing new. A stream ends with its answer or when the client
disconnects. However it ends, the answer is closed, which ends the request behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from cluster.api.http.errors import ANTHROPIC_ROUTES, OLLAMA_ROUTES, error_body, sentence_of
from cluster.api.http.json_response import compact
from cluster.api.http.passed_answer import ERROR, PART, SILENCE, part_of
from cluster.core.errors import Aborted, MacpipeError
from cluster.core.limits import STREAM_COMMENT_S, STREAM_WRITE_TIMEOUT_S

T = TypeVar("T")
E = TypeVar("E")
E_contra = TypeVar("E_contra", contravariant=True)
DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": still working\n\n"
EVENTS: Final = b"text/event-stream; charset=utf-8"
JSON_LINES: Final = b"application/x-ndjson"
_HEADERS: Final = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


def json_line(data: object) -> bytes:
    """Return one line of a stream of JSON lines."""
    return f"{compact(data)}\n".encode()


def event(data: object, name: str = "") -> bytes:
    """Return one encoded event; ``name`` is for APIs that name their events."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {compact(data)}\n\n".encode()


def error_event(path: str, error: MacpipeError) -> bytes:
    """Return the end of a stream of the route ``path``, of which no more is known than that ``error`` ended it."""
    body = error_body(path, error)
    if path in OLLAMA_ROUTES:
        return json_line(body)
    return event(body, "error" if path.startswith(ANTHROPIC_ROUTES) else "")


class StreamEncoder(Protocol[E_contra]):
    """Encodes one answer in the format of an API. Empty pieces are not sent."""

    def begin(self) -> Iterable[bytes]:
        """Return what comes before the first event."""

    def encode(self, e: E_contra) -> Iterable[bytes]:
        """Return the next event of the answer."""

    def end(self) -> Iterable[bytes]:
        """Return what comes after the last event."""

    def idle(self) -> bytes:
        """Return what is sent during silence: a comment, or an event where clients' timeouts count only events."""

    def fail(self, error: MacpipeError) -> bytes:
        """Return the end of an answer that an error ended. The headers are sent, so it can only go into the stream."""


class EventStream(Generic[E]):
    """The streamed response of an answer, whose events ``encoder`` encodes.

    What ``encoder.idle`` returns is sent after ``STREAM_COMMENT_S`` without an event. ``request_id`` is logged with
    internal errors. ``media_type`` is that of what the encoder returns. ``early``: the response begins before
    ``events`` is entered, which may take minutes; an error of that goes into the stream.
    """

    def __init__(
        self,
        events: AbstractAsyncContextManager[AsyncIterator[E]],
        encoder: StreamEncoder[E],
        request_id: str,
        media_type: bytes = EVENTS,
        *,
        early: bool = False,
    ) -> None:
        self._headers = [(b"content-type", media_type), *_HEADERS]
        self._events = events
        self._encoder = encoder
        self._request_id = request_id
        self._early = early
        self._reading: AsyncIterator[E]
        self._wrote = False
        self._part = 0
        """The part of the answer to which the next pieces belong, see ``part_of``."""
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            if not self._early:
                await self._enter(stack)
            await _run_while_connected(receive, lambda: self._write(stack, send))

    async def _write(self, stack: AsyncExitStack, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        comments = asyncio.ensure_future(self._comment(send))
        try:
            more = await self._send_next(self._begin, send)
            if more and self._early:
                more = await self._send_next(lambda: self._enter(stack), send)
            while more:
                more = await self._send_next(self._encode_next, send)
        finally:
            comments.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _enter(self, stack: AsyncExitStack) -> Iterable[bytes]:
        self._reading = await stack.enter_async_context(self._events)
        return ()

    async def _begin(self) -> Iterable[bytes]:
        return tuple(self._encoder.begin())

    async def _encode_next(self) -> Iterable[bytes]:
        next_event = await anext(self._reading)
        self._part = part_of(next_event)
        return tuple(self._encoder.encode(next_event))

    async def _send_next(self, step: Callable[[], Awaitable[Iterable[bytes]]], send: Send) -> bool:
        """Send what the next step of the stream returns. Return whether more may follow."""
        more, self._part, about = False, 0, {}
        try:
            pieces = await step()
            more = True
        except StopAsyncIteration:
            pieces = self._encoder.end()
        except Exception as e:  # any: the client must be told why its answer ends
            error = sentence_of(e, self._request_id)
            pieces, about = [self._encoder.fail(error)], {ERROR: error}
        await self._send_pieces(pieces, {PART: self._part, **about}, send)
        return more

    async def _send_pieces(self, pieces: Iterable[bytes], about: Mapping[str, object], send: Send) -> None:
        async with self._sending:
            for piece in filter(None, pieces):
                self._wrote = True
                async with asyncio.timeout(STREAM_WRITE_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": piece, "more_body": True, **about})

    async def _comment(self, send: Send) -> None:
        """Send something during silence. The lock keeps it out of the pieces of an event, which may be numbered."""
        while True:
            self._wrote = False
            await asyncio.sleep(STREAM_COMMENT_S)
            async with self._sending:
                if not self._wrote:
                    idle = self._encoder.idle()
                    await send({"type": "http.response.body", "body": idle, "more_body": True, PART: SILENCE})


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
