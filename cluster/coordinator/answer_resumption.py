"""Resume, after a restart of the coordinator, an answer from the journal: its tokens so far, and where it continues.

``Coordinator.resume`` is the caller. The answer's stream itself is made by ``live_answers``, as for a new request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from cluster.coordinator.journal import AnswerTokens, JournaledRequest
from cluster.coordinator.journal_writer import JournalWriter
from cluster.core.errors import AnswerLost, DeadlineExceeded, InvalidRequest, NotServing, RequestEnded, RequestNotFound
from cluster.core.known_tokens import KnownAnswer, KnownTokens
from cluster.core.limits import CONTROL_TIMEOUT_S
from cluster.core.request import Request


def take_request(journal: JournalWriter | None, request_id: str, client: str) -> JournaledRequest:
    """Return a request of ``client`` from the journal.

    Raises ``RequestEnded`` if it has ended, ``AnswerLost`` if only an earlier leader may have it, ``RequestNotFound``
    if the client has none with this id.
    """
    kept = journal.take(request_id, client) if journal else None
    if kept is None:
        if journal and journal.has_ended(request_id, client):
            raise RequestEnded(f"request {request_id} has ended, and its answer is not kept; send it with another id")
        if journal and journal.lacks_earlier:
            raise AnswerLost(
                f"request {request_id} cannot go on: the Mac that leads now does not have all answers of the leader "
                "before it; send the request again"
            )
        why = (
            ""
            if journal
            else (
                ": this coordinator keeps no journal; serve with --journal, or with --replicate to go on at a standby"
            )
        )
        raise RequestNotFound(f"request {request_id} has no answer that can be resumed{why}")
    return kept


class Detachable(Protocol):
    """A deployment whose live requests can be detached from their readers."""

    async def detach(self, request_id: str, client: str) -> None:
        """End a live request that its client resumes, so that the journal has it."""


async def detach_request(
    journal: JournalWriter, deployments: Iterable[Detachable], request_id: str, client: str
) -> None:
    """End a request that its client resumes while it is live: its call broke, which is not known here yet.

    Then wait until the journal has it. Raises ``DeadlineExceeded`` if that takes too long.
    """
    for deployment in deployments:
        with suppress(NotServing):
            await deployment.detach(request_id, client)
    try:
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            await asyncio.wrap_future(journal.flushed())
    except TimeoutError:
        raise DeadlineExceeded("the journal's disk does not answer, so nothing can be resumed now") from None


def resume_request(kept: JournaledRequest, known: KnownAnswer) -> tuple[Request, AnswerTokens, tuple[KnownTokens, ...]]:
    """Return the request that goes on, with the tokens of each sample, and those of them that the client already has.

    ``known`` are the tokens that the client has: of each sample, or the same of all samples. Raises ``InvalidRequest``
    for another number of samples.
    """
    tokens, skip = continue_request(kept, [sample.count for sample in known])
    request = kept.request
    if skip[0]:  # the client has tokens, and so the prompt's log-probabilities, which come first
        request = replace(request, prompt_logprobs=None)
    return request, tokens, tuple(known) * (request.samples if len(known) == 1 else 1)


def continue_request(kept: JournaledRequest, offsets: Sequence[int]) -> tuple[AnswerTokens, tuple[int, ...]]:
    """Return the tokens that each sample of a resumed request starts with, and how many of them the reader already has.

    A token that may have ended its answer is computed again. So are tokens that the reader does not have yet, if their
    log-probabilities were requested, or those of the prompt, which come first. Raises ``InvalidRequest`` unless there
    is one offset, or one per sample.
    """
    request = kept.request
    skip = tuple(offsets) * (request.samples if len(offsets) == 1 else 1)
    if len(skip) != request.samples:
        raise InvalidRequest(
            f"got {len(skip)} offsets for {request.samples} samples; give one offset, or one per sample",
            field="offsets",
        )
    last = max(request.max_tokens - 1, 0)
    scored = request.sampling.logprobs or request.prompt_logprobs is not None
    ends = [min(last, n) if scored else last for n in skip]
    return tuple(tuple(s[:end]) for s, end in zip(kept.tokens, ends, strict=True)), skip
