"""Fits a conversation to what a model's chat template accepts, without losing or moving any of its text.

The result depends only on the messages and the template. A conversation that grows at its end keeps its beginning, so
that a kept prefix stays valid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from cluster.core.errors import InvalidRequest
from cluster.core.request import ChatMessage
from cluster.model.template_abilities import SHORT_ID_CHARS, CallForm, TemplateAbilities

__all__ = ["fit_messages", "message_fields"]

BETWEEN: Final = "\n\n"
"""Separates texts that become one message."""


def fit_messages(messages: Sequence[ChatMessage], abilities: TemplateAbilities) -> list[ChatMessage]:
    """Return ``messages`` in an order and with roles that the template accepts.

    - Leading system messages become one; it becomes part of the first user message if the template has no system role.
    - Later system messages become user messages at their place if the template does not take them there.
    - An assistant message with several calls becomes several if the template takes one call each.
    - Neighbours of one role become one message if the template wants roles to alternate.
    """
    fitted = _fit_system(messages, abilities)
    if any(len(m.tool_calls) > 1 for m in fitted) and not abilities.takes_parallel_calls:
        fitted = list(_split_calls(fitted))
    if _repeats(fitted) and not abilities.takes_repeated_roles:
        fitted = _merge_neighbours(fitted)
    if _speaks_after_result(fitted) and not abilities.takes_user_after_result:
        fitted = _join_to_results(fitted)
    return fitted


def _fit_system(messages: Sequence[ChatMessage], abilities: TemplateAbilities) -> list[ChatMessage]:
    count = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    system = BETWEEN.join(m.content for m in messages[:count])
    rest = list(messages[count:])
    if any(m.role == "system" for m in rest) and not abilities.takes_later_system:
        rest = [replace(m, role="user") if m.role == "system" else m for m in rest]
    if not count:
        return rest
    if abilities.takes_system:
        return [replace(messages[0], content=system), *rest]
    if rest and rest[0].role == "user":
        return [replace(rest[0], content=system + BETWEEN + rest[0].content), *rest[1:]]
    return [replace(messages[0], role="user", content=system), *rest]


def _split_calls(messages: Sequence[ChatMessage]) -> Iterable[ChatMessage]:
    """Yield each call in a message of its own, followed by its result if there is one."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if len(message.tool_calls) < 2:
            yield message
            continue
        end = next((i for i in range(at, len(messages)) if messages[i].role != "tool"), len(messages))
        results = list(messages[at:end])
        at = end
        for i, call in enumerate(message.tool_calls):
            first = message if i == 0 else replace(message, content="", reasoning="")
            yield replace(first, tool_calls=(call,))
            own = [r for r in results if r.tool_call_id == call.id] if call.id else results[i : i + 1]
            results = [r for r in results if r not in own]
            yield from own
        yield from results


def _repeats(messages: Sequence[ChatMessage]) -> bool:
    return any(_mergeable(a, b) for a, b in pairwise(messages))


def _mergeable(a: ChatMessage, b: ChatMessage) -> bool:
    return a.role == b.role and a.role in ("user", "assistant") and not a.tool_calls


def _merge_neighbours(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    merged: list[ChatMessage] = []
    for message in messages:
        if merged and _mergeable(merged[-1], message):
            last = merged[-1]
            merged[-1] = replace(
                message,
                content=BETWEEN.join(filter(None, (last.content, message.content))),
                reasoning=BETWEEN.join(filter(None, (last.reasoning, message.reasoning))),
            )
        else:
            merged.append(message)
    return merged


def _speaks_after_result(messages: Sequence[ChatMessage]) -> bool:
    return any(a.role == "tool" and b.role == "user" for a, b in pairwise(messages))


def _join_to_results(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Append user messages that follow a tool's result to that result."""
    joined: list[ChatMessage] = []
    for message in messages:
        if message.role == "user" and joined and joined[-1].role == "tool":
            joined[-1] = replace(joined[-1], content=joined[-1].content + BETWEEN + message.content)
        else:
            joined.append(message)
    return joined


def message_fields(message: ChatMessage, form: CallForm) -> dict[str, Any]:
    """Return a message as templates read it, without empty fields. Raises InvalidRequest for invalid arguments."""
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        written |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning}
        written["thinking"] = message.reasoning
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "id": _call_id(c.id, form),
                "type": "function",
                "function": {"name": c.name, "arguments": _arguments(c.arguments, form)},
            }
            for c in message.tool_calls
        ]
    if message.tool_call_id:
        written["tool_call_id"] = _call_id(message.tool_call_id, form)
    if message.name:
        written["name"] = message.name
    return written


def _call_id(identity: str, form: CallForm) -> str:
    """Return ``identity``, or nine letters and digits that stand for it."""
    return hashlib.sha256(identity.encode()).hexdigest()[:SHORT_ID_CHARS] if form.short_ids else identity


def _arguments(text: str, form: CallForm) -> dict[str, Any] | str:
    try:
        arguments = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidRequest(f"the arguments of a tool call are not JSON: {error}", field="messages") from error
    if not isinstance(arguments, dict):
        raise InvalidRequest("the arguments of a tool call must be a JSON object", field="messages")
    return json.dumps(arguments, ensure_ascii=False) if form.text_arguments else arguments
