"""The coordinator's side of answers without stages: the engine loop's own code is given the tokens of an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.answer_text import Decoder
from cluster.coordinator.frame_history import FrameHistory
from cluster.coordinator.live_answers import LiveAnswers
from cluster.core.errors import MacpipeError
from cluster.core.frames import Sample
from cluster.core.known_tokens import KnownTokens
from cluster.core.plan import LayerRange, ModelRef, PlannedStage, StageSpec
from cluster.core.request import FinishReason, Request, TopLogprob
from cluster.scheduler.outcome import Outcome, Produced

STAGES = (PlannedStage(StageSpec(1, 0, 1, ModelRef("m", "", "f"), LayerRange(0, 1), 10), "ada", 0, 0),)


class _AnyRequest:
    """A scheduler that takes every request."""

    def submit(self, *samples: Request, answers: object) -> tuple[()]:
        return ()

    def end(self, sample: str) -> None: ...


class Generation:
    """One request whose tokens the caller makes up. Its events come to ``answer`` with ``deliver``."""

    def __init__(self, request: Request, decoder: Callable[[], Decoder]) -> None:
        self._post = EventBatch()
        self._steps = deque[Callable[[], None]]()
        self.answer = AnswerQueue(self._post, samples=request.samples)
        self._live = LiveAnswers(_AnyRequest(), lambda: None, self._steps.append, decoder, lambda: 0.0, FrameHistory())  # type: ignore[arg-type]
        self._request = request
        self._ids = [request.id, *(f"{request.id}#{i}" for i in range(1, request.samples))]
        self._counts = [0] * request.samples

    def begin(self, said: Sequence[Sequence[int]] = (), known: tuple[KnownTokens, ...] = ()) -> Iterator[None]:
        """Accept the request, step by step.

        An earlier coordinator has produced the tokens ``said``; those in ``known`` were read.
        """
        self._live.open(self._request, self.answer, tuple(map(tuple, said)), known, lambda: STAGES)
        for sample, tokens in enumerate(said):
            self._counts[sample] = len(tokens)
        while self._steps:
            yield
            self._steps.popleft()()

    def say(self, token: int, top: tuple[TopLogprob, ...] = ()) -> None:
        """Sample ``token`` for every sample that goes on."""
        logprob = -1.0 if self._request.sampling.logprobs else None
        for sample in range(len(self._ids)):
            self._produce(sample, Sample(0, 0, token, logprob, top), None)
            self._counts[sample] += 1

    def end(self, reason: FinishReason = FinishReason.STOP) -> None:
        """End every sample; with ``FinishReason.STOP`` by an end-of-sequence token."""
        for sample in range(len(self._ids)):
            self._produce(sample, Sample(0, 0, 0), reason)

    def fail(self, error: MacpipeError) -> None:
        """End the request with an error."""
        self._live.end(self._request.id, error)

    def deliver(self) -> None:
        """Let the reader see all events so far."""
        self._post.deliver()

    @property
    def unread(self) -> int:
        """Events that were delivered and not read."""
        return self.answer._written - self.answer._read

    def _produce(self, sample: int, sampled: Sample, finish: FinishReason | None) -> None:
        request_id = self._ids[sample]
        token = Produced(request_id, self._counts[sample], sampled, finish, counts=finish is None, cached=0)
        self._live.handle(Outcome((request_id,), (), 0.0, (token,)), 0.0, STAGES)
