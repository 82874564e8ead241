"""Decodes public protobuf messages into core types: chat messages, chat options and grammars."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_MESSAGES, MAX_TOOLS
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, Tool, ToolCall, ToolChoice
from cluster.v1 import inference_pb2 as pb

_CHOICES = {
    pb.TOOL_CHOICE_MODE_UNSPECIFIED: ToolChoice.AUTO,
    pb.TOOL_CHOICE_MODE_AUTO: ToolChoice.AUTO,
    pb.TOOL_CHOICE_MODE_NONE: ToolChoice.NONE,
    pb.TOOL_CHOICE_MODE_REQUIRED: ToolChoice.REQUIRED,
    pb.TOOL_CHOICE_MODE_NAMED: ToolChoice.NAMED,
}


def messages(given: Sequence[pb.ChatMessage]) -> tuple[ChatMessage, ...]:
    """Decode a conversation. Only the number of messages is checked. Raises ``InvalidRequest``."""
    if len(given) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(given)} messages were given; send at most {MAX_MESSAGES}", field="messages")
    return tuple(
        ChatMessage(
            m.role,
            m.content,
            m.reasoning,
            tuple(ToolCall(c.id, c.name, c.arguments) for c in m.tool_calls),
            m.tool_call_id,
            m.name,
        )
        for m in given
    )


def template_options(given: pb.TemplateOptions) -> ChatOptions:
    """Decode the options of a chat template. Raises ``InvalidRequest`` for an unknown tool choice or too many tools."""
    if len(given.tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(given.tools)} tools were given; send at most {MAX_TOOLS}", field="tools")
    choice = _CHOICES.get(given.tool_choice.mode)
    if choice is None:
        raise InvalidRequest(f"tool_choice has the unknown mode {given.tool_choice.mode}", field="tool_choice")
    return ChatOptions(
        tools=tuple(Tool(t.name, t.description, t.parameters) for t in given.tools),
        tool_choice=choice,
        tool_name=given.tool_choice.name,
        parallel_tool_calls=given.parallel_tool_calls if given.HasField("parallel_tool_calls") else True,
        enable_thinking=given.enable_thinking if given.HasField("enable_thinking") else None,
        reasoning_effort=given.reasoning_effort,
        template=given.chat_template_kwargs,
    )


def grammar(given: pb.Grammar) -> Grammar | None:
    """Decode the grammar of an answer; None if it is unconstrained. Raises ``InvalidRequest`` if it is empty."""
    match given.WhichOneof("kind"):
        case None:
            return None
        case "json_object":
            return Grammar(GrammarKind.JSON_OBJECT) if given.json_object else None
        case kind:
            source = str(getattr(given, kind))
            if not source.strip():
                raise InvalidRequest(f"the {kind} is empty", field=kind)
            return Grammar(GrammarKind(kind), source)
