"""The parts of an answer as a client sees them: frozen dataclasses without protobuf. Times are in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.request import FinishReason, StageFigures, ToolCall, ToolCallDelta, TopLogprob, Usage
from cluster.core.request import TokenEvent as Token

__all__ = [
    "AcceptedRequest",
    "Choice",
    "Completion",
    "Embeddings",
    "Finish",
    "Model",
    "PromptToken",
    "Timings",
    "Token",
    "Tokens",
]


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """The acceptance of a request: its id, model and prompt length, and the effective seed and token limit.

    ``fallback`` is the name of the model that answers if the requested one cannot be served now, else "".
    """

    request_id: str
    model: str
    prompt_tokens: int
    seed: int
    max_tokens: int
    samples: int = 1
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of the prompt. ``logprob`` is given all tokens before it; None for the first token."""

    token: int
    text: str
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Speed of an answer. ``ttft_ms``: acceptance to first token. ``tpot_ms``: mean time between later tokens."""

    ttft_ms: float
    tpot_ms: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a complete answer. ``text`` is its last text, which no token carried: it could have become a stop."""

    reason: FinishReason
    text: str
    usage: Usage
    timings: Timings
    stages: tuple[StageFigures, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """One complete sample. ``tool_calls`` are the calls that the model requests."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[int, ...]
    events: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer. ``tokens`` holds token ids, ``events`` the tokens with their texts and log-probabilities.

    ``text`` ends before a stop string; ``tokens`` may extend to the token that completed it. With several samples, the
    fields describe the first one, and ``choices`` holds all of them. ``prompt_logprobs`` has every token of the prompt,
    if the request asked for them.
    """

    text: str
    tokens: tuple[int, ...]
    events: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    stages: tuple[StageFigures, ...]
    seed: int
    request_id: str
    model: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    choices: tuple[Choice, ...] = ()
    prompt_logprobs: tuple[PromptToken, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The embedding of each input, in their order, and the tokens of all inputs."""

    model: str
    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized text. ``texts`` is for display: a byte that is not a whole character shows as U+FFFD."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Model:
    """A model, or it with an adapter (``BASE:NAME``). ``max_context`` is in tokens of prompt and answer.

    If it is configured but not loaded, ``loaded`` is False, and figures and fingerprint are unknown.
    """

    id: str
    layers: int
    max_context: int
    fingerprint: str
    loaded: bool = True
