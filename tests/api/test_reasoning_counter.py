"""The reasoning tokens of an answer are counted."""

from __future__ import annotations

from cluster.api.http.reasoning_counter import ReasoningCounter
from cluster.core.request import FinishEvent, FinishReason, TokenEvent, ToolCallDelta, Usage

END = (8, 9)


def counted(*events: TokenEvent | FinishEvent, end: tuple[int, ...] = END) -> int:
    count = ReasoningCounter(end)
    for event in events:
        count.add(event)
    return count.tokens


def token(number: int, text: str = "", reasoning: str = "", calls: tuple[ToolCallDelta, ...] = ()) -> TokenEvent:
    return TokenEvent(0, number, text, reasoning=reasoning, calls=calls)


def finish(text: str = "", reasoning: str = "") -> FinishEvent:
    return FinishEvent(FinishReason.LENGTH, text, Usage(1, 9), 0.0, 0.0, reasoning=reasoning)


CALL = (ToolCallDelta(0, "call_1", "f"),)
THOUGHT = (token(1), token(2, reasoning="é"), token(3), token(4, reasoning=" so"))
"""A token that is a part of a character, and one that may become a mark, show nothing."""


def test_tokens_that_show_nothing_count_as_well() -> None:
    assert counted(*THOUGHT, token(8), token(9), token(5, "yes"), token(6, " no"), finish()) == 6
    assert counted(*THOUGHT, token(8), token(9, "yes"), finish()) == 5
    assert counted(*THOUGHT, finish()) == 4, "cut off within it"
    assert counted(token(1), token(2), finish(reasoning="é")) == 2, "known at the end alone"


def test_content_and_calls_do_not_count_however_late_they_show() -> None:
    assert counted(*THOUGHT, token(8), token(9), token(5), token(6), token(7, calls=CALL), finish()) == 6
    assert counted(*THOUGHT, token(8), token(9), token(5), finish("<tool_call>{")) == 6
    assert counted(*THOUGHT, token(5, "yes"), token(6), end=()) == 4


def test_without_reasoning_nothing_counts() -> None:
    assert counted(token(1), token(2, "yes"), token(3), finish()) == 0
    assert counted(token(1, "yes"), token(8), token(9), finish()) == 0
    assert counted(token(1), token(2, calls=CALL), finish()) == 0
