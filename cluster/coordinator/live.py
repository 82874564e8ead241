"""What the engine loop keeps of a request beside the scheduler's own record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.coordinator.samples import Asked
from cluster.coordinator.tally import Tally
from cluster.coordinator.text import Speech
from cluster.frames import Sample
from cluster.types import FinishEvent, FinishReason, Request, TokenEvent, Usage


@dataclass(slots=True)
class Live:
    """A sample of a request that has not ended. It outlives rings: its text and its reader wait for the next one."""

    asked: Asked
    request: Request
    sample: int
    text: Speech
    tally: Tally
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

    def finished(self, reason: FinishReason, usage: Usage) -> FinishEvent:
        """The answer's end, with what was still held back."""
        rest, reason = self.text.finish(reason)
        ttft, tpot, figures = self.tally.ttft_ms, self.tally.tpot_ms, self.tally.figures()
        finish = FinishEvent(reason, rest.text, usage, ttft, tpot, figures, rest.reasoning, rest.calls, self.sample)
        return replace(finish, stop=self.text.stopped_by)
