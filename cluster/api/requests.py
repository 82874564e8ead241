"""The parameters of a request, as plain types that gRPC and HTTP each build from their own form.

They hold what the client sent; None means that it left the parameter out. ``request_validation`` checks the values,
fills in defaults, and names a parameter in its errors by the name that it has here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cluster.core.errors import InvalidRequest
from cluster.core.limits import DEFAULT_MAX_TOKENS
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, Request

TOOL_SCHEMA: Final = "tools[]"
"""In a mapping of names: the path from a tool to its schema, for errors whose field is ``tools[i]``."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and its deadline.

    ``client`` names the caller for fair queueing and cached prefixes. ``deadline`` is in seconds of the monotonic
    clock; None means no deadline. ``default_max_tokens`` applies if the request has no max_tokens; None means as many
    as the context allows. ``shorten``: a max_tokens that does not fit the context is lowered to what fits. ``strict``:
    hints that have no effect are errors.
    """

    client: str
    deadline: float | None
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS
    shorten: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are sampled. ``logit_bias`` maps token ids to biases."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerParams:
    """The parameters of every answer, whatever its prompt.

    ``prediction`` is text that the client expects of it. ``speculate`` False lets no token be guessed. ``resumable``:
    the client resumes the answer if the call breaks.
    """

    request_id: str = ""
    sampling: SamplingOptions = SamplingOptions()
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    priority: int = 0
    samples: int = 1
    grammar: Grammar | None = None
    stage_timings: bool = False
    prediction: str = ""
    speculate: bool = True
    resumable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateParams(AnswerParams):
    """The continuation of a prompt, given as text or as token ids.

    ``prompt_logprobs`` asks for the log-probability of each prompt token, and for that many alternatives. ``embeds``
    asks for the hidden state of the prompt's end instead of an answer.
    """

    prompt: str | Sequence[int]
    prompt_logprobs: int | None = None
    embeds: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and how the model's chat template turns them into a prompt."""

    messages: Sequence[ChatMessage]
    options: ChatOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatParams(AnswerParams):
    """The next message of a conversation."""

    conversation: Conversation


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready to be submitted. ``ignored`` are the parameters that have no effect on this model."""

    request: Request
    ignored: tuple[str, ...] = ()


@contextmanager
def rename_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the field of an ``InvalidRequest`` to the name that this client's form has for it.

    ``names`` maps the parameters' names to the form's; a parameter that it lacks keeps its name.
    """
    try:
        yield
    except InvalidRequest as e:
        tool = e.field.startswith("tools[") and e.field.endswith("]")
        e.field = f"{e.field}{names.get(TOOL_SCHEMA, '')}" if tool else names.get(e.field, e.field)
        raise


def grammar_names(field: str) -> dict[str, str]:
    """Return a mapping of the names of every kind of grammar to ``field``, for ``rename_fields``."""
    return dict.fromkeys((kind.value for kind in GrammarKind), field)
