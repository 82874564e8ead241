"""Submits requests for gRPC and HTTP, streams their events, and counts their outcomes.

A request ends when its events are no longer read.

A token passes at most three async generators on its way from the engine loop to a socket. ``AnswerQueue`` is none. The
first is ``RequestService._events``. Over gRPC follow the servicer's method and ``MessageBounds``; over HTTP only the
merge of several prompts' answers, since ``EventStream`` sends what its encoder returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import anyio

from cluster.api.key_usage import KeyUsage, has_key, revoked_error
from cluster.api.metrics import Metrics
from cluster.api.parsed_answers import ParsedAnswers
from cluster.api.tool_schema_errors import find_invalid_tool
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_resumption import detach_request, take_request
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.frame_history import trace_request
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.on_demand import OnDemand
from cluster.core.errors import ClusterDamaged, InvalidGrammar, MacpipeError, RequestNotFound
from cluster.core.known_tokens import KnownAnswer
from cluster.core.limits import KEY_CHECK_S, PROMPT_PIECE_TOKENS
from cluster.core.request import Accepted, FinishEvent, PromptLogprobs, Request, SkippedText, TokenEvent
from cluster.core.request_trace import RequestTrace
from cluster.transport.byte_budget import ByteBudget

log = logging.getLogger(__name__)
Events = AsyncGenerator[TokenEvent | FinishEvent, None]
PromptAndAnswerEvents = AsyncGenerator[PromptLogprobs | TokenEvent | FinishEvent, None]


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """An accepted request. Read its ``events``, or ``all_events``, to the end, or close them.

    ``all_events`` begin with the log-probabilities of the prompt, if the request asks for these.
    """

    request: Request
    model_info: ModelInfo
    all_events: PromptAndAnswerEvents

    @property
    def events(self) -> Events:
        """The events of a request that does not ask for log-probabilities of its prompt."""
        assert self.request.prompt_logprobs is None
        return self.all_events  # type: ignore[return-value]  # then there are no others


class RequestService:
    """The requests of one coordinator.

    ``key_usage`` is the usage of its API keys; None without a cluster. ``on_demand`` loads the models that requests ask
    for; None if only people load models. ``strict``: fields of a request that have no effect are errors, and no answer
    is shortened to what fits.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        metrics: Metrics,
        key_usage: KeyUsage | None = None,
        *,
        on_demand: OnDemand | None = None,
        strict: bool = False,
    ) -> None:
        self.strict = strict
        self.on_demand = on_demand
        self.coordinator = coordinator
        self.metrics = metrics
        self.key_usage = key_usage
        self.bodies = ByteBudget()
        """The bytes held by all requests, gRPC and HTTP together."""
        self._live: dict[AnswerQueue, Request] = {}
        """The live requests by their answers: an id is read twice if its client resumes it before its call broke."""
        self._answered: set[str] = set()
        """The clients with a key of whose answers something may be kept."""

    async def submit(self, request: Request, model_info: ModelInfo) -> RunningRequest:
        """Submit a request. Return once it has a lane or a place in the queue.

        Raises ``Unauthenticated`` or ``LimitReached`` for its key, ``InvalidGrammar``, or the error with which the
        coordinator rejects it.
        """
        with self._count_errors():
            if self.key_usage:
                self.key_usage.charge_prompt(request.client, len(request.prompt))
            try:
                answer = await self.coordinator.accept(request, model_info)
            except InvalidGrammar as e:
                raise await find_invalid_tool(e, request, model_info, self.coordinator) from None
        return await self._wait_accepted(request, answer, model_info)

    async def resume(self, request_id: str, known: KnownAnswer, client: str) -> RunningRequest:
        """Resume an answer from the journal behind the tokens of each sample that the client has.

        Its model is loaded first, if it may be loaded on demand. Raises the errors of the load and the coordinator.
        """
        with self._count_errors():
            if journal := self.coordinator.journal:
                await detach_request(journal, self.coordinator.deployments.values(), request_id, client)
            async with self._hold_answerer(request_id, client):
                with self.coordinator.deployments.lead_change.renamed_errors():
                    request, model_info, answer = self.coordinator.resume(request_id, known, client)
        return await self._wait_accepted(request, answer, model_info)

    @asynccontextmanager
    async def _hold_answerer(self, request_id: str, client: str) -> AsyncIterator[None]:
        """Keep the model that began an answer loaded within the block."""
        if self.on_demand is None or not self.on_demand.enabled:
            yield
            return
        name = take_request(self.coordinator.journal, request_id, client).answerer.deployment
        if self.coordinator.catalog.get(name) is None:
            yield
            return
        async with self.on_demand.hold(name, wait_s=self.on_demand.load_wait_s):
            yield

    async def abort(self, request_id: str, client: str | None) -> None:
        """End a live request of ``client``; of any client if None. Raises ``RequestNotFound``."""
        if client is not None and (request_id, client) not in ((one.id, one.client) for one in self._live.values()):
            raise RequestNotFound(f"you have no live request with the id {request_id}; it may have ended")
        await self.coordinator.abort(request_id)

    async def trace(self, request_id: str, client: str | None) -> RequestTrace:
        """Return the trace of a request of ``client``; of any client if None. "" as the id means the newest one.

        Raises ``RequestNotFound`` if the coordinator does not remember it, and the coordinator's errors.
        """
        frames = await self.coordinator.copy_frames()
        trace = await anyio.to_thread.run_sync(trace_request, frames, request_id, client)
        if trace is None:
            which = f"of request {request_id}" if request_id else "of any request of yours"
            raise RequestNotFound(
                f"no trace {which}: it may be another client's, or from before the model was loaded; ids of live"
                " requests are in `macpipe ps`"
            )
        return trace

    async def end_revoked(self) -> None:
        """End live requests whose key was revoked, every ``KEY_CHECK_S`` seconds, and drop what is kept of its answers.

        Never returns if there are keys.
        """
        while self.key_usage:
            await asyncio.sleep(KEY_CHECK_S)
            try:
                revoked = self.key_usage.revoked(self._answered)
            except ClusterDamaged as e:  # rejects new requests too; live ones were authorized before
                log.error("keys: cannot check for revoked keys reason=%s", e.sentence)
                continue
            for request_id in {one.id for one in self._live.values() if one.client in revoked}:
                with suppress(RequestNotFound, MacpipeError):
                    await self.coordinator.abort(request_id)
            for client in revoked:  # after its answers have ended, so that none of them is kept
                self.coordinator.forget_client(client)
            self._answered -= revoked - {one.client for one in self._live.values()}

    @contextmanager
    def _count_errors(self) -> Iterator[None]:
        try:
            yield
        except MacpipeError as e:
            self.metrics.count_error(e)
            raise

    async def _wait_accepted(self, request: Request, answer: AnswerQueue, model_info: ModelInfo) -> RunningRequest:
        events = self._events(request, answer, ParsedAnswers(request, model_info))
        try:
            first = await anext(events)
        except BaseException:
            answer.abandon()
            raise
        assert isinstance(first, Accepted)
        return RunningRequest(request, model_info, events)  # type: ignore[arg-type]  # Accepted comes first and once

    async def _events(
        self, request: Request, answer: AnswerQueue, answers: ParsedAnswers
    ) -> AsyncGenerator[Accepted | PromptLogprobs | TokenEvent | FinishEvent, None]:
        ended = False
        unfinished = request.samples
        self._live[answer] = request
        if has_key(request.client):
            self._answered.add(request.client)
        try:
            with self.coordinator.deployments.lead_change.renamed_errors():
                async for event in answer:
                    if isinstance(event, PromptLogprobs):
                        for piece in event.split(PROMPT_PIECE_TOKENS):
                            yield piece
                            await asyncio.sleep(0)  # others get their turn between two pieces
                        continue
                    if isinstance(event, SkippedText):
                        await answers.skip(event)
                        continue
                    event = await answers.parse(event)
                    self._count(event, request.client)
                    unfinished -= isinstance(event, FinishEvent)
                    ended = not unfinished  # clients may hang up on reading the last event
                    yield event
        except MacpipeError as e:
            self.metrics.count_error(e)
            ended = True
            if self.key_usage and self.key_usage.is_revoked(request.client):
                raise revoked_error() from e
            raise
        finally:
            self._live.pop(answer, None)
            if not ended:
                answer.abandon()
                self.metrics.count_abandoned()

    def _count(self, event: Accepted | TokenEvent | FinishEvent, client: str) -> None:
        if isinstance(event, FinishEvent):
            self.metrics.count_finished(event)
        elif self.key_usage and isinstance(event, TokenEvent):
            self.key_usage.charge_tokens(client, 1)
