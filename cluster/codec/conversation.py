"""Encodes and decodes the parts of a conversation that coordinator and client share."""

from __future__ import annotations

from typing import Final

from cluster.core.errors import InvalidRequest
from cluster.core.request import ChatMessage, ToolCall, ToolChoice
from cluster.v1 import inference_pb2 as pb

TOOL_CHOICES: Final = {
    ToolChoice.AUTO: pb.TOOL_CHOICE_MODE_AUTO,
    ToolChoice.NONE: pb.TOOL_CHOICE_MODE_NONE,
    ToolChoice.REQUIRED: pb.TOOL_CHOICE_MODE_REQUIRED,
    ToolChoice.NAMED: pb.TOOL_CHOICE_MODE_NAMED,
}
_TOOL_CHOICE_OF: Final = {number: choice for choice, number in TOOL_CHOICES.items()} | {
    pb.TOOL_CHOICE_MODE_UNSPECIFIED: ToolChoice.AUTO
}


def encode_message(message: ChatMessage) -> pb.ChatMessage:
    """Encode a message."""
    return pb.ChatMessage(
        role=message.role,
        content=message.content,
        reasoning=message.reasoning,
        tool_calls=[pb.ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in message.tool_calls],
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def decode_message(message: pb.ChatMessage) -> ChatMessage:
    """Decode a message. Nothing in it is checked."""
    return ChatMessage(
        role=message.role,
        content=message.content,
        reasoning=message.reasoning,
        tool_calls=tuple(ToolCall(c.id, c.name, c.arguments) for c in message.tool_calls),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def encode_tool_choice(choice: ToolChoice, name: str = "") -> pb.ToolChoice:
    """Encode a tool choice; ``name`` is for ``ToolChoice.NAMED``."""
    return pb.ToolChoice(mode=TOOL_CHOICES[choice], name=name)


def decode_tool_choice(message: pb.ToolChoice) -> ToolChoice:
    """Decode a tool choice; an unset one is AUTO. Raise InvalidRequest for an unknown one."""
    choice = _TOOL_CHOICE_OF.get(message.mode)
    if choice is None:
        raise InvalidRequest(f"tool_choice has the unknown mode {message.mode}", field="tool_choice")
    return choice
