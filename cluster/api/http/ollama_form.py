"""The bodies of Ollama's POST /api/chat and /api/generate, and their translation into parameters.

Ollama's defaults apply where they differ from OpenAI's: answers are streamed, and the temperature is 0.8.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias, TypedDict

from pydantic import AfterValidator, Field, ValidationInfo

from cluster.api.http.body import (
    Form,
    Hint,
    Ignored,
    JsonObject,
    ShortText,
    Text,
    Unset,
    hint,
    note_ignored,
)
from cluster.api.http.chat_form import FunctionTool, FunctionTools
from cluster.api.http.json_response import compact
from cluster.api.http.openai_formats import Name, decode_tool, schema_grammar
from cluster.api.http.sampling_form import Count, Seed, StopString, StopStrings, stop_list
from cluster.api.limits import MAX_TURN_CALLS
from cluster.api.requests import (
    TOOL_SCHEMA,
    ChatParams,
    Conversation,
    GenerateParams,
    SamplingOptions,
    grammar_names,
)
from cluster.core.errors import InvalidRequest
from cluster.core.limits import (
    LEAST_REPETITION_PENALTY,
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    MOST_REPETITION_PENALTY,
)
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, Tool, ToolCall

TEMPERATURE: Final = 0.8
TOP_K: Final = 40
TOP_P: Final = 0.9
"""Ollama's defaults."""
RANDOM_SEED: Final = -1
"""The seed that stands for a random one."""
_UNNAMED: Final = "call_without_id_"
"""The beginning of the id that a call without one gets."""
_OPTIONS: Final = {
    "max_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
}
"""The names of parameters among the options."""


def _note_window(value: int | None, info: ValidationInfo) -> int | None:
    """Note a window of the repetition penalty: here the penalty considers all tokens."""
    if value is not None and value > 0:
        note_ignored(info, f"options.{info.field_name}")
    return value


def _note_sampler(value: float | None, info: ValidationInfo) -> float | None:
    """Note a sampler that macpipe lacks, unless the value turns it off."""
    if value not in (None, 1.0):
        note_ignored(info, f"options.{info.field_name}")
    return value


def _note_given(value: float | str | None, info: ValidationInfo) -> float | str | None:
    """Note a field that was given, whatever its value."""
    if value is not None:
        note_ignored(info, info.field_name or "")
    return value


Sampler: TypeAlias = Annotated[float | None, AfterValidator(_note_sampler)]


class OllamaOptions(Form):
    """The options of a request. Those of loading a model, and samplers that macpipe lacks, are hints."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=LEAST_REPETITION_PENALTY, le=MOST_REPETITION_PENALTY)] | None = None
    repeat_last_n: Annotated[Annotated[int, Field(ge=-1, le=2**31 - 1)] | None, AfterValidator(_note_window)] = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    num_predict: Annotated[int, Field(ge=-2, le=2**31 - 1)] | None = None
    num_ctx: Count | None = None
    draft_num_predict: Count | None = None
    tfs_z: Sampler = None
    typical_p: Sampler = None
    mirostat: Hint = None
    mirostat_eta: Ignored = None
    mirostat_tau: Ignored = None
    penalize_newline: Hint = None
    num_keep: Hint = None
    num_batch: Hint = None
    num_gpu: Hint = None
    num_thread: Hint = None
    main_gpu: Hint = None
    numa: Hint = None
    low_vram: Hint = None
    f16_kv: Hint = None
    logits_all: Hint = None
    vocab_only: Hint = None
    embedding_only: Hint = None
    use_mmap: Hint = None
    use_mlock: Hint = None

    @property
    def max_tokens(self) -> int | None:
        """The maximum length in tokens; None, which is zero or less in Ollama, for as long as the context allows."""
        return self.num_predict if self.num_predict is not None and self.num_predict > 0 else None

    def sampling_options(self, *, logprobs: bool, top_logprobs: int) -> SamplingOptions:
        """Return the sampling options with Ollama's defaults."""
        return SamplingOptions(
            temperature=TEMPERATURE if self.temperature is None else self.temperature,
            top_p=TOP_P if self.top_p is None else self.top_p,
            top_k=TOP_K if self.top_k is None else max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=None if self.repeat_last_n == 0 else self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None or self.seed == RANDOM_SEED else self.seed % 2**64,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
        )


class OllamaForm(Form):
    """The fields that both bodies share. ``think`` is a hint: a template may be unable to switch reasoning."""

    model: Annotated[ShortText, Field(min_length=1)]
    stream: bool | None = None
    options: OllamaOptions | None = None
    format: Literal["", "json"] | JsonObject | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: Annotated[float | ShortText | None, AfterValidator(_note_given)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    truncate: Annotated[bool | None, hint("truncate")] = None
    shift: Annotated[bool | None, hint("shift")] = None
    debug_render_only: Annotated[Unset, Field(alias="_debug_render_only")] = None

    @property
    def is_streamed(self) -> bool:
        return self.stream is not False

    @property
    def unloads(self) -> bool:
        """Whether the model should be unloaded at once: ``keep_alive`` is a duration of zero."""
        given = self.keep_alive
        return not any(c in "123456789" for c in given) if isinstance(given, str) else given == 0

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields."""
        return {
            **{parameter: f"options.{option}" for parameter, option in _OPTIONS.items()},
            "enable_thinking": "think",
            "reasoning_effort": "think",
            **grammar_names("format"),
        }

    def chat_params(self, request_id: str, messages: Sequence[ChatMessage], tools: tuple[Tool, ...]) -> ChatParams:
        """Return the parameters of an answer to a conversation. Raises ``InvalidRequest``."""
        return ChatParams(conversation=Conversation(messages, self._chat_options(tools)), **self.answer(request_id))

    def answer(self, request_id: str) -> AnswerFields:
        """Return the parameters of every answer. Raises ``InvalidRequest``."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs requires logprobs to be true", field="top_logprobs")
        chosen = self.options or OllamaOptions()
        return AnswerFields(
            request_id=request_id,
            sampling=chosen.sampling_options(logprobs=bool(self.logprobs), top_logprobs=self.top_logprobs or 0),
            max_tokens=chosen.max_tokens,
            stop=stop_list(chosen.stop),
            grammar=self._grammar(),
            speculate=chosen.draft_num_predict != 0,
        )

    def _grammar(self) -> Grammar | None:
        if not isinstance(self.format, dict):
            return Grammar(GrammarKind.JSON_OBJECT) if self.format else None
        return schema_grammar(self.format)

    def _chat_options(self, tools: tuple[Tool, ...]) -> ChatOptions:
        return ChatOptions(
            tools=tools,
            enable_thinking=self.think if isinstance(self.think, bool) else None,
            thinking_is_hint=True,
            reasoning_effort=self.think if isinstance(self.think, str) else "",
        )


class AnswerFields(TypedDict):
    """The fields of ``AnswerParams`` that a request can set."""

    request_id: str
    sampling: SamplingOptions
    max_tokens: int | None
    stop: Sequence[str]
    grammar: Grammar | None
    speculate: bool


class OllamaFunction(Form):
    """A called function. ``index`` is its place among the calls of its message."""

    name: Name
    arguments: JsonObject | None = None
    index: Ignored = None
    description: Ignored = None


class OllamaCall(Form):
    """A tool call of an assistant. Older clients send no id."""

    function: OllamaFunction
    id: ShortText | None = None
    type: Literal["function", ""] | None = None


class OllamaMessage(Form):
    """One message. A tool's result names its call by id or, in older clients, by the tool's name."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TURN_CALLS, fail_fast=True)] | None = None
    tool_name: ShortText | None = None
    name: ShortText | None = None
    tool_call_id: ShortText | None = None
    images: Unset = None


Messages: TypeAlias = Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class OllamaChatForm(OllamaForm):
    """The body of /api/chat. Without messages it only loads or unloads the model."""

    messages: Messages | None = None
    tools: FunctionTools | None = None

    @property
    def asks(self) -> bool:
        """Whether the request asks for an answer."""
        return bool(self.messages)

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields. Without a format, a grammar comes from the tools."""
        grammar = {} if self.format else grammar_names("tools")
        return {**super().field_names(), "prompt": "messages", TOOL_SCHEMA: ".function.parameters", **grammar}

    def params(self, request_id: str) -> ChatParams:
        """Translate the body. Raises ``InvalidRequest``, naming the field."""
        calls = _OpenCalls()
        turns = [calls.decode(message, f"messages[{i}]") for i, message in enumerate(self.messages or ())]
        tools = tuple(_decode_tool(tool, f"tools[{i}].function") for i, tool in enumerate(self.tools or ()))
        return self.chat_params(request_id, turns, tools)


class OllamaGenerateForm(OllamaForm):
    """The body of /api/generate. Without a prompt it only loads or unloads the model.

    ``raw`` prompts are continued as they are. Others, after ``system``, become a conversation of one turn.
    """

    prompt: Text | None = None
    system: Text | None = None
    raw: bool | None = None
    suffix: Unset = None
    template: Unset = None
    context: Unset = None
    images: Unset = None
    width: Unset = None
    height: Unset = None
    steps: Unset = None

    @property
    def asks(self) -> bool:
        """Whether the request asks for an answer."""
        return bool(self.prompt)

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields."""
        return {**super().field_names(), "messages": "prompt"}

    def params(self, request_id: str) -> ChatParams | GenerateParams:
        """Translate the body. Raises ``InvalidRequest``, naming the field."""
        prompt = self.prompt or ""
        if not self.raw:
            system = [ChatMessage("system", self.system)] if self.system else []
            return self.chat_params(request_id, [*system, ChatMessage("user", prompt)], ())
        if self.system:
            raise InvalidRequest("a raw prompt has no system message; write it into the prompt", field="system")
        return GenerateParams(prompt=prompt, **self.answer(request_id))


class _OpenCalls:
    """Translates messages in order, and finds the call that a tool's result belongs to.

    A result without an id belongs to the first call of its tool that has no result yet, or else to the first call.
    """

    def __init__(self) -> None:
        self._known = set[str]()
        self._open: dict[str, None] = {}
        self._by_tool = defaultdict[str, deque[str]](deque)

    def decode(self, m: OllamaMessage, field: str) -> ChatMessage:
        """Translate a message. Raises ``InvalidRequest`` for a field that its role does not allow."""
        if m.role != "assistant" and m.tool_calls:
            raise InvalidRequest(
                f"{field} has the role {m.role}; only assistant messages may have tool_calls",
                field=f"{field}.tool_calls",
            )
        return ChatMessage(
            role=m.role,
            content=m.content or "",
            reasoning=(m.thinking or "") if m.role == "assistant" else "",
            tool_calls=tuple(self._add(call) for call in m.tool_calls or ()),
            tool_call_id=self._close(m, field) if m.role == "tool" else "",
            name=m.tool_name or m.name or "",
        )

    def _add(self, call: OllamaCall) -> ToolCall:
        name = call.function.name
        call_id = call.id or f"{_UNNAMED}{len(self._known)}"
        self._known.add(call_id)
        self._open[call_id] = None
        self._by_tool[name].append(call_id)
        return ToolCall(id=call_id, name=name, arguments=compact(call.function.arguments or {}))

    def _close(self, m: OllamaMessage, field: str) -> str:
        """Return the id of the call that a result belongs to. Raises ``InvalidRequest`` if there is none."""
        found = m.tool_call_id or self._first_open(m.tool_name or m.name or "")
        if found not in self._known:
            raise InvalidRequest(
                f"{field} is a tool's result, but no call before it is without one; send the assistant's message with "
                "the call, too",
                field=field,
            )
        self._open.pop(found, None)
        return found

    def _first_open(self, tool: str) -> str:
        waiting = self._by_tool.get(tool) or deque()
        while waiting and waiting[0] not in self._open:
            waiting.popleft()
        return waiting[0] if waiting else next(iter(self._open), "")


def _decode_tool(tool: FunctionTool, field: str) -> Tool:
    """Translate a tool. Raises ``InvalidRequest`` if its parameters are not a JSON Schema."""
    spec = tool.function
    if spec.parameters:
        spec = spec.model_copy(update={"parameters": _split_types(spec.parameters)})
    return decode_tool(spec, field)


def _split_types(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose properties have lists of types: Ollama's Python client joins them with commas."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return schema
    split = {
        name: {**one, "type": one["type"].split(", ")}
        for name, one in properties.items()
        if isinstance(one, dict) and isinstance(one.get("type"), str) and ", " in one["type"]
    }
    return {**schema, "properties": {**properties, **split}}
