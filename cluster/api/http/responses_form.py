"""The body of POST /v1/responses, and its translation into parameters.

Nothing is stored: each request has the whole conversation, including reasoning and tool calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, ValidationInfo

from cluster.api.http.body import (
    Form,
    Hint,
    Ignored,
    JsonObject,
    ShortText,
    Text,
    Unsupported,
    first_entries,
    hint,
    note_ignored,
)
from cluster.api.http.openai_formats import (
    ArgumentsReader,
    FunctionSpec,
    Name,
    RejectAllowedTools,
    ServiceTier,
    check_answers,
    decode_tool,
    schema_grammar,
)
from cluster.api.http.reasoning_effort import Effort, decode_thinking, thinking_names
from cluster.api.http.sampling_form import Positive
from cluster.api.http.server_tools import ServerTool
from cluster.api.limits import MAX_ITEMS, MAX_METADATA, MAX_PARTS, MAX_WORDS
from cluster.api.requests import TOOL_SCHEMA, ChatParams, Conversation, SamplingOptions, grammar_names
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_TOOLS, MAX_TOP_LOGPROBS
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, ToolCall, ToolChoice

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


class ResponsesContentPart(Form):
    type: str
    text: Text | None = None
    refusal: Text | None = None
    image_url: Ignored = None
    file_id: Ignored = None
    file_data: Ignored = None
    file_url: Ignored = None
    filename: Ignored = None
    detail: Ignored = None
    annotations: Ignored = None
    logprobs: Ignored = None


Parts: TypeAlias = Annotated[list[ResponsesContentPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class InputItem(Form):
    """One item of the input. Its type determines its fields; the default type is a message."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Parts | None = None
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None
    call_id: ShortText | None = None
    name: ShortText | None = None
    arguments: Text | None = None
    output: Text | Parts | None = None
    summary: Parts | None = None
    encrypted_content: Ignored = None
    namespace: Ignored = None


class ResponsesTool(FunctionSpec):
    """A function of the client."""

    type: Literal["function"]
    defer_loading: Annotated[bool | None, hint("tools.defer_loading")] = None


class ResponsesNamedTool(Form):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]


class Format(Form):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Annotated[Text | None, hint("text.format.description")] = None
    json_schema: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Form):
    format: Format | None = None
    verbosity: Annotated[Literal["low", "medium", "high"] | None, hint("text.verbosity")] = None


class Reasoning(Form):
    effort: Effort | None = None
    summary: Annotated[Literal["auto", "concise", "detailed"] | None, hint("reasoning.summary")] = None
    generate_summary: Annotated[Literal["auto", "concise", "detailed"] | None, hint("reasoning.generate_summary")] = (
        None
    )


class ResponsesStreamOptions(Form):
    include_obfuscation: Literal[False] | None = None


def _note_encryption(included: list[str], info: ValidationInfo) -> list[str]:
    if ENCRYPTED in included:
        note_ignored(info, "include.reasoning.encrypted_content")
    return included


Included: TypeAlias = Annotated[
    list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]],
    Field(max_length=MAX_WORDS, fail_fast=True),
    AfterValidator(_note_encryption),
]


class ResponsesForm(Form):
    """The body. It adds to OpenAI's fields: top_k, min_p, seed, chat_template_kwargs, speculate."""

    model: ShortText | None = None
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ResponsesTool | ServerTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[Literal["auto", "none", "required"] | ResponsesNamedTool | None, RejectAllowedTools] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: JsonObject | None = None
    speculate: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    include: Included | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: ServiceTier | None = None
    metadata: Annotated[dict[str, ShortText], Field(max_length=MAX_METADATA), first_entries(MAX_METADATA)] | None = None
    user: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_options: Hint = None
    prompt_cache_retention: Hint = None
    client_metadata: Hint = None
    previous_response_id: Unsupported = None
    access_programs: Unsupported = None
    background_options: Unsupported = None
    conversation: Unsupported = None
    image: Unsupported = None
    moderation: Unsupported = None
    prompt: Unsupported = None
    max_tool_calls: Unsupported = None
    context_management: Unsupported = None

    @property
    def functions(self) -> Sequence[tuple[int, ResponsesTool]]:
        """The client's functions, each with its index among the tools."""
        return [(i, t) for i, t in enumerate(self.tools or ()) if isinstance(t, ResponsesTool)]

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields. Without a text format, a grammar comes from the tools."""
        return {
            "messages": "input",
            "prompt": "input",
            "max_tokens": "max_output_tokens",
            TOOL_SCHEMA: ".parameters",
            **thinking_names(self.chat_template_kwargs, "reasoning.effort"),
            **grammar_names("text.format" if self.text else "tools"),
        }

    def params(self, request_id: str) -> ChatParams:
        """Translate the body. Raises ``InvalidRequest``, naming the field."""
        sampling = SamplingOptions(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p,
            seed=self.seed,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs or 0,
        )
        return ChatParams(
            request_id=request_id,
            conversation=Conversation([*self._instruction_messages(), *self._turns()], self._options()),
            sampling=sampling,
            max_tokens=self.max_output_tokens,
            grammar=self._grammar(),
            speculate=self.speculate is not False,
        )

    def _instruction_messages(self) -> Iterator[ChatMessage]:
        if self.instructions:
            yield ChatMessage("system", self.instructions)

    def _turns(self) -> list[ChatMessage]:
        if isinstance(self.input, str):
            return [ChatMessage("user", self.input)]
        turns = _ConversationBuilder()
        for i, item in enumerate(self.input):
            turns.add(item, f"input[{i}]")
        return turns.messages()

    def _grammar(self) -> Grammar | None:
        requested = self.text.format if self.text else None
        if requested is None or requested.type == "text":
            return None
        if requested.type == "json_object":
            return Grammar(GrammarKind.JSON_OBJECT)
        if requested.json_schema is None:
            raise InvalidRequest("text.format has no schema", field="text.format.schema")
        return schema_grammar(requested.json_schema)

    def _options(self) -> ChatOptions:
        effort = self.reasoning.effort if self.reasoning else None
        thinking = decode_thinking(effort, self.chat_template_kwargs, "reasoning.effort")
        choice = self.tool_choice or "auto"
        return ChatOptions(
            tools=tuple(decode_tool(t, f"tools[{i}]") for i, t in self.functions),
            tool_choice=ToolChoice.NAMED if isinstance(choice, ResponsesNamedTool) else ToolChoice(choice),
            tool_name=choice.name if isinstance(choice, ResponsesNamedTool) else "",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            enable_thinking=thinking.enable,
            thinking_is_hint=thinking.is_hint,
            reasoning_effort=thinking.effort,
            template=thinking.template,
        )


class _ConversationBuilder:
    """Builds a conversation from input items. Consecutive items of the assistant become one message."""

    def __init__(self) -> None:
        self._turns: list[ChatMessage] = []
        self._in_assistant = False
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCall] = []
        self._call_ids: set[str] = set()
        self._arguments = ArgumentsReader()

    def messages(self) -> list[ChatMessage]:
        self._end_assistant()
        return self._turns

    def add(self, item: InputItem, field: str) -> None:
        """Add one item. Raises ``InvalidRequest``."""
        if item.type == "message":
            self._add_message(item, field)
        elif item.type == "reasoning":
            self._in_assistant = True
            self._thoughts.append(_text(item.content or item.summary or "", f"{field}.content"))
        elif item.type == "function_call":
            self._add_call(item, field)
        elif item.type == "function_call_output":
            self._add_output(item, field)
        else:
            raise InvalidRequest(
                f"{field} has the type {item.type[:32]}, which is not supported here", field=f"{field}.type"
            )

    def _add_call(self, item: InputItem, field: str) -> None:
        arguments = self._arguments.text(_require(item.arguments, f"{field}.arguments"))
        call_id = _require(item.call_id, f"{field}.call_id")
        name = _require(item.name, f"{field}.name")
        self._in_assistant = True
        self._calls.append(ToolCall(call_id, name, arguments))
        self._call_ids.add(call_id)

    def _add_output(self, item: InputItem, field: str) -> None:
        if item.output is None:
            raise InvalidRequest(f"{field}.output is missing", field=f"{field}.output")
        output = _text(item.output, f"{field}.output")
        call_id = _require(item.call_id, f"{field}.call_id")
        turn = ChatMessage("tool", output, tool_call_id=call_id)
        check_answers(turn, self._call_ids, f"{field}.call_id")
        self._add_turn(turn)

    def _add_message(self, item: InputItem, field: str) -> None:
        if item.content is None:
            raise InvalidRequest(f"{field}.content is missing", field=f"{field}.content")
        text = _text(item.content, f"{field}.content")
        role = _require(item.role, f"{field}.role")
        if role == "assistant":
            self._in_assistant = True
            self._texts.append(text)
        else:
            self._add_turn(ChatMessage("system" if role == "developer" else role, text))

    def _add_turn(self, turn: ChatMessage) -> None:
        self._end_assistant()
        self._turns.append(turn)

    def _end_assistant(self) -> None:
        """Add the assistant's message, if its items came last."""
        if self._in_assistant:
            texts, thoughts = "".join(self._texts), "".join(self._thoughts)
            self._turns.append(ChatMessage("assistant", texts, thoughts, tuple(self._calls)))
            self._in_assistant = False
            self._texts, self._thoughts, self._calls = [], [], []


def _text(content: str | list[ResponsesContentPart], field: str) -> str:
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type not in TEXTS:
            raise InvalidRequest(
                f"{field}[{i}] has the type {part.type[:32]}; only text is supported", field=f"{field}[{i}]"
            )
    return "".join(part.text or part.refusal or "" for part in content)


def _require(value: str | None, field: str) -> str:
    if value is None:
        raise InvalidRequest(f"{field} is missing", field=field)
    return value
