"""Collects the events of answers, and encodes the parts that several HTTP endpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from cluster.api.http.reasoning_counter import ReasoningCounter
from cluster.api.request_service import RunningRequest
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_COLLECTED_BYTES, MIB
from cluster.core.request import FinishEvent, PromptLogprobs, TokenEvent, Usage
from cluster.transport.byte_budget import Charge

EncodeRow: TypeAlias = Callable[[RunningRequest, TokenEvent], tuple[str, ...]]
_VALUE_BYTES: Final = 64
"""Bytes charged for each log-probability of a prompt in each sample: its text, its number and their JSON."""


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

    ``parts`` holds the same text and calls in the order of generation. ``rows`` holds the JSON of the content's
    log-probabilities by token, if they were requested, and ``offsets`` the character at which each token's text begins.
    ``reasoning_counter`` counts the reasoning tokens.
    """

    reasoning_counter: ReasoningCounter
    text: str = ""
    reasoning: str = ""
    calls: list[GeneratedCall] = field(default_factory=list)
    parts: list[AnswerPart] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: FinishEvent | None = None

    def add(self, event: TokenEvent | FinishEvent) -> None:
        """Add the next event of this sample, without its log-probabilities."""
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

    def add_row(self, row: tuple[str, ...]) -> None:
        """Add the log-probabilities of the next token, before its text is added."""
        self.rows.append(row)
        self.offsets.append(len(self.text))

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
    return [ReasoningCounter(running.model_info.tokenizer.reasoning_end) for _ in range(running.request.samples)]


async def collect_answers(
    running: RunningRequest,
    charge: Charge,
    encode: EncodeRow | None = None,
    prompt: Callable[[PromptLogprobs], object] | None = None,
) -> list[CollectedAnswer]:
    """Read the answer to its end and return every sample. Raises the error that ended it early.

    ``encode`` returns the JSON of a token's log-probabilities; without it they are dropped. ``prompt`` is called with
    each piece of the prompt's log-probabilities, if the request asks for these; the end-of-sequence token then has a
    row too. All that is held is charged to ``charge``: raises ``Busy`` if requests of all clients hold too much,
    ``InvalidRequest`` if this one alone does.
    """
    answers = [CollectedAnswer(count) for count in reasoning_counters(running)]
    async with aclosing(running.all_events) as events:
        async for event in events:
            if isinstance(event, PromptLogprobs):
                values = len(event.logprobs) + len(event.top_tokens)
                charge_answer(charge, running.request.samples * values * _VALUE_BYTES)
                if prompt:
                    prompt(event)
                continue
            row: tuple[str, ...] = ()
            token = _scored_token(event, end=prompt is not None)
            if encode and token:
                row = encode(running, token)
                answers[event.sample].add_row(row)
            texts = (event.text, event.reasoning, *row, *(call.arguments for call in event.calls))
            charge_answer(charge, sum(map(held_size, texts)))
            answers[event.sample].add(event)
    return answers


def _scored_token(event: TokenEvent | FinishEvent, *, end: bool) -> TokenEvent | None:
    """Return the token whose log-probabilities an event adds. ``end``: the end-of-sequence token is one."""
    if isinstance(event, FinishEvent):
        return event.end if end else None
    return event if is_content(event) else None


def held_size(text: str) -> int:
    """Return the bytes to charge for a text: Python's, and as many for its JSON."""
    return len(text) * (2 if text.isascii() else 6)


def charge_answer(charge: Charge, size: int) -> None:
    """Charge ``size`` bytes of an answer that is collected. Raises as ``collect_answers`` does."""
    if charge.size + size > MAX_COLLECTED_BYTES:
        raise InvalidRequest(
            f"the answer needs more than {MAX_COLLECTED_BYTES // MIB} MiB; stream it, or ask for fewer samples, tokens "
            "or alternatives",
            field="max_tokens",
        )
    charge.add(size)


def sum_usage(finishes: Iterable[FinishEvent | None]) -> Usage:
    """Return the usage of all samples of one prompt. The prompt is processed once, so it is counted once."""
    usages = [f.usage for f in finishes if f]
    completion = sum(u.completion_tokens for u in usages)
    first = usages[0] if usages else Usage(0, 0)
    accepted = sum(u.accepted_prediction_tokens for u in usages)
    rejected = sum(u.rejected_prediction_tokens for u in usages)
    return Usage(first.prompt_tokens, completion, first.cached_tokens, accepted, rejected)


def add_usage(a: Usage, b: Usage) -> Usage:
    """Return the usage of two prompts together."""
    return Usage(
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.cached_tokens + b.cached_tokens,
        a.accepted_prediction_tokens + b.accepted_prediction_tokens,
        a.rejected_prediction_tokens + b.rejected_prediction_tokens,
    )


def openai_usage(usage: Usage, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """Return the ``usage`` object. ``reasoning_tokens`` None omits the details of the answer, as for completions."""
    details = {
        "reasoning_tokens": reasoning_tokens,
        "accepted_prediction_tokens": usage.accepted_prediction_tokens,
        "rejected_prediction_tokens": usage.rejected_prediction_tokens,
    }
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **({} if reasoning_tokens is None else {"completion_tokens_details": details}),
    }
