"""Learns what a chat template accepts, by rendering short conversations with it.

Templates are programs without a description: one raises for a second system message, another silently drops it, a
third wants the arguments of tool calls as text. A probe renders a conversation of a few words and looks for these
words in the result. Each probe runs once, when a conversation first needs its answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

__all__ = ["CallForm", "TemplateAbilities"]

Message = dict[str, Any]
Render = Callable[[Sequence[Message]], str | None]
"""Renders messages; returns None if the template raises."""

SYSTEM: Final = "probe-system"
FIRST: Final = "probe-first"
REPLY: Final = "probe-reply"
LATER: Final = "probe-later"
ARGUMENT: Final = "probe-argument"
RESULT: Final = "probe-result"
SHORT_ID_CHARS: Final = 9
"""Length of the only call ids that templates with a rule for ids accept."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants tool calls: arguments as JSON text or as an object, ids as given or short."""

    text_arguments: bool = False
    short_ids: bool = False


class TemplateAbilities:
    """What one template accepts. ``render`` must not raise."""

    def __init__(self, render: Render) -> None:
        self._render = render

    @cached_property
    def takes_system(self) -> bool:
        """Whether a first system message reaches the prompt."""
        return self._shows(({"role": "system", "content": SYSTEM}, _user(FIRST)), SYSTEM)

    @cached_property
    def takes_later_system(self) -> bool:
        """Whether a system message in mid-conversation reaches the prompt at its place."""
        text = self._render((_user(FIRST), _assistant(REPLY), {"role": "system", "content": SYSTEM}, _user(LATER)))
        return text is not None and -1 < text.find(REPLY) < text.find(SYSTEM) < text.find(LATER)

    @cached_property
    def takes_repeated_roles(self) -> bool:
        """Whether two messages of one role may follow each other."""
        users = self._shows((_user(FIRST), _user(LATER)), FIRST, LATER)
        return users and self._shows((_user(FIRST), _assistant(REPLY), _assistant(RESULT), _user(LATER)), REPLY, RESULT)

    @cached_property
    def takes_user_after_result(self) -> bool:
        """Whether a user message may follow a tool's result."""
        return self._shows((*self._make_calls(1, self.call_form), _user(LATER)), f"{RESULT}-0", LATER)

    @cached_property
    def call_form(self) -> CallForm:
        """The first form of tool calls that the template renders; the default if it renders none."""
        forms = (CallForm(text, short) for short in (False, True) for text in (False, True))
        default = CallForm()
        return next((form for form in forms if self._shows(self._make_calls(1, form), f"{ARGUMENT}-0")), default)

    @cached_property
    def takes_parallel_calls(self) -> bool:
        """Whether one assistant message may have several tool calls, whose results follow it."""
        return self._shows(self._make_calls(2, self.call_form), *(f"{ARGUMENT}-{i}" for i in range(2)), f"{RESULT}-1")

    def _shows(self, messages: Sequence[Message], *words: str) -> bool:
        text = self._render(messages)
        return text is not None and all(word in text for word in words)

    @staticmethod
    def _make_calls(count: int, form: CallForm) -> tuple[Message, ...]:
        ids = [f"probe{i:04d}" if form.short_ids else f"call_probe_{i}" for i in range(count)]
        calls = []
        for i, identity in enumerate(ids):
            arguments: Any = {"word": f"{ARGUMENT}-{i}"}
            function = {"name": "probe", "arguments": json.dumps(arguments) if form.text_arguments else arguments}
            calls.append({"id": identity, "type": "function", "function": function})
        results = [
            {"role": "tool", "tool_call_id": identity, "name": "probe", "content": f"{RESULT}-{i}"}
            for i, identity in enumerate(ids)
        ]
        return _user(FIRST), {"role": "assistant", "content": "", "tool_calls": calls}, *results


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
