"""Hold the live requests of the engine loop, and their samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_text import Decoder, TextStream
from cluster.coordinator.journal import AnswerTokens
from cluster.coordinator.loop_view import AnswerProgress
from cluster.coordinator.request_timings import RequestTimings
from cluster.core.known_tokens import KnownTokens, KnownTokensCheck
from cluster.core.limits import RESUMED_TOKENS
from cluster.core.request import FinishEvent, FinishReason, Request, SkippedText, TokenEvent, Usage
from cluster.scheduler.guessing import GuessSource
from cluster.scheduler.live_requests import MovedSample
from cluster.scheduler.outcome import Produced


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
class GuessedTokens:
    """Counts the tokens of one sample that were guessed before they were sampled, and those of its prediction."""

    accepted: int = 0
    accepted_predictions: int = 0
    rejected_predictions: int = 0

    def add(self, produced: Produced) -> None:
        """Count the next token."""
        self.accepted += produced.counts and produced.guess is not None
        self.accepted_predictions += produced.guess is GuessSource.PREDICTION
        self.rejected_predictions += produced.missed is GuessSource.PREDICTION


@dataclass(slots=True)
class ActiveSample:
    """A sample that has not ended. It outlives rings: its text and its reader wait for the next ring."""

    parent: ActiveRequest
    request: Request
    sample: int
    text: TextStream
    timings: RequestTimings
    accepted_at: float
    known: KnownTokensCheck
    """The tokens that the reader already has, and that are not sent again."""
    replays: int = 0
    """Number of rings lost since its last token."""
    guesses: GuessedTokens = field(default_factory=GuessedTokens)

    def progress(self, now: float) -> AnswerProgress:
        """Return how far the answer is."""
        timings = self.timings
        return AnswerProgress(
            now - self.accepted_at, self.guesses.accepted, timings.tokens_per_second, timings.figures()
        )

    def send_token(self, produced: Produced) -> bool:
        """Send a token to the reader, unless it already has it. Return False if the reader is too far behind.

        Raises ``AnswerDiffers`` if the reader has other tokens.
        """
        index, sampled = produced.index, produced.sample
        text = self.text.add(sampled.token)
        if self.known.is_known(sampled.token):
            if skipped := skipped_text(self.request, self.sample, text):
                self.parent.answer.put_uncounted(skipped)
            return True
        stages = self.timings.lap() if self.request.stage_timings else ()
        return self.parent.answer.put(
            TokenEvent(
                index,
                sampled.token,
                text,
                sampled.logprob,
                sampled.top,
                sample=self.sample,
                stages=stages,
                cached_tokens=produced.cached,
                guess=produced.guess or "",
                state=sampled.state,
            )
        )

    def finish(self, reason: FinishReason, usage: Usage) -> FinishEvent:
        """Return the answer's last event, with the text held back so far."""
        rest = self.text.flush()
        if self.text.stopped:
            reason = FinishReason.STOP
        ttft, tpot, figures = self.timings.ttft_ms, self.timings.tpot_ms, self.timings.figures()
        return FinishEvent(reason, rest, usage, ttft, tpot, figures, sample=self.sample, stop=self.text.stopped_by)


def skipped_text(request: Request, sample: int, text: str) -> SkippedText | None:
    """Return the event of a token that the reader already has; None unless it needs the text to parse the answer."""
    return SkippedText(sample, text) if request.parsing is not None and text else None


@dataclass(frozen=True, slots=True)
class MovedRequest:
    """A live request on its way to another engine loop.

    ``samples`` are its live ones, each with what the scheduler of that loop needs. ``tokens`` and ``known`` are as in
    ``EngineLoop.submit``, for a request that has no live sample yet.
    """

    request: Request
    answer: AnswerQueue
    samples: tuple[tuple[ActiveSample, MovedSample], ...] = ()
    tokens: AnswerTokens = ()
    known: tuple[KnownTokens, ...] = ()


class ResumedRequest:
    """A resumed request while the tokens of an earlier coordinator are decoded, ``RESUMED_TOKENS`` in each step.

    ``tokens`` and ``known`` are as in ``EngineLoop.submit``. ``texts``, ``checks`` and ``events`` are for the live
    samples: the state of their decoders and of the comparison with what their reader has, and the tokens that it lacks.
    """

    def __init__(
        self,
        request: Request,
        answer: AnswerQueue,
        tokens: AnswerTokens,
        known: tuple[KnownTokens, ...],
        decoder: Callable[[], Decoder],
    ) -> None:
        self.request, self.answer, self.tokens, self.known = request, answer, tokens, known
        self.checks = [KnownTokensCheck(one) for one in known or (KnownTokens(0),) * request.samples]
        self.texts = [TextStream(decoder(), request.stop) for _ in range(request.samples)]
        self.events: list[list[TokenEvent | SkippedText]] = [[] for _ in range(request.samples)]
        self._left = chain.from_iterable(
            ((sample, index, token) for index, token in enumerate(known)) for sample, known in enumerate(tokens)
        )

    def decode(self) -> bool:
        """Decode the next tokens. Return whether there are more. Raises ``AnswerDiffers`` if the reader has others."""
        few = list(islice(self._left, RESUMED_TOKENS))
        for sample, index, token in few:
            text = self.texts[sample].add(token)
            if not self.checks[sample].is_known(token):
                self.events[sample].append(TokenEvent(index, token, text, sample=sample))
            elif skipped := skipped_text(self.request, sample, text):
                self.events[sample].append(skipped)
        return bool(few)
