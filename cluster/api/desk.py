"""The desk: where every surface hands in a request and gets its events; what became of it is counted here.

A request whose events nobody reads any more is ended.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.api.metrics import Metrics
from cluster.coordinator.answer import Answer
from cluster.coordinator.checkpoint import Checkpoint
from cluster.coordinator.coordinator import Coordinator
from cluster.errors import MacpipeError
from cluster.types import Accepted, FinishEvent, Request, TokenEvent

Events = AsyncGenerator[TokenEvent | FinishEvent, None]


@dataclass(frozen=True, slots=True)
class Asked:
    """An accepted request. Its ``events`` must be read to their end, or closed."""

    request: Request
    checkpoint: Checkpoint
    events: Events


class Desk:
    """Speaks for one coordinator."""

    def __init__(self, coordinator: Coordinator, metrics: Metrics) -> None:
        self.coordinator, self.metrics = coordinator, metrics

    async def ask(self, request: Request, checkpoint: Checkpoint) -> Asked:
        """Hand in a request; returns once it has a lane or a place in the queue. Raises what refuses it."""
        with self._refusals_counted():
            answer = await self.coordinator.accept(request, checkpoint)
        return await self._accepted(request, answer, checkpoint)

    async def resume(self, request_id: str, offsets: Sequence[int], client: str, checkpoint: Checkpoint) -> Asked:
        """Go on with an answer from the journal. Raises what the coordinator does, and what refuses it."""
        with self._refusals_counted():
            request, answer = self.coordinator.resume(request_id, offsets, client)
        return await self._accepted(request, answer, checkpoint)

    @contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        try:
            yield
        except MacpipeError as e:
            self.metrics.ended(e)
            raise

    async def _accepted(self, request: Request, answer: Answer, checkpoint: Checkpoint) -> Asked:
        events = self._events(answer)
        try:
            first = await anext(events)
        except BaseException:
            answer.abandon()
            raise
        assert isinstance(first, Accepted)
        return Asked(request, checkpoint, events)  # type: ignore[arg-type]  # Accepted comes first and once

    async def _events(self, answer: Answer) -> AsyncGenerator[Accepted | TokenEvent | FinishEvent, None]:
        whole = False
        try:
            async for event in answer.events():
                if isinstance(event, FinishEvent):
                    self.metrics.finished(event)
                yield event
            whole = True
        except MacpipeError as e:
            self.metrics.ended(e)
            whole = True
            raise
        finally:
            if not whole:
                answer.abandon()
                self.metrics.abandoned()
