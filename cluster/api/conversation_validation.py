"""Checks the bounds of a conversation and of its options. Used by gRPC and HTTP alike."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.api.json_elements import ElementCounter
from cluster.api.limits import MAX_TOOLS_CHARS
from cluster.core.errors import InvalidRequest, PromptTooLong
from cluster.core.limits import (
    MAX_BYTES_PER_TOKEN,
    MAX_MESSAGES,
    MAX_PROMPT_BYTES,
    MAX_TEMPLATE_CHARS,
    MAX_TOOL_NAME_CHARS,
    MAX_TOOLS,
)
from cluster.core.request import ChatMessage, ChatOptions, prompt_size

ROLES = frozenset({"system", "user", "assistant", "tool"})


def check_messages(messages: Sequence[ChatMessage], context: int) -> None:
    """Check a conversation's messages for a context of so many tokens.

    Raises ``InvalidRequest`` for no messages, too many messages, an unknown role, and for tool calls or reasoning
    outside an assistant message. Raises ``PromptTooLong`` for too many bytes, and ``TooLarge`` if tool call arguments
    have too many JSON elements.
    """
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"{len(messages)} messages were given; send 1 to {MAX_MESSAGES}", field="messages")
    for i, m in enumerate(messages):
        if m.role not in ROLES:
            raise InvalidRequest(
                f"message {i} has the role {m.role[:32]!r}; it must be one of {', '.join(sorted(ROLES))}",
                field="messages",
            )
        if m.role != "assistant" and (m.tool_calls or m.reasoning):
            raise InvalidRequest(
                f"message {i} has the role {m.role}; only assistant messages may have tool calls or reasoning",
                field="messages",
            )
    check_size("messages have", prompt_size(messages, ()), context, "messages")
    elements = ElementCounter()
    for call in (call for m in messages for call in m.tool_calls):
        elements.feed(call.arguments.encode("utf-8", "replace"))  # chat templates parse arguments as JSON


def check_size(what: str, size: int, context: int, field: str) -> None:
    """Raise ``PromptTooLong`` if no text of ``size`` bytes fits ``context`` tokens. ``what``: subject and verb."""
    most = min(MAX_PROMPT_BYTES, context * MAX_BYTES_PER_TOKEN)
    if size > most:
        error = PromptTooLong(
            f"the {what} {size} bytes; send at most {most}: the context has {context} tokens", field=field
        )
        least = -(-size // MAX_BYTES_PER_TOKEN)
        if least > context:
            error.details = {"tokens": str(least), "maximum": str(context - 1)}
        raise error


def check_options(options: ChatOptions) -> None:
    """Check the tools and the template arguments.

    Raises ``InvalidRequest`` for too many tools, a duplicate or invalid tool name, and too long descriptions, schemas
    or template arguments. Raises ``TooLarge`` if tool schemas have too many JSON elements.
    """
    if len(options.tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(options.tools)} tools were given; send at most {MAX_TOOLS}", field="tools")
    names = [tool.name for tool in options.tools]
    if len(set(names)) != len(names):
        raise InvalidRequest("two tools have the same name", field="tools")
    length = sum(len(tool.description) + len(tool.parameters) for tool in options.tools)
    if length > MAX_TOOLS_CHARS:
        raise InvalidRequest(f"the tools have {length} characters; send at most {MAX_TOOLS_CHARS}", field="tools")
    elements = ElementCounter()
    for tool in options.tools:
        elements.feed(tool.parameters.encode("utf-8", "replace"))
    if not all(0 < len(name) <= MAX_TOOL_NAME_CHARS for name in names):
        raise InvalidRequest(f"a tool's name must have 1 to {MAX_TOOL_NAME_CHARS} characters", field="tools")
    if len(options.template) > MAX_TEMPLATE_CHARS:
        raise InvalidRequest(
            f"chat_template_kwargs has {len(options.template)} characters; send at most {MAX_TEMPLATE_CHARS}",
            field="chat_template_kwargs",
        )
