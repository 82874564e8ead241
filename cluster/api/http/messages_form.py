"""The body of POST /v1/messages, and its translation into parameters.

One Anthropic message may hold several tool results and text; each becomes a separate message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

from pydantic import Field

from cluster.api.http.body import Form, Hint, Ignored, JsonObject, ShortText, Text, Unsupported, hint
from cluster.api.http.json_response import compact
from cluster.api.http.openai_formats import Name, check_answers, schema_grammar
from cluster.api.http.sampling_form import Count, Positive, StopStrings
from cluster.api.http.schema_check import check_schema
from cluster.api.http.server_tools import ServerTool
from cluster.api.limits import MAX_PARTS, MAX_WORDS
from cluster.api.requests import TOOL_SCHEMA, ChatParams, Conversation, SamplingOptions, grammar_names
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_MESSAGES, MAX_TOOLS
from cluster.core.request import ChatMessage, ChatOptions, Grammar, Tool, ToolCall, ToolChoice

T = TypeVar("T")
TEXT = "text"
REFERENCE = "tool_reference"
"""In the result of a client's search for tools: the name of one. All tools are in the prompt already."""
BILLING: Final = "x-anthropic-billing-header:"
"""Start of a line that Claude Code puts before its system prompt. It differs in each session, so that no session could
start from the prefix of another one; Anthropic's servers take it out too."""
_CHOICES: Final = {
    "auto": ToolChoice.AUTO,
    "any": ToolChoice.REQUIRED,
    "tool": ToolChoice.NAMED,
    "none": ToolChoice.NONE,
}
"""Anthropic's words for the tool choices."""


class Block(Form):
    """A content block. Its type determines its fields; types that are not text are rejected by name."""

    type: str
    text: Text | None = None
    thinking: Text | None = None
    signature: Ignored = None
    data: Ignored = None
    id: ShortText | None = None
    name: ShortText | None = None
    input: JsonObject | None = None
    tool_use_id: ShortText | None = None
    tool_name: ShortText | None = None
    content: Text | Blocks | None = None
    is_error: bool | None = None
    source: Ignored = None
    title: Ignored = None
    context: Ignored = None
    cache_control: Hint = None
    citations: Ignored = None
    caller: Ignored = None


Blocks: TypeAlias = Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True)]


class AnthropicMessage(Form):
    """A message of a user, an assistant or (in newer clients) the system."""

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks


class AnthropicTool(Form):
    """A tool of the client. It is always loaded: deferred loading would need Anthropic's tool search."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: Hint = None
    eager_input_streaming: Ignored = None
    input_examples: Hint = None
    defer_loading: Annotated[bool | None, hint("tools.defer_loading")] = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=MAX_WORDS, fail_fast=True)] | None = None


class AnthropicToolChoice(Form):
    type: Literal["auto", "any", "tool", "none"]
    name: ShortText | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingForm(Form):
    """The thinking options. ``budget_tokens`` cannot be enforced; max_tokens bounds reasoning and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Positive | None, hint("thinking.budget_tokens")] = None
    display: Annotated[Literal["summarized", "omitted"] | None, hint("thinking.display")] = None


class OutputFormat(Form):
    type: Literal["json_schema"]
    json_schema: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(Form):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextEdit(Form):
    """A rule by which old content would be removed. Only a rule that removes nothing can be honoured."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Form):
    edits: Annotated[list[ContextEdit], Field(max_length=MAX_WORDS, fail_fast=True)] | None = None


class CountForm(Form):
    """The body of /v1/messages/count_tokens: all fields that determine the prompt."""

    model: ShortText
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Text | Blocks | None = None
    tools: Annotated[list[AnthropicTool | ServerTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingForm | None = None
    output_config: OutputConfig | None = None
    cache_control: Hint = None
    context_management: Annotated[ContextManagement | None, hint("context_management")] = None
    mcp_servers: Unsupported = None

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields."""
        return {"prompt": "messages", "enable_thinking": "thinking", "reasoning_effort": "output_config.effort"}

    def conversation(self) -> Conversation:
        """Translate the messages and the tools. Raises ``InvalidRequest``, naming the field."""
        turns = list(_system(self.system))
        call_ids = set[str]()
        for i, message in enumerate(self.messages):
            for turn in _turns(message, f"messages[{i}]", call_ids):
                call_ids.update(call.id for call in turn.tool_calls)
                turns.append(turn)
        return Conversation(turns, self._options())

    def grammar(self) -> Grammar | None:
        """Return the grammar of the answer's format."""
        output = self._format()
        return schema_grammar(output.json_schema) if output else None

    def _format(self) -> OutputFormat | None:
        return self.output_config.format if self.output_config else None

    def _options(self) -> ChatOptions:
        choice = self.tool_choice or AnthropicToolChoice(type="auto")
        thinking = self.thinking
        if choice.type == "tool" and not choice.name:
            raise InvalidRequest("tool_choice has no name; name the tool to call", field="tool_choice.name")
        return ChatOptions(
            tools=tuple(
                _tool(t, f"tools[{i}]") for i, t in enumerate(self.tools or ()) if isinstance(t, AnthropicTool)
            ),
            tool_choice=_CHOICES[choice.type],
            tool_name=(choice.type == "tool" and choice.name) or "",
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            enable_thinking=None if thinking is None or thinking.type == "adaptive" else thinking.type == "enabled",
            thinking_is_hint=True,
            reasoning_effort=(self.output_config and self.output_config.effort) or "",
        )


class MessagesForm(CountForm):
    """The body. It adds to Anthropic's fields: speculate."""

    max_tokens: Positive
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    stop_sequences: StopStrings | None = None
    speculate: bool | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | Annotated[Literal["fast"], hint("speed")] | None = None
    metadata: Hint = None
    user_profile_id: Hint = None
    workspace_id: Hint = None
    diagnostics: Unsupported = None
    container: Unsupported = None
    inference_geo: Unsupported = None

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields. Without an output format, a grammar comes from the tools."""
        grammar = grammar_names("output_config.format" if self._format() else "tools")
        return {**super().field_names(), "stop": "stop_sequences", TOOL_SCHEMA: ".input_schema", **grammar}

    def params(self, request_id: str) -> ChatParams:
        """Translate the body. Raises ``InvalidRequest``, naming the field."""
        if self.messages[-1].role == "assistant":  # the chat template would end that turn and begin a new one
            raise InvalidRequest(
                "the last message is the assistant's; continuing its text (prefill) is not supported; end with a user "
                "message",
                field=f"messages[{len(self.messages) - 1}].role",
                code="unsupported_parameter",
            )
        temperature = 1.0 if self.temperature is None else self.temperature
        return ChatParams(
            request_id=request_id,
            conversation=self.conversation(),
            sampling=SamplingOptions(temperature=temperature, top_p=self.top_p, top_k=self.top_k or 0),
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or (),
            grammar=self.grammar(),
            speculate=self.speculate is not False,
        )


def _tool(tool: AnthropicTool, field: str) -> Tool:
    check_schema(tool.input_schema, f"{field}.input_schema")
    return Tool(name=tool.name, description=tool.description or "", parameters=compact(tool.input_schema))


def _system(system: str | list[Block] | None) -> Iterator[ChatMessage]:
    text = _text(system or "", "system")
    while text.startswith(BILLING):
        text = text.partition("\n")[2].lstrip("\n")
    if text:
        yield ChatMessage(role="system", content=text)


def _text(content: str | list[Block], field: str) -> str:
    """Return the text of blocks. Raises ``InvalidRequest`` for a block that is not text."""
    if isinstance(content, str):
        return content
    for i, block in enumerate(content):
        _check_type(block, (TEXT,), f"{field}[{i}]")
    return "\n".join(_require(b.text, f"{field}[{i}].text") for i, b in enumerate(content))


def _turns(message: AnthropicMessage, field: str, call_ids: Collection[str]) -> Iterator[ChatMessage]:
    """Translate one message; ``call_ids`` are the ids of all earlier tool calls."""
    if message.role == "system" or isinstance(message.content, str):
        yield ChatMessage(role=message.role, content=_text(message.content, f"{field}.content"))
    elif message.role == "assistant":
        yield _assistant(message.content, f"{field}.content")
    else:
        yield from _user(message.content, f"{field}.content", call_ids)


def _assistant(blocks: list[Block], field: str) -> ChatMessage:
    texts = list[str]()
    thoughts = list[str]()
    calls = list[ToolCall]()
    for i, block in enumerate(blocks):
        at = f"{field}[{i}]"
        _check_type(block, (TEXT, "thinking", "redacted_thinking", "tool_use"), at)
        if block.type == TEXT:
            texts.append(_require(block.text, f"{at}.text"))
        elif block.type == "thinking":
            thoughts.append(_require(block.thinking, f"{at}.thinking"))
        elif block.type == "tool_use":
            arguments = compact(_require(block.input, f"{at}.input"))
            call_id = _require(block.id, f"{at}.id")
            name = _require(block.name, f"{at}.name")
            calls.append(ToolCall(id=call_id, name=name, arguments=arguments))
    return ChatMessage("assistant", "".join(texts), "".join(thoughts), tuple(calls))


def _user(blocks: list[Block], field: str, call_ids: Collection[str]) -> Iterator[ChatMessage]:
    """Yield the tool results, which must come first, then the user's text."""
    texts = []
    for i, block in enumerate(blocks):
        at = f"{field}[{i}]"
        _check_type(block, (TEXT, "tool_result"), at)
        if block.type == TEXT:
            texts.append(_require(block.text, f"{at}.text"))
        else:
            result = _result(block, at)
            check_answers(result, call_ids, f"{at}.tool_use_id")
            yield result
    if texts:
        yield ChatMessage(role="user", content="\n".join(texts))


def _result(block: Block, field: str) -> ChatMessage:
    content = block.content or ""
    if not isinstance(content, str):
        content = [_name_as_text(one, f"{field}.content[{i}]") for i, one in enumerate(content)]
    text = _text(content, f"{field}.content")
    content = f"Error: {text}" if block.is_error else text
    call_id = _require(block.tool_use_id, f"{field}.tool_use_id")
    return ChatMessage(role="tool", content=content, tool_call_id=call_id)


def _name_as_text(block: Block, field: str) -> Block:
    """Return the name of a tool that the client found as text, and another block unchanged."""
    if block.type != REFERENCE:
        return block
    return Block(type=TEXT, text=_require(block.tool_name, f"{field}.tool_name"))


def _check_type(block: Block, kinds: tuple[str, ...], field: str) -> None:
    if block.type not in kinds:
        raise InvalidRequest(f"{field} has the type {block.type[:32]}; supported here: {', '.join(kinds)}", field=field)


def _require(value: T | None, field: str) -> T:
    if value is None:
        raise InvalidRequest(f"{field} is missing", field=field)
    return value
