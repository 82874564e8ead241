"""The nouns of a conversation: messages, tools, calls of them, and how a chat is asked for.

JSON stays text between rooms (``parameters``, ``arguments``, ``template``): only what needs its inside parses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ChatMessage", "ChatOptions", "Parsing", "Tool", "ToolCall", "ToolCallDelta", "ToolChoice"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON Schema of its arguments, an object's, as text."""

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call, as it stands in a conversation. ``arguments`` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; ``role`` is system, user, assistant or tool.

    An assistant's may hold ``reasoning`` and ``tool_calls`` too; a tool's names the call it answers, and the tool.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of call ``index`` of an answer: ``id`` and ``name`` come with the first piece alone, the text of
    ``arguments`` in pieces after it.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolChoice(StrEnum):
    """Whether an answer may, must not, or must call tools; ``NAMED`` must call one certain tool."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation becomes a prompt, and what its answer may be.

    ``tool_name`` is for ``ToolChoice.NAMED``. ``enable_thinking`` None and ``reasoning_effort`` "" leave it to the
    model's template. ``template`` is a JSON object as text: further arguments of the model's chat template.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str = ""
    parallel_tool_calls: bool = True
    enable_thinking: bool | None = None
    reasoning_effort: str = ""
    template: str = ""

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of: none where it must not call any."""
        return () if self.tool_choice is ToolChoice.NONE else self.tools


@dataclass(frozen=True, slots=True)
class Parsing:
    """What an answer's text is parsed for: reasoning always, calls of ``tools`` where there are any.

    ``thinking``: the prompt ends inside the reasoning, so that the answer begins there.
    """

    tools: tuple[Tool, ...] = ()
    thinking: bool = False
