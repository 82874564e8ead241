"""Submits a request whose model may first have to be loaded, and answers it whole or as a stream.

If the model is loaded, errors of the request are the response's status. If it is not, a stream begins at once, and what
goes wrong later goes into the stream. Errors that do not need the model come before its load in either case.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from starlette.requests import Request

from cluster.api.http.adjustments import adjustments_of
from cluster.api.http.body import build
from cluster.api.http.caller_identity import deadline_of
from cluster.api.http.model_names import ModelNames
from cluster.api.http.sse import EVENTS, EventStream, StreamEncoder, while_connected
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import DeadlineExceeded
from cluster.core.load_limits import STREAM_BEGIN_S

E = TypeVar("E")
E_contra = TypeVar("E_contra", contravariant=True)
R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class AnswerEncoder(StreamEncoder[E_contra], Protocol[E_contra, R_contra]):
    """Encodes the stream of an answer, which may begin before the request runs.

    Until ``attach`` is called, ``begin``, ``idle`` and ``fail`` encode a stream that waits for its model.
    """

    def attach(self, running: R_contra, model: str) -> None:
        """Take the running request, and the name of the model that answers it."""


@dataclass(frozen=True, slots=True)
class AnswerSubmission(Generic[R, E]):
    """A request for the model that it calls ``requested``.

    ``check`` raises the errors of its form, ``submit_to`` submits it, and ``events_of`` returns the events of what
    runs then.
    """

    names: ModelNames
    request: Request
    requested: str | None
    request_id: str
    check: Callable[[], object]
    submit_to: Callable[[ModelInfo], Awaitable[R]]
    events_of: Callable[[R], AbstractAsyncContextManager[AsyncIterator[E]]]

    async def submit(self) -> tuple[R, str]:
        """Submit the request. Return what runs, and the name of the model for the response.

        Wait for the model if it is not loaded. Raises ``Aborted`` if the client disconnects meanwhile, the errors of
        ``check`` and ``submit_to``, and as ``ModelNames.hold``.
        """
        if self.names.is_ready(self.requested):
            return await self._submit()
        await self._check()
        return await while_connected(self.request, lambda: self._submit_in_time(self.names.load_wait_s))

    async def stream(self, encoder: AnswerEncoder[E, R], media_type: bytes = EVENTS) -> EventStream[E]:
        """Submit the request and return its stream. If the model is not loaded soon, the stream submits the request.

        Raises as ``submit``.
        """
        if not self.names.is_ready(self.requested):
            await self._check()
            if not await self.names.await_ready(self.requested, STREAM_BEGIN_S):
                return EventStream(self._submit_late(encoder), encoder, self.request_id, media_type, early=True)
        running, model = await self._submit()
        encoder.attach(running, model)
        return EventStream(self.events_of(running), encoder, self.request_id, media_type)

    async def _check(self) -> None:
        """Raise the errors that do not need the model. The time until the deadline begins."""
        deadline_of(self.request)
        await build(self.request, self.check)

    async def _submit_in_time(self, wait_s: float | None = None) -> tuple[R, str]:
        """Submit the request once its model is loaded. Raises ``DeadlineExceeded`` if its deadline passes first."""
        deadline = deadline_of(self.request)
        try:
            async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0.0)):
                return await self._submit(wait_s)
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed while its model was being loaded") from None

    async def _submit(self, wait_s: float | None = None) -> tuple[R, str]:
        async with self.names.hold(self.requested, wait_s) as held:
            if held.fallback:
                adjustments_of(self.request.scope).fallback = held.fallback
            running = await self.submit_to(held.model_info)
            return running, self.names.shown_name(held.fallback or self.requested, held.model_info)

    @asynccontextmanager
    async def _submit_late(self, encoder: AnswerEncoder[E, R]) -> AsyncIterator[AsyncIterator[E]]:
        running, model = await self._submit_in_time()
        async with self.events_of(running) as events:
            encoder.attach(running, model)
            yield events
