"""What a client is told about an answer. Frozen, typed, free of protobuf.

Times are milliseconds. It knows nothing of how an answer arrives.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.request import FinishReason, StageFigures, ToolCall, ToolCallDelta, TopLogprob, Usage


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. ``text`` is what became printable with it: whole characters, perhaps none.

    ``index`` counts from 0 in each ``sample``. ``logprob`` and ``top`` are there when they were asked for. In a chat
    ``text`` is content; what became known of the reasoning and of calls of tools stands beside it. ``stages`` are there
    where ``stage_timings`` asked for them: what the frames since the token before took.
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


@dataclass(frozen=True, slots=True)
class Prompt:
    """The request was accepted: its id, the model that answers, and the seed and bound that apply."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int
    max_tokens: int
    samples: int = 1


@dataclass(frozen=True, slots=True)
class Timings:
    """``ttft_ms`` runs from acceptance to the first token, ``tpot_ms`` is the mean between later ones."""

    ttft_ms: float
    tpot_ms: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a complete answer. ``text`` was held back until now: it could have become a stop string."""

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
    """One of the answers of a prompt, whole. ``tool_calls`` are those that the model wants to be made."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[int, ...]
    events: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. ``tokens`` are its ids, ``events`` the tokens with their texts and log-probabilities.

    ``text`` ends before a stop string; ``tokens`` may go on to where it was recognised. Where several samples were
    asked for, these are of the first, and ``choices`` has all of them.
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

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as the model would read it; ``texts`` are for people (a byte that is no character shows as U+FFFD)."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is being served. ``max_context`` counts tokens of prompt and answer together."""

    id: str
    layers: int
    max_context: int
    fingerprint: str
