"""The body of POST /v1/chat/completions, and its translation into parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from cluster.api.http.body import Form, Hint, Ignored, JsonObject, ShortText, Text, Unsupported, hint
from cluster.api.http.openai_formats import (
    ArgumentsReader,
    FunctionSpec,
    RejectAllowedTools,
    ResponseFormat,
    ServiceTier,
    check_answers,
    decode_grammar,
    decode_tool,
)
from cluster.api.http.reasoning_effort import Effort, decode_thinking, thinking_names
from cluster.api.http.sampling_form import Count, Positive, SamplingForm, stop_list
from cluster.api.limits import MAX_PARTS, MAX_TURN_CALLS, MAX_WORDS
from cluster.api.requests import TOOL_SCHEMA, ChatParams, Conversation, grammar_names
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_MESSAGES, MAX_SAMPLES, MAX_TOOL_NAME_CHARS, MAX_TOOLS, MAX_TOP_LOGPROBS
from cluster.core.request import ChatMessage, ChatOptions, ToolCall, ToolChoice


class ChatContentPart(Form):
    """A part of a message's content. Only text is supported; the other fields let errors name the part."""

    type: str
    text: Text | None = None
    refusal: Text | None = None
    image_url: Ignored = None
    input_audio: Ignored = None
    file: Ignored = None
    cache_control: Hint = None


class CalledFunction(Form):
    name: ShortText
    arguments: Text = "{}"


class Call(Form):
    """A tool call of an assistant. Clients that copied it from a stream also send ``index``."""

    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None


Parts: TypeAlias = Annotated[list[ChatContentPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Calls: TypeAlias = Annotated[list[Call], Field(max_length=MAX_TURN_CALLS, fail_fast=True)]


class ChatMessageForm(Form):
    """One message; ``decode_message`` checks the fields that only one role may have.

    An assistant's reasoning is accepted under both of its names. ``name`` goes to the model's template.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Parts | None = None
    name: Annotated[str, Field(max_length=MAX_TOOL_NAME_CHARS)] | None = None
    tool_calls: Calls | None = None
    tool_call_id: ShortText | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Ignored = None
    cache_control: Hint = None


MessageList: TypeAlias = Annotated[list[ChatMessageForm], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class FunctionTool(Form):
    type: Literal["function"]
    function: FunctionSpec
    cache_control: Hint = None


FunctionTools: TypeAlias = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class NamedFunction(Form):
    name: Annotated[str, Field(min_length=1)]


class ChatNamedTool(Form):
    type: Literal["function"]
    function: NamedFunction


class PredictionForm(Form):
    """Text that is expected of the answer."""

    type: Literal["content"]
    content: Text | Parts


class ChatStreamOptions(Form):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ChatForm(SamplingForm):
    """The body.

    It adds to OpenAI's fields: top_k, min_p, repetition_penalty, ignore_eos, chat_template_kwargs, priority, speculate.
    """

    model: ShortText | None = None
    messages: MessageList
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: ChatStreamOptions | None = None
    tools: FunctionTools | None = None
    tool_choice: Annotated[Literal["auto", "none", "required"] | ChatNamedTool | None, RejectAllowedTools] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: JsonObject | None = None
    priority: Annotated[Count, Field(le=9)] = 0
    store: Annotated[bool | None, hint("store")] = None
    service_tier: ServiceTier | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=MAX_WORDS, fail_fast=True)] | None = None
    metadata: Hint = None
    user: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_options: Hint = None
    prompt_cache_retention: Hint = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    moderation: Unsupported = None
    prediction: PredictionForm | None = None
    verbosity: Hint = None
    web_search_options: Hint = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def longest_answer(self) -> int | None:
        """The maximum length in tokens, under either name. Raises ``InvalidRequest`` if the two names differ."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old and new and old != new:
            raise InvalidRequest(
                f"max_tokens is {old} and max_completion_tokens is {new}; send one of them",
                field="max_completion_tokens",
            )
        return new or old

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields. Without a response format, a grammar comes from the tools."""
        return {
            "prompt": "messages",
            "max_tokens": "max_tokens" if self.max_tokens else "max_completion_tokens",
            "samples": "n",
            TOOL_SCHEMA: ".function.parameters",
            **thinking_names(self.chat_template_kwargs, "reasoning_effort"),
            **grammar_names("response_format" if self.response_format else "tools"),
        }

    def params(self, request_id: str) -> ChatParams:
        """Translate the body. Raises ``InvalidRequest``, naming the field."""
        if self.stream_options and not self.stream:
            raise InvalidRequest("stream_options requires stream to be true", field="stream_options")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs requires logprobs to be true", field="top_logprobs")
        return ChatParams(
            request_id=request_id,
            conversation=Conversation(decode_messages(self.messages), self._options()),
            sampling=self.sampling_options(logprobs=bool(self.logprobs), top_logprobs=self.top_logprobs or 0),
            max_tokens=self.longest_answer,
            stop=stop_list(self.stop),
            ignore_eos=self.ignore_eos,
            priority=self.priority,
            samples=self.samples,
            grammar=decode_grammar(self.response_format),
            prediction=join_text(self.prediction.content, "prediction.content") if self.prediction else "",
            speculate=self.speculate is not False,
        )

    def _options(self) -> ChatOptions:
        thinking = decode_thinking(self.reasoning_effort, self.chat_template_kwargs, "reasoning_effort")
        choice = self.tool_choice or "auto"
        return ChatOptions(
            tools=tuple(decode_tool(t.function, f"tools[{i}].function") for i, t in enumerate(self.tools or ())),
            tool_choice=ToolChoice.NAMED if isinstance(choice, ChatNamedTool) else ToolChoice(choice),
            tool_name=choice.function.name if isinstance(choice, ChatNamedTool) else "",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            enable_thinking=thinking.enable,
            thinking_is_hint=thinking.is_hint,
            reasoning_effort=thinking.effort,
            template=thinking.template,
        )


def decode_messages(messages: Sequence[ChatMessageForm]) -> list[ChatMessage]:
    """Translate a conversation. Raises ``InvalidRequest``, also for a tool message that answers no earlier call."""
    turns: list[ChatMessage] = []
    arguments = ArgumentsReader()
    call_ids = set[str]()
    for i, message in enumerate(messages):
        turn = decode_message(message, f"messages[{i}]", arguments)
        check_answers(turn, call_ids, f"messages[{i}].tool_call_id")
        call_ids.update(call.id for call in turn.tool_calls)
        turns.append(turn)
    return turns


def decode_message(m: ChatMessageForm, field: str, arguments: ArgumentsReader) -> ChatMessage:
    """Translate one message. Raises ``InvalidRequest`` for a field that its role requires or does not allow."""
    if m.role != "assistant" and m.content is None:
        raise InvalidRequest(f"{field} has no content; send its text", field=f"{field}.content")
    if m.role != "assistant" and m.tool_calls:
        raise InvalidRequest(
            f"{field} has the role {m.role}; only assistant messages may have tool_calls", field=f"{field}.tool_calls"
        )
    if m.role == "tool" and not m.tool_call_id:
        raise InvalidRequest(
            f"{field} has no tool_call_id; send the id of the call that it answers", field=f"{field}.tool_call_id"
        )
    if m.role != "tool" and m.tool_call_id:
        raise InvalidRequest(
            f"{field} has the role {m.role}; only tool messages may have tool_call_id", field=f"{field}.tool_call_id"
        )
    return ChatMessage(
        role="system" if m.role == "developer" else m.role,
        content=join_text(m.content, f"{field}.content"),
        reasoning=m.reasoning_content or m.reasoning or "",
        tool_calls=tuple(_call(call, arguments) for call in m.tool_calls or ()),
        tool_call_id=m.tool_call_id or "",
        name=m.name or "",
    )


def _call(call: Call, arguments: ArgumentsReader) -> ToolCall:
    return ToolCall(id=call.id, name=call.function.name, arguments=arguments.text(call.function.arguments))


def join_text(content: str | list[ChatContentPart] | None, field: str) -> str:
    """Return the text of a message's content. Raises ``InvalidRequest`` for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for i, part in enumerate(content):
        if part.type not in ("text", "refusal"):
            raise InvalidRequest(
                f"{field}[{i}] has the type {part.type[:32]}; only text is supported", field=f"{field}[{i}]"
            )
        if part.text is None and part.refusal is None:
            raise InvalidRequest(f"{field}[{i}] has no text; send some, or leave it out", field=f"{field}[{i}].text")
    return "".join(part.text or part.refusal or "" for part in content)
