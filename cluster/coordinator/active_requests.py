"""Hold the live requests of the engine loop, and their samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_text import TextStream
from cluster.coordinator.request_timings import RequestTimings
from cluster.core.frames import Sample
from cluster.core.request import FinishEvent, FinishReason, Request, SkippedText, TokenEvent, Usage


def split_samples(request: Request) -> tuple[Request, ...]:
    """Return one request per sample, with ids ``ID``, ``ID#1``, ... Sample 0 equals a request for one sample."""
    return (request, *(_sample(request, i) for i in range(1, request.samples)))


def _sample(request: Request, index: int) -> Request:
    """Derive a sample's request.

    Its seed is the upper 63 bits of BLAKE2b-64 of (seed, index), both as unsigned little-endian 64-bit integers. The
    prompt is the same for all, so only sample 0 reports its log-probabilities.
    """
    seed_and_index = b"".join(n.to_bytes(8, "little") for n in (request.sampling.seed, index))
    digest = hashlib.blake2b(seed_and_index, digest_size=8, person=b"macpipe.sample").digest()
    sampling = replace(request.sampling, seed=int.from_bytes(digest, "little") >> 1)
    return replace(request, id=f"{request.id}#{index}", sampling=sampling, prompt_logprobs=None)


@dataclass(slots=True)
class ActiveRequest:
    """A client's request and the ids of its live samples. If one sample fails, all end."""

    request: Request
    answer: AnswerQueue
    live: set[str] = field(default_factory=set)


@dataclass(slots=True)
class ActiveSample:
    """A sample that has not ended. It outlives rings: its text and its reader wait for the next ring."""

    parent: ActiveRequest
    request: Request
    sample: int
    text: TextStream
    timings: RequestTimings
    accepted_at: float
    skip: int = 0
    """Number of tokens that the reader already has, and that are not sent again."""
    replays: int = 0
    """Number of rings lost since its last token."""

    def send_token(self, index: int, sampled: Sample, cached: int = 0) -> bool:
        """Send a token to the reader, unless the reader already has it. Return False if the reader is too far behind.

        ``cached`` is the number of prompt tokens that came from a kept prefix.
        """
        event = self._event(index, sampled, cached)
        return self._skip(event) or self.parent.answer.put(event)

    def resend_tokens(self, tokens: Iterable[int]) -> None:
        """Send the tokens that a previous coordinator produced, except those that the reader already has."""
        for index, token in enumerate(tokens):
            event = self._event(index, Sample(0, 0, token))
            if not self._skip(event):
                self.parent.answer.put_uncounted(event)

    def _skip(self, event: TokenEvent) -> bool:
        """Return whether the reader already has the token. If it parses the answer, it still needs the text."""
        if event.index >= self.skip:
            return False
        if self.request.parsing is not None and event.text:
            self.parent.answer.put_uncounted(SkippedText(self.sample, event.text))
        return True

    def _event(self, index: int, sampled: Sample, cached: int = 0) -> TokenEvent:
        return TokenEvent(
            index,
            sampled.token,
            self.text.add(sampled.token),
            sampled.logprob,
            sampled.top,
            sample=self.sample,
            stages=self.timings.lap() if self.request.stage_timings else (),
            cached_tokens=cached,
        )

    def finish(self, reason: FinishReason, usage: Usage) -> FinishEvent:
        """Return the answer's last event, with the text held back so far."""
        rest = self.text.flush()
        if self.text.stopped:
            reason = FinishReason.STOP
        ttft, tpot, figures = self.timings.ttft_ms, self.timings.tpot_ms, self.timings.figures()
        return FinishEvent(reason, rest, usage, ttft, tpot, figures, sample=self.sample, stop=self.text.stopped_by)
