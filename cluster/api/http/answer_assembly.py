"""Whole answers, gathered from their events, and the pieces of them that every surface writes alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.api.http.reasoning_counter import ReasoningCounter
from cluster.api.request_service import RunningRequest
from cluster.core.errors import InvalidRequest
from cluster.core.request import FinishEvent, GrammarKind, TokenEvent, Usage


@dataclass(slots=True)
class Called:
    """A call of an answer, as far as it is known."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class AnswerPart:
    """A stretch of an answer of one kind: ``call`` in one, else text, of the reasoning or of the content."""

    text: str = ""
    reasoning: bool = False
    call: Called | None = None


@dataclass(slots=True)
class WholeAnswer:
    """One sample of an answer, as generated so far.

    ``parts`` holds the same text and calls in the order of generation. ``tokens`` holds the content's tokens if
    log-probabilities were requested. ``reasoned`` counts the reasoning tokens.
    """

    reasoned: ReasoningCounter
    text: str = ""
    reasoning: str = ""
    calls: list[Called] = field(default_factory=list)
    parts: list[AnswerPart] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    finish: FinishEvent | None = None

    def add(self, event: TokenEvent | FinishEvent) -> None:
        """The next event of this sample."""
        self.reasoned.add(event)
        self.text += event.text
        self.reasoning += event.reasoning
        self._say(event.reasoning, reasoning=True)
        self._say(event.text, reasoning=False)
        for delta in event.calls:
            if delta.index == len(self.calls):
                self.calls.append(Called(delta.id, delta.name))
                self.parts.append(AnswerPart(call=self.calls[-1]))
            self.calls[delta.index].arguments += delta.arguments
        if isinstance(event, FinishEvent):
            self.finish = event
            return
        if is_content(event):
            self.tokens.append(event)

    def _say(self, text: str, *, reasoning: bool) -> None:
        if not text:
            return
        if not self.parts or self.parts[-1].call or self.parts[-1].reasoning is not reasoning:
            self.parts.append(AnswerPart(reasoning=reasoning))
        self.parts[-1].text += text


def is_content(event: TokenEvent) -> bool:
    """Whether the token belongs to the content, whose log-probabilities are told: not to reasoning or a call."""
    return event.logprob is not None and not event.reasoning and not event.calls


def reasoned(running: RunningRequest) -> list[ReasoningCounter]:
    """A count of reasoning for each sample."""
    return [ReasoningCounter(running.checkpoint.tokenizer.reasoning_end) for _ in range(running.request.samples)]


async def gather_answers(running: RunningRequest) -> list[WholeAnswer]:
    """Every sample of the answer, whole. Raises what ended it instead."""
    wholes = [WholeAnswer(count) for count in reasoned(running)]
    async with aclosing(running.events) as events:
        async for event in events:
            wholes[event.sample].add(event)
    return wholes


def total(finishes: Iterable[FinishEvent | None]) -> Usage:
    """The usage of several samples of one prompt, which is read, and counted, once."""
    all_of_them = [f.usage for f in finishes if f]
    completion = sum(u.completion_tokens for u in all_of_them)
    first = all_of_them[0] if all_of_them else Usage(0, 0)
    return Usage(first.prompt_tokens, completion, first.cached_tokens)


def plus(a: Usage, b: Usage) -> Usage:
    """The usage of two prompts."""
    return Usage(
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.cached_tokens + b.cached_tokens,
    )


def openai_usage(usage: Usage, reasoned: int | None = None) -> dict[str, Any]:
    """``usage`` of chat and completions; ``reasoned`` None where there is no reasoning to count."""
    details = {} if reasoned is None else {"completion_tokens_details": {"reasoning_tokens": reasoned}}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **details,
    }


def grammar_fields(field: str) -> dict[str, str]:
    """What the intake calls the grammar of an answer, as ``field``; names for ``fields_named``."""
    return dict.fromkeys(("grammar", "response_format", *(kind.value for kind in GrammarKind)), field)


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the intake under the names that this surface's fields have; ``tools[]``: where a tool's schema is."""
    try:
        yield
    except InvalidRequest as e:
        tool = e.field.startswith("tools[") and e.field.endswith("]")
        e.field = f"{e.field}{names.get('tools[]', '')}" if tool else names.get(e.field, e.field)
        raise
