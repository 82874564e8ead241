"""The desk: where every surface hands in a request and gets its events; what became of it is counted here.

A request whose events nobody reads any more is ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cluster.api.byte_budget import ByteBudget
from cluster.api.key_usage import KeyUsage, revoked_error
from cluster.api.metrics import Metrics
from cluster.api.tool_schema_errors import blame_tool
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import ClusterDamaged, InvalidGrammar, MacpipeError, RequestNotFound
from cluster.core.limits import KEY_LOOK_S
from cluster.core.request import Accepted, FinishEvent, Request, TokenEvent

log = logging.getLogger(__name__)
Events = AsyncGenerator[TokenEvent | FinishEvent, None]


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """An accepted request. Its ``events`` must be read to their end, or closed."""

    request: Request
    checkpoint: ModelInfo
    events: Events


class RequestService:
    """Speaks for one coordinator. ``accounts`` are those of its API keys, where there is a cluster."""

    def __init__(self, coordinator: Coordinator, metrics: Metrics, accounts: KeyUsage | None = None) -> None:
        self.coordinator, self.metrics, self.accounts = coordinator, metrics, accounts
        self.bodies = ByteBudget()
        """Bytes that the requests of every surface hold."""
        self._live: dict[str, str] = {}

    async def ask(self, request: Request, checkpoint: ModelInfo) -> RunningRequest:
        """Hand in a request; returns once it has a lane or a place in the queue. Raises what refuses it."""
        with self._refusals_counted():
            if self.accounts:
                self.accounts.prompt(request.client, len(request.prompt))
            try:
                answer = await self.coordinator.accept(request, checkpoint)
            except InvalidGrammar as e:
                raise await blame_tool(e, request, checkpoint, self.coordinator) from None
        return await self._wait_accepted(request, answer, checkpoint)

    async def resume(
        self, request_id: str, offsets: Sequence[int], client: str, checkpoint: ModelInfo
    ) -> RunningRequest:
        """Go on with an answer from the journal. Raises what the coordinator does, and what refuses it."""
        with self._refusals_counted():
            request, answer = self.coordinator.resume(request_id, offsets, client)
        return await self._wait_accepted(request, answer, checkpoint)

    async def abort(self, request_id: str, client: str | None) -> None:
        """End a request, if it is that ``client``'s; anybody's for None. Raises ``RequestNotFound``."""
        if client is not None and self._live.get(request_id) != client:
            raise RequestNotFound(f"no live request of yours has the id {request_id}")
        await self.coordinator.abort(request_id)

    async def end_revoked(self) -> None:
        """For ever: end the answers whose key is good no more."""
        while self.accounts:
            await asyncio.sleep(KEY_LOOK_S)
            try:
                gone = {client for client in set(self._live.values()) if self.accounts.is_revoked(client)}
            except ClusterDamaged as e:  # new requests are refused with it; those under way were let in
                log.error("%s", e.sentence)
                continue
            for request_id in [one for one, client in self._live.items() if client in gone]:
                with suppress(RequestNotFound, MacpipeError):
                    await self.coordinator.abort(request_id)

    @contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        try:
            yield
        except MacpipeError as e:
            self.metrics.count_error(e)
            raise

    async def _wait_accepted(self, request: Request, answer: AnswerQueue, checkpoint: ModelInfo) -> RunningRequest:
        events = self._events(request, answer)
        try:
            first = await anext(events)
        except BaseException:
            answer.abandon()
            raise
        assert isinstance(first, Accepted)
        return RunningRequest(request, checkpoint, events)  # type: ignore[arg-type]  # Accepted comes first and once

    async def _events(
        self, request: Request, answer: AnswerQueue
    ) -> AsyncGenerator[Accepted | TokenEvent | FinishEvent, None]:
        whole = False
        self._live[request.id] = request.client
        try:
            async for event in answer.events():
                if isinstance(event, FinishEvent):
                    self.metrics.count_finished(event)
                elif self.accounts and isinstance(event, TokenEvent):
                    self.accounts.count_tokens(request.client, 1)
                yield event
            whole = True
        except MacpipeError as e:
            self.metrics.count_error(e)
            whole = True
            if self.accounts and self.accounts.is_revoked(request.client):
                raise revoked_error() from e
            raise
        finally:
            self._live.pop(request.id, None)
            if not whole:
                answer.abandon()
                self.metrics.count_abandoned()
