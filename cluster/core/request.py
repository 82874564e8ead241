"""Requests and their events: sampling, chats, grammars, tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from types import MappingProxyType
from typing import Final

from cluster.core.limits import LEAST_REPETITION_PENALTY, MOST_REPETITION_PENALTY
from cluster.core.plan import LayerRange


class GrammarKind(StrEnum):
    """The notation of a grammar."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on an answer. ``source`` is the schema as JSON text, the regex or Lark; "" for any JSON object.

    ``free_until`` are the token ids that end the unconstrained part before it, the reasoning; () if the constraint
    starts at the first token.
    """

    kind: GrammarKind
    source: str = ""
    free_until: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON Schema (an object) of its arguments, as text."""

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call in a conversation. ``arguments`` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; ``role`` is system, user, assistant or tool.

    An assistant's may have ``reasoning`` and ``tool_calls``; a tool's names the call that it answers, and the tool.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


def prompt_size(messages: Iterable[ChatMessage], tools: Iterable[Tool]) -> int:
    """Return the bytes, in UTF-8, of all texts that a template may put into the prompt."""
    size = sum(utf8_size(tool.name) + utf8_size(tool.description) + utf8_size(tool.parameters) for tool in tools)
    for m in messages:
        size += utf8_size(m.content) + utf8_size(m.reasoning) + utf8_size(m.tool_call_id) + utf8_size(m.name)
        for call in m.tool_calls:
            size += utf8_size(call.id) + utf8_size(call.name) + utf8_size(call.arguments)
    return size


def utf8_size(text: str) -> int:
    """Return the bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of call ``index`` of an answer.

    The first piece alone has ``id`` and ``name``; the text of ``arguments`` follows in pieces.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolChoice(StrEnum):
    """Whether an answer may, must not, or must call tools; ``NAMED`` must call one particular tool."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation becomes a prompt, and what its answer may be.

    ``tool_name`` is for ``ToolChoice.NAMED``. ``enable_thinking`` None and ``reasoning_effort`` "" use the template's
    defaults. ``thinking_is_hint``: a template that cannot switch thinking may ignore the former. ``template`` is a JSON
    object as text: further arguments of the model's chat template.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str = ""
    parallel_tool_calls: bool = True
    enable_thinking: bool | None = None
    thinking_is_hint: bool = False
    reasoning_effort: str = ""
    template: str = ""

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that are shown to the model: none if it must not call any."""
        return () if self.tool_choice is ToolChoice.NONE else self.tools


@dataclass(frozen=True, slots=True)
class Parsing:
    """What to extract from an answer's text: always reasoning, and calls if there are ``tools``.

    ``thinking``: the prompt ends inside the reasoning, so the answer starts there.
    """

    tools: tuple[Tool, ...] = ()
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the last stage chooses a token; the defaults are greedy decoding without penalties.

    ``repetition_penalty`` considers the prompt and the answer; ``presence_penalty`` and ``frequency_penalty`` consider
    the answer alone, as OpenAI defines them. ``logit_bias`` has pairs of token id and bias. ``logprobs`` requests the
    chosen token's log-probability, ``top_logprobs`` that many alternatives too. The draw for a token depends only on
    ``seed`` and the token's position. Before any other filter, a ``grammar`` excludes every token after which the
    answer could no longer match it; log-probabilities are those among the remaining tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    grammar: Grammar | None = None


SAMPLING_RANGES: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "temperature": (0.0, 2.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (LEAST_REPETITION_PENALTY, MOST_REPETITION_PENALTY),
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
    }
)
"""The least and the greatest value that a request may have for a sampling parameter."""


class FinishReason(StrEnum):
    """Why an answer is complete. An answer that ends early has an error instead."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Accepted:
    """First event of an answer: the request was accepted to a lane or to the queue."""


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request, tokenized. ``deadline`` is in the injected clock's seconds; None means no deadline.

    ``client`` is its owner: turns are shared between clients, and kept prefixes are never shared between them. A
    request of priority n counts for 1 / (1 + n) of its cost when turns are shared. ``samples`` is the number of
    answers, each with its own seed; sample 0 equals the answer of a request for one. ``parsing`` None leaves the
    answer's text as it is. With ``stage_timings`` every token has its time per stage. ``split_points`` are ascending
    lengths at which later prompts are likely to part from this one, ``borders`` those at which a message, a tool
    or a section begins; they save work and change no token.
    ``prediction`` holds the tokens that the client expects of the answer; they save time and change no token. Without
    ``speculate`` no token of the answer is guessed before it is sampled.
    ``prompt_logprobs`` is the number of alternatives to report with each prompt token's log-probability; None reports
    no log-probability of the prompt. ``max_tokens`` may be 0 only with ``prompt_logprobs``. ``adapter`` is the key of
    the adapter that answers, "" for the model alone. ``embeds``: the answer is one token, which comes with the hidden
    state of the prompt's end. ``is_canary``: the coordinator sends it to prove the stages of one engine loop, so it is
    neither counted, nor journalled, nor moved to another loop. ``resumable``: its client resumes the answer if the
    call breaks, so a journal keeps it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    deadline: float | None = None
    client: str = ""
    priority: int = 0
    samples: int = 1
    parsing: Parsing | None = None
    stage_timings: bool = False
    split_points: tuple[int, ...] = ()
    borders: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    prediction: tuple[int, ...] = ()
    speculate: bool = True
    adapter: str = ""
    embeds: bool = False
    is_canary: bool = False
    resumable: bool = False


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position, most probable first."""

    token: int
    logprob: float
    text: str = ""
    """Only for clients; stages and the coordinator know the id."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The log-probabilities of consecutive prompt tokens, each given all tokens before it.

    They are those of the model's own distribution, without temperature, bias or penalties. ``start`` is the index of
    the first of these tokens in the prompt; the prompt's first token has none. ``logprobs`` has one value per token.
    ``top_tokens`` and ``top_logprobs`` hold the same number of alternatives for each token, most probable first. They
    are flat, since a chunk has ten thousand of them.
    """

    start: int
    logprobs: tuple[float, ...]
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    def top(self, i: int) -> tuple[TopLogprob, ...]:
        """Return the possible alternatives of the ``i``-th of these tokens, most probable first."""
        count = len(self.top_tokens) // len(self.logprobs)
        own = range(i * count, (i + 1) * count)
        return tuple(TopLogprob(self.top_tokens[j], p) for j in own if isfinite(p := self.top_logprobs[j]))

    def split(self, most: int) -> Iterator[PromptLogprobs]:
        """Yield the same in pieces of at most ``most`` tokens."""
        count = len(self.top_tokens) // len(self.logprobs)
        for first in range(0, len(self.logprobs), most):
            own, tops = slice(first, first + most), slice(first * count, (first + most) * count)
            yield PromptLogprobs(self.start + first, self.logprobs[own], self.top_tokens[tops], self.top_logprobs[tops])


@dataclass(frozen=True, slots=True)
class StageFigures:
    """Milliseconds of a request or a token on one stage; ``wire_ms`` is its share of the ring's time outside stages."""

    worker: str
    layers: LayerRange
    compute_ms: float
    wire_ms: float
    wait_ms: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Token ``index`` of answer ``sample``. ``text`` is the text that it completed: whole characters, or none.

    In a parsed answer ``text`` is content alone; reasoning and calls have their own fields. ``stages`` has the frames
    since the previous token, if requested. ``cached_tokens`` of the prompt came from a kept prefix.
    """

    index: int
    token: int
    text: str
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    sample: int = 0
    stages: tuple[StageFigures, ...] = ()
    cached_tokens: int = 0
    guess: str = ""
    """What guessed the token before it was sampled; "" if nothing did."""
    state: bytes = b""
    """The hidden state behind the token as little-endian float32, if its request embeds."""


@dataclass(frozen=True, slots=True)
class SkippedText:
    """Text of answer ``sample`` that its reader already has, for the parser of the text that follows."""

    sample: int
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. Those of its prediction that were computed ahead are the answer's, or were rejected."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of a complete answer, one per sample. ``stop`` is the stop string that ended it, if any.

    ``end`` is the end-of-sequence token that ended it, if any; it is not part of the answer.
    """

    reason: FinishReason
    text: str
    usage: Usage
    ttft_ms: float
    tpot_ms: float
    stages: tuple[StageFigures, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    sample: int = 0
    stop: str = ""
    end: TokenEvent | None = None
