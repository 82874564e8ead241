"""Collects the events of answers, and encodes the parts that several HTTP endpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cluster.api.http.reasoning_counter import ReasoningCounter
from cluster.api.request_service import RunningRequest
from cluster.core.request import FinishEvent, PromptLogprobs, TokenEvent, Usage


@dataclass(slots=True)
class GeneratedCall:
    """A tool call of an answer, as generated so far."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class AnswerPart:
    """A contiguous part of an answer: a tool call if ``call`` is set, else text of the reasoning or the content."""

    text: str = ""
    reasoning: bool = False
    call: GeneratedCall | None = None


@dataclass(slots=True)
class CollectedAnswer:
    """One sample of an answer, as generated so far.

    ``parts`` holds the same text and calls in the order of generation. ``tokens`` holds the content's tokens if
    log-probabilities were requested. ``reasoning_counter`` counts the reasoning tokens.
    """

    reasoning_counter: ReasoningCounter
    text: str = ""
    reasoning: str = ""
    calls: list[GeneratedCall] = field(default_factory=list)
    parts: list[AnswerPart] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    finish: FinishEvent | None = None

    def add(self, event: TokenEvent | FinishEvent) -> None:
        """Add the next event of this sample."""
        self.reasoning_counter.add(event)
        self.text += event.text
        self.reasoning += event.reasoning
        self._append_text(event.reasoning, reasoning=True)
        self._append_text(event.text, reasoning=False)
        for delta in event.calls:
            if delta.index == len(self.calls):
                self.calls.append(GeneratedCall(delta.id, delta.name))
                self.parts.append(AnswerPart(call=self.calls[-1]))
            self.calls[delta.index].arguments += delta.arguments
        if isinstance(event, FinishEvent):
            self.finish = event
            return
        if is_content(event):
            self.tokens.append(event)

    def _append_text(self, text: str, *, reasoning: bool) -> None:
        if not text:
            return
        if not self.parts or self.parts[-1].call or self.parts[-1].reasoning is not reasoning:
            self.parts.append(AnswerPart(reasoning=reasoning))
        self.parts[-1].text += text


def is_content(event: TokenEvent) -> bool:
    """Return whether the token is content with a log-probability, and not part of reasoning or a tool call."""
    return event.logprob is not None and not event.reasoning and not event.calls


def reasoning_counters(running: RunningRequest) -> list[ReasoningCounter]:
    """Return a reasoning counter for each sample."""
    return [ReasoningCounter(running.checkpoint.tokenizer.reasoning_end) for _ in range(running.request.samples)]


async def collect_answers(
    running: RunningRequest, prompt: Callable[[PromptLogprobs], object] | None = None
) -> list[CollectedAnswer]:
    """Read the answer to its end and return every sample. Raises the error that ended it early.

    ``prompt`` is called with each piece of the prompt's log-probabilities, if the request asks for these.
    """
    answers = [CollectedAnswer(count) for count in reasoning_counters(running)]
    async with aclosing(running.all_events) as events:
        async for event in events:
            if not isinstance(event, PromptLogprobs):
                answers[event.sample].add(event)
            elif prompt:
                prompt(event)
    return answers


def sum_usage(finishes: Iterable[FinishEvent | None]) -> Usage:
    """Return the usage of all samples of one prompt. The prompt is processed once, so it is counted once."""
    usages = [f.usage for f in finishes if f]
    completion = sum(u.completion_tokens for u in usages)
    first = usages[0] if usages else Usage(0, 0)
    return Usage(first.prompt_tokens, completion, first.cached_tokens)


def add_usage(a: Usage, b: Usage) -> Usage:
    """Return the usage of two prompts together."""
    return Usage(
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.cached_tokens + b.cached_tokens,
    )


def openai_usage(usage: Usage, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """Return the ``usage`` object of chat and completions. ``reasoning_tokens`` None omits their count."""
    details = {} if reasoning_tokens is None else {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **details,
    }
