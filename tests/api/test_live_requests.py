"""Which requests are live, and which follow to the next leader.

A client that resumes a request reads another answer, and the old one's reader may end later.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.requests import Request as HttpRequest

from cluster.api.http.chat_submission import submit_prepared
from cluster.api.http.passed_answer import PASSED, KnownPart, PassedAnswer
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.lead_change import LeadChange
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import NotLeader, NotServing, RequestNotFound
from cluster.core.known_tokens import KnownTokens
from cluster.core.request import Accepted, Request, SamplingParams, TokenEvent
from fuzz.targets.asked import served
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio

REQUEST = Request("a", (1,), SamplingParams(), 9, resumable=True, client="ada")


class Accepting(WorkerlessCoordinator):
    """A coordinator whose answers have one token, and do not end. It keeps the ids of requests that it aborts."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.lead_change = LeadChange()

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        return self._answer()

    def resume(self, request_id: str, known: object, client: str) -> tuple[Request, ModelInfo, AnswerQueue]:
        if request_id == "unknown":
            raise RequestNotFound("request unknown has no answer that can be resumed")
        if request_id != REQUEST.id:
            raise NotServing("no model is loaded")
        return REQUEST, served(), self._answer()

    def _answer(self) -> AnswerQueue:
        batch = EventBatch()
        answer = AnswerQueue(batch)
        answer.put(Accepted())
        answer.put(TokenEvent(0, 5, "a"))
        batch.deliver()
        self.answer = answer
        return answer

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


async def test_a_late_end_of_a_broken_call_leaves_the_resumed_request_live() -> None:
    """So its client can abort it, and it ends if its key is revoked."""
    coordinator: Any = Accepting()
    service = RequestService(coordinator, Metrics())
    broken = await service.submit(REQUEST, served())
    resumed = await service.resume("a", (KnownTokens(0),), "ada")
    assert isinstance(await anext(broken.events), TokenEvent)
    await broken.events.aclose()
    await service.abort("a", "ada")
    assert coordinator.aborted == ["a"]
    with pytest.raises(RequestNotFound, match="no live request"):
        await service.abort("a", "bob")
    await resumed.events.aclose()
    with pytest.raises(RequestNotFound, match="no live request"):
        await service.abort("a", "ada")


async def test_answers_that_lose_their_model_as_the_leader_stops_go_on_at_the_next_one() -> None:
    """Say, while they move from one replica to another, which is closed before they arrive."""
    coordinator: Any = Accepting()
    service = RequestService(coordinator, Metrics())
    running = await service.submit(REQUEST, served())
    assert isinstance(await anext(running.events), TokenEvent)
    coordinator.lead_change.end(NotLeader("bob leads now"))
    coordinator.answer.fail(NotServing("the model is no longer served; send the request again"))
    with pytest.raises(NotLeader, match="bob leads now"):
        await anext(running.events)
    with pytest.raises(NotLeader, match="bob leads now"):
        await service.resume("b", (KnownTokens(0),), "ada")


async def test_a_passed_request_that_no_journal_has_is_answered_anew_unless_its_client_has_some_of_the_answer() -> None:
    """Its stream may have begun as it waited for its model, at a leader that was lost before it accepted it."""
    coordinator: Any = Accepting()
    service, prepared = RequestService(coordinator, Metrics()), replace(REQUEST, id="unknown")

    def passed(*parts: int) -> HttpRequest:
        known = {part: KnownPart(2, b"") for part in parts}
        return HttpRequest({"type": "http", PASSED: PassedAnswer("unknown", 0.0, resumed=True, known=known)})

    for begun in ((), (0,)):
        running = await submit_prepared(service, passed(*begun), prepared, served())
        assert running.request.resumable
        await running.events.aclose()
    with pytest.raises(RequestNotFound):
        await submit_prepared(service, passed(0, 1), prepared, served())
