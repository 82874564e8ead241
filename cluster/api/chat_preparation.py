"""A conversation, as every surface takes it in: its bounds, before it is rendered and tokenized."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from cluster.api.bounds import MAX_TOOLS_CHARS
from cluster.api.elements import ElementCounter
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_MESSAGES, MAX_PROMPT_CHARS, MAX_TEMPLATE_CHARS, MAX_TOOL_NAME_CHARS, MAX_TOOLS
from cluster.core.request import ChatMessage, ChatOptions, Grammar
from cluster.sandbox.tokenizer import Tokenized

ROLES = frozenset({"system", "user", "assistant", "tool"})


async def prepare_chat(
    messages: Sequence[ChatMessage],
    options: ChatOptions,
    grammar: Grammar | None,
    checkpoint: ModelInfo,
    max_tokens: int,
    *,
    texts: bool = False,
) -> Tokenized:
    """The conversation under the model's chat template. ``grammar`` is what the answer's content must be, if anything.

    Raises ``InvalidRequest`` naming the field: bounds, roles, what the model's template does not know, tools that are
    asked for by name and not given, and a grammar beside tools that must be called.
    """
    await anyio.to_thread.run_sync(_check, messages, options)  # as long as the request: too long for the event loop
    return await checkpoint.text.converse(messages, options, grammar, max_tokens, texts=texts)


def _check(messages: Sequence[ChatMessage], options: ChatOptions) -> None:
    check_messages(messages)
    check_options(options)


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises ``InvalidRequest`` where there are none, too many, or one of an unknown role; ``TooLarge``."""
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"{len(messages)} messages were given; 1 to {MAX_MESSAGES} are taken", field="messages")
    for i, m in enumerate(messages):
        if m.role not in ROLES:
            raise InvalidRequest(
                f"message {i} has the role {m.role[:32]!r}; it must be one of {', '.join(sorted(ROLES))}",
                field="messages",
            )
        if m.role != "assistant" and (m.tool_calls or m.reasoning):
            raise InvalidRequest(f"message {i} is no assistant's and has tool calls or reasoning", field="messages")
    length = sum(map(_length, messages))
    if length > MAX_PROMPT_CHARS:
        raise InvalidRequest(f"the messages have {length} characters; at most {MAX_PROMPT_CHARS}", field="messages")
    elements = ElementCounter()
    for call in (call for m in messages for call in m.tool_calls):
        elements.feed(call.arguments.encode("utf-8", "replace"))  # templates take them as JSON


def _length(message: ChatMessage) -> int:
    """Characters that a template may put into the prompt."""
    called = sum(len(call.id) + len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning) + len(message.tool_call_id) + len(message.name) + called


def check_options(options: ChatOptions) -> None:
    """Raises ``InvalidRequest`` for too many tools, names that are none or come twice, and too long an argument."""
    if len(options.tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(options.tools)} tools were given; at most {MAX_TOOLS}", field="tools")
    names = [tool.name for tool in options.tools]
    if len(set(names)) != len(names):
        raise InvalidRequest("two tools have the same name", field="tools")
    length = sum(len(tool.description) + len(tool.parameters) for tool in options.tools)
    if length > MAX_TOOLS_CHARS:
        raise InvalidRequest(f"the tools have {length} characters; at most {MAX_TOOLS_CHARS}", field="tools")
    elements = ElementCounter()
    for tool in options.tools:
        elements.feed(tool.parameters.encode("utf-8", "replace"))
    if not all(0 < len(name) <= MAX_TOOL_NAME_CHARS for name in names):
        raise InvalidRequest(f"a tool's name must have 1 to {MAX_TOOL_NAME_CHARS} characters", field="tools")
    if len(options.template) > MAX_TEMPLATE_CHARS:
        raise InvalidRequest(
            f"chat_template_kwargs has {len(options.template)} characters; at most {MAX_TEMPLATE_CHARS}",
            field="chat_template_kwargs",
        )
