"""A request goes to a replica whose loop makes an offer in time."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.router import Router
from cluster.core.cluster_state import ServingState
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.routing import Offer

pytestmark = pytest.mark.anyio


class MemoryLoop:
    """A loop that makes the same offer for each request, or none as long as it is stuck."""

    def __init__(self, unread: int = 0) -> None:
        self._unread = unread

    def make_offer(self, request: Request) -> Future[Offer]:
        future: Future[Offer] = Future()
        if self._unread:
            future.set_result(Offer(0, self._unread, 0))
        return future


class MemoryReplica:
    """A replica that serves, and whose service is replaced when its model is loaded again."""

    holder, live, state = "m", 0, ServingState.SERVING

    def __init__(self, loop: MemoryLoop) -> None:
        self.loop = loop
        self.got: list[str] = []

    @property
    def service(self) -> MemoryReplica:
        return self

    def submit(self, request: Request) -> AnswerQueue:
        self.got.append(request.id)
        return AnswerQueue(EventBatch())


async def test_a_replica_whose_loop_was_stuck_is_asked_again_once_it_has_another_loop() -> None:
    first, copy = MemoryReplica(MemoryLoop()), MemoryReplica(MemoryLoop(9_000))
    replicas: Any = (first, copy)
    router = Router(lambda: replicas)
    for name in ("a", "b"):
        await router.submit(Request(name, (1,), SamplingParams(), 1))
    assert (first.got, copy.got) == ([], ["a", "b"])
    first.loop = MemoryLoop(10)
    await router.submit(Request("c", (1,), SamplingParams(), 1))
    assert first.got == ["c"]
