"""The requests that the engine loop is answering, and their samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_text import AnswerText
from cluster.coordinator.request_timings import RequestTimings
from cluster.core.frames import Sample
from cluster.core.request import FinishEvent, FinishReason, Request, TokenEvent, Usage


def split_samples(request: Request) -> tuple[Request, ...]:
    """One request a sample, ``ID``, ``ID#1`` and so on. Sample 0 is what one alone would be."""
    return (request, *(_sample(request, i) for i in range(1, request.samples)))


def _sample(request: Request, index: int) -> Request:
    """Its seed is BLAKE2b-64 of (seed, index), both as unsigned little-endian 64-bit integers."""
    given = b"".join(n.to_bytes(8, "little") for n in (request.sampling.seed, index))
    digest = hashlib.blake2b(given, digest_size=8, person=b"macpipe.sample").digest()
    sampling = replace(request.sampling, seed=int.from_bytes(digest, "little") >> 1)
    return replace(request, id=f"{request.id}#{index}", sampling=sampling)


@dataclass(slots=True)
class ActiveRequest:
    """A client's request with the samples of it that are live, by their ids. They end together where one fails."""

    request: Request
    answer: AnswerQueue
    live: set[str] = field(default_factory=set)


@dataclass(slots=True)
class ActiveSample:
    """A sample of a request that has not ended. It outlives rings: its text and its reader wait for the next one."""

    asked: ActiveRequest
    request: Request
    sample: int
    text: AnswerText
    tally: RequestTimings
    accepted_at: float
    skip: int = 0
    """Tokens of the answer that its reader has already."""
    replays: int = 0
    """Rings that were lost since its last token."""

    def say(self, index: int, picked: Sample, cached: int = 0) -> bool:
        """Tell the reader a token, unless it has that already; False where it is too far behind.

        ``cached`` tokens of the prompt were kept from before.
        """
        event = self._event(index, picked, cached)
        return index < self.skip or self.asked.answer.put(event)

    def say_again(self, tokens: Iterable[int]) -> None:
        """Tell the reader what a coordinator before this one had said, as far as it has not heard it."""
        for index, token in enumerate(tokens):
            event = self._event(index, Sample(0, 0, token))
            if index >= self.skip:
                self.asked.answer.repeat(event)

    def _event(self, index: int, picked: Sample, cached: int = 0) -> TokenEvent:
        said = self.text.add(picked.token)
        return TokenEvent(
            index,
            picked.token,
            said.text,
            picked.logprob,
            picked.top,
            reasoning=said.reasoning,
            calls=said.calls,
            sample=self.sample,
            stages=self.tally.lap() if self.request.stage_timings else (),
            cached_tokens=cached,
        )

    def finish(self, reason: FinishReason, usage: Usage) -> FinishEvent:
        """The answer's end, with what was still held back."""
        rest, reason = self.text.finish(reason)
        ttft, tpot, figures = self.tally.ttft_ms, self.tally.tpot_ms, self.tally.figures()
        finish = FinishEvent(reason, rest.text, usage, ttft, tpot, figures, rest.reasoning, rest.calls, self.sample)
        return replace(finish, stop=self.text.stopped_by)
