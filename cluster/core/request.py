"""What a client asks for and what it is told: requests, sampling, chats, grammars, and events."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.core.plan import LayerRange


class GrammarKind(StrEnum):
    """What a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must be. ``source`` is the schema as JSON text, the regex, or Lark; "" for any JSON object.

    ``free_until`` are the token ids that end the part before it which is not constrained, the reasoning; () where the
    answer's first token is.
    """

    kind: GrammarKind
    source: str = ""
    free_until: tuple[int, ...] = ()


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


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the last stage picks a token; the defaults are greedy decoding without penalties.

    ``repetition_penalty`` looks at the prompt and the answer; ``presence_penalty`` and ``frequency_penalty`` look at
    the answer alone, as OpenAI defines them. ``logit_bias`` holds pairs of token id and bias. ``logprobs`` asks for
    the chosen token's log-probability, ``top_logprobs`` for that many alternatives too. The draw for a token depends
    on ``seed`` and the token's position alone. A ``grammar`` rules out, before any other filter, every token with
    which the answer could no longer become what it says; log-probabilities are those among the tokens that are left.
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


class FinishReason(StrEnum):
    """Why an answer is complete; whatever ends one early is an error instead."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Accepted:
    """First event of an answer: the request has a lane or a place in the queue."""


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request, tokenized. ``deadline`` is in the injected clock's seconds; None means no deadline.

    ``client`` is whose it is: turns are shared between clients, and kept prefixes stay with theirs. A request of
    priority n counts for 1 / (1 + n) of its cost when turns are shared. ``samples`` answers are asked for, each with a
    seed of its own; sample 0 is what one alone would be. ``parsing`` None leaves the answer's text as it is; with
    ``stage_timings`` every token tells where its time went.
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


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position, most probable first."""

    token: int
    logprob: float
    text: str = ""
    """Only clients are told it; stages and the coordinator know the id."""


@dataclass(frozen=True, slots=True)
class StageFigures:
    """Milliseconds of a request, or of a token, on one stage; ``wire_ms`` is its share of the ring's outside stages."""

    worker: str
    layers: LayerRange
    compute_ms: float
    wire_ms: float
    wait_ms: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Token ``index`` of answer ``sample``. ``text`` is what became printable with it: whole characters, perhaps none.

    Where the answer is parsed, that is content alone; reasoning before it and calls after it stand beside it.
    ``stages``: the frames since the token before, if asked for. ``cached_tokens`` of the prompt were kept from before.
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


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of a complete answer, one a sample. ``stop`` is the stop string that ended it, if one did."""

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
