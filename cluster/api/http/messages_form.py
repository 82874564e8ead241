"""POST /v1/messages as Anthropic's clients send it, and its translation into the request that gRPC takes.

One of their messages may hold several results of tools and text; each becomes a message of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import Field

from cluster.api.bounds import MAX_PARTS, MAX_WORDS
from cluster.api.http.body import Form, Ignored, JsonObject, ShortText, Text, Unsupported
from cluster.api.http.json_response import compact
from cluster.api.http.openai_formats import Name, check_answers, choice_of, schema_grammar
from cluster.api.http.sampling_form import Count, Positive, StopStrings
from cluster.api.http.schema_check import check_schema
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_MESSAGES, MAX_TOOLS
from cluster.v1 import inference_pb2 as pb

T = TypeVar("T")
TEXT = "text"


class Block(Form):
    """A block of content. Which fields it has, its type says; types that are no text are refused by name."""

    type: str
    text: Text | None = None
    thinking: Text | None = None
    signature: Ignored = None
    data: Ignored = None
    id: ShortText | None = None
    name: ShortText | None = None
    input: JsonObject | None = None
    tool_use_id: ShortText | None = None
    content: Text | Blocks | None = None
    is_error: bool | None = None
    source: Ignored = None
    title: Ignored = None
    context: Ignored = None
    cache_control: Ignored = None
    citations: Ignored = None
    caller: Ignored = None


Blocks: TypeAlias = Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True)]


class AnthropicMessage(Form):
    """What a user, an assistant, or (in newer clients) the system said."""

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks


class AnthropicTool(Form):
    """A tool of the client's own. The server's tools have another ``type`` and are refused by it."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: Ignored = None
    eager_input_streaming: Ignored = None
    input_examples: Ignored = None
    defer_loading: Literal[False] | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=MAX_WORDS, fail_fast=True)] | None = None


class AnthropicToolChoice(Form):
    type: Literal["auto", "any", "tool", "none"]
    name: ShortText | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingForm(Form):
    """``budget_tokens`` cannot be enforced: how long to think is the model's to know; max_tokens bounds it all."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None
    display: Literal["summarized"] | None = None


class OutputFormat(Form):
    type: Literal["json_schema"]
    json_schema: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(Form):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountForm(Form):
    """What the counting of tokens takes: everything that makes the prompt."""

    model: ShortText
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Text | Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingForm | None = None
    output_config: OutputConfig | None = None
    cache_control: Ignored = None
    context_management: Unsupported = None
    mcp_servers: Unsupported = None

    def conversation(self) -> pb.ChatRequest:
        """Messages, tools, and what the answer must be. Raises ``InvalidRequest``, naming the field."""
        turns, called = list(_system(self.system)), set[str]()
        for i, message in enumerate(self.messages):
            for turn in _turns(message, f"messages[{i}]", called):
                called.update(call.id for call in turn.tool_calls)
                turns.append(turn)
        output = self.output_config
        return pb.ChatRequest(
            messages=turns,
            template=self._template(),
            grammar=schema_grammar(output.format.json_schema) if output and output.format else None,
        )

    def _template(self) -> pb.TemplateOptions:
        choice, thinking = self.tool_choice, self.thinking
        if choice and choice.type == "tool" and not choice.name:
            raise InvalidRequest("tool_choice does not name the tool", field="tool_choice.name")
        mode = {"any": "required", "tool": choice.name or ""}.get(choice.type, choice.type) if choice else "auto"
        single = choice is not None and choice.disable_parallel_tool_use
        return pb.TemplateOptions(
            tools=[_tool(t, f"tools[{i}]") for i, t in enumerate(self.tools or ())],
            tool_choice=choice_of(mode, named=choice is not None and choice.type == "tool"),
            parallel_tool_calls=False if single else None,
            enable_thinking=None if thinking is None or thinking.type == "adaptive" else thinking.type == "enabled",
            reasoning_effort=(self.output_config and self.output_config.effort) or "",
        )


class MessagesForm(CountForm):
    """The body."""

    max_tokens: Positive
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    stop_sequences: StopStrings | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | None = None
    metadata: Ignored = None
    user_profile_id: Ignored = None
    workspace_id: Ignored = None
    diagnostics: Unsupported = None
    container: Unsupported = None
    inference_geo: Unsupported = None

    def message(self, request_id: str) -> pb.ChatRequest:
        """The request. Raises ``InvalidRequest``, naming the field."""
        if self.messages[-1].role == "assistant":  # a template would end that turn and begin a new one, unasked
            raise InvalidRequest(
                "the last of messages is the assistant's; going on with its text (prefill) is not supported here: end "
                "with the user's message",
                field=f"messages[{len(self.messages) - 1}].role",
                code="unsupported_parameter",
            )
        message = self.conversation()
        message.request_id = request_id
        message.sampling.MergeFrom(
            pb.SamplingOptions(
                temperature=1.0 if self.temperature is None else self.temperature, top_p=self.top_p, top_k=self.top_k
            )
        )
        message.stop.MergeFrom(pb.StopOptions(max_tokens=self.max_tokens, stop=self.stop_sequences or ()))
        return message


def _tool(tool: AnthropicTool, field: str) -> pb.Tool:
    check_schema(tool.input_schema, f"{field}.input_schema")
    return pb.Tool(name=tool.name, description=tool.description or "", parameters=compact(tool.input_schema))


def _system(system: str | list[Block] | None) -> Iterator[pb.ChatMessage]:
    if system:
        yield pb.ChatMessage(role="system", content=_text(system, "system"))


def _text(content: str | list[Block], field: str) -> str:
    """The text of blocks that can be nothing but text."""
    if isinstance(content, str):
        return content
    for i, block in enumerate(content):
        _require(block, (TEXT,), f"{field}[{i}]")
    return "\n".join(_has(b.text, f"{field}[{i}].text") for i, b in enumerate(content))


def _turns(message: AnthropicMessage, field: str, called: Collection[str]) -> Iterator[pb.ChatMessage]:
    if message.role == "system" or isinstance(message.content, str):
        yield pb.ChatMessage(role=message.role, content=_text(message.content, f"{field}.content"))
    elif message.role == "assistant":
        yield _assistant(message.content, f"{field}.content")
    else:
        yield from _user(message.content, f"{field}.content", called)


def _assistant(blocks: list[Block], field: str) -> pb.ChatMessage:
    message = pb.ChatMessage(role="assistant")
    said, thought = list[str](), list[str]()
    for i, block in enumerate(blocks):
        at = f"{field}[{i}]"
        _require(block, (TEXT, "thinking", "redacted_thinking", "tool_use"), at)
        if block.type == TEXT:
            said.append(_has(block.text, f"{at}.text"))
        elif block.type == "thinking":
            thought.append(_has(block.thinking, f"{at}.thinking"))
        elif block.type == "tool_use":
            arguments = compact(_has(block.input, f"{at}.input"))
            call = pb.ToolCall(id=_has(block.id, f"{at}.id"), name=_has(block.name, f"{at}.name"), arguments=arguments)
            message.tool_calls.append(call)
    message.content, message.reasoning = "".join(said), "".join(thought)
    return message


def _user(blocks: list[Block], field: str, called: Collection[str]) -> Iterator[pb.ChatMessage]:
    """Results of tools first, as they must be, then what the user says beside them."""
    said = []
    for i, block in enumerate(blocks):
        at = f"{field}[{i}]"
        _require(block, (TEXT, "tool_result"), at)
        if block.type == TEXT:
            said.append(_has(block.text, f"{at}.text"))
        else:
            result = _result(block, at)
            check_answers(result, called, f"{at}.tool_use_id")
            yield result
    if said:
        yield pb.ChatMessage(role="user", content="\n".join(said))


def _result(block: Block, field: str) -> pb.ChatMessage:
    text = _text(block.content or "", f"{field}.content")
    told = f"Error: {text}" if block.is_error else text
    return pb.ChatMessage(role="tool", content=told, tool_call_id=_has(block.tool_use_id, f"{field}.tool_use_id"))


def _require(block: Block, kinds: tuple[str, ...], field: str) -> None:
    if block.type not in kinds:
        raise InvalidRequest(
            f"{field} is of type {block.type[:32]}; taken are {', '.join(kinds)}: this model reads text alone",
            field=field,
        )


def _has(value: T | None, field: str) -> T:
    if value is None:
        raise InvalidRequest(f"{field} is missing", field=field)
    return value
