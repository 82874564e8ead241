"""Encodes a conversation as protobuf: messages in any accepted form, and the options of the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from cluster.client.options import ChatKeywords, check_bool, check_text, encode_json
from cluster.codec.conversation import encode_message, encode_tool_choice
from cluster.core.errors import InvalidRequest
from cluster.core.request import ChatMessage, Tool, ToolCall, ToolChoice
from cluster.v1 import inference_pb2 as pb

Turn = ChatMessage | Mapping[str, Any] | tuple[str, str]
"""One message: ``ChatMessage(role, content)``, ``{"role": ..., "content": ...}`` or ``(role, content)``."""


def encode_messages(messages: Iterable[Turn]) -> list[pb.ChatMessage]:
    """Encode messages. Raise InvalidRequest naming the message that cannot be sent."""
    if isinstance(messages, (str, Mapping, ChatMessage)):
        raise InvalidRequest("messages must be a sequence of messages, not a single message", field="messages")
    return [encode_message(parse_message(message, f"messages[{i}]")) for i, message in enumerate(messages)]


def parse_message(given: Turn, field: str = "message") -> ChatMessage:
    """Convert any form of ``Turn`` to a ChatMessage. Raise InvalidRequest naming ``field``.

    A mapping may also hold ChatMessage's ``reasoning``, ``tool_calls``, ``tool_call_id`` and ``name``.
    """
    match given:
        case ChatMessage():
            message = given
        case {"role": _, "content": _} if isinstance(given, Mapping) and given.keys() <= _KNOWN:
            message = ChatMessage(**given)
        case (role, content):
            message = ChatMessage(role, content)
        case _:
            raise InvalidRequest(f"{field} must have a role, a content and no unknown keys", field=field)
    return ChatMessage(
        **{name: check_text(f"{field}.{name}", getattr(message, name)) for name in ("role", "content", *_TEXTS)},
        tool_calls=_check_calls(message.tool_calls, f"{field}.tool_calls"),
    )


_TEXTS: Final = ("reasoning", "tool_call_id", "name")
_KNOWN: Final = frozenset(("role", "content", *_TEXTS, "tool_calls"))


def _check_calls(given: object, field: str) -> tuple[ToolCall, ...]:
    calls = tuple(given) if isinstance(given, (list, tuple)) else None
    if calls is None or not all(isinstance(call, ToolCall) for call in calls):
        raise InvalidRequest(f"{field} must be a sequence of ToolCall", field=field)
    return tuple(
        ToolCall(check_text(field, call.id), check_text(field, call.name), check_text(field, call.arguments))
        for call in calls
    )


def encode_template(options: ChatKeywords) -> pb.TemplateOptions:
    """Encode the ``options`` of the chat template. Raise InvalidRequest naming the field."""
    sent = pb.TemplateOptions(
        tools=[_encode_tool(tool, f"tools[{i}]") for i, tool in enumerate(options.get("tools") or ())],
        tool_choice=_encode_choice(check_text("tool_choice", options.get("tool_choice") or "")),
        reasoning_effort=check_text("reasoning_effort", options.get("reasoning_effort") or ""),
    )
    if (parallel := options.get("parallel_tool_calls")) is not None:
        sent.parallel_tool_calls = check_bool("parallel_tool_calls", parallel)
    if (thinking := options.get("enable_thinking")) is not None:
        sent.enable_thinking = check_bool("enable_thinking", thinking)
    if template_kwargs := options.get("chat_template_kwargs"):
        sent.chat_template_kwargs = encode_json("chat_template_kwargs", template_kwargs)
    return sent


def _encode_choice(wanted: str) -> pb.ToolChoice:
    """Encode "auto", "none", "required" or a tool's name. A tool may be called "named": here that is always a name."""
    if not wanted:
        return pb.ToolChoice()
    if wanted in set(ToolChoice) - {ToolChoice.NAMED}:
        return encode_tool_choice(ToolChoice(wanted))
    return encode_tool_choice(ToolChoice.NAMED, wanted)


def _encode_tool(given: Tool | Mapping[str, object], field: str) -> pb.Tool:
    if isinstance(given, Mapping):
        function = given.get("function", given)
        if not isinstance(function, Mapping) or "name" not in function:
            raise InvalidRequest(f"{field} must be a Tool, or a mapping with a name", field=field)
        name, description = function["name"], function.get("description") or ""
        parameters: object = function.get("parameters") or ""
    else:
        name, description, parameters = given.name, given.description, given.parameters
    return pb.Tool(
        name=check_text(f"{field}.name", name),
        description=check_text(f"{field}.description", description),
        parameters=encode_json(f"{field}.parameters", parameters) if parameters else "",
    )
