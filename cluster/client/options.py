"""Options of a request and their protobuf encoding.

It checks only what protobuf cannot represent: types, signs and sizes. The coordinator checks the rest, so that the
rules exist in one place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

from cluster.core.errors import InvalidRequest
from cluster.core.plan import Objective, Route, Speculation
from cluster.core.request import Tool
from cluster.v1 import inference_pb2 as pb

INT32_MAX: Final = 2**31 - 1
UINT32_MAX: Final = 2**32 - 1
UINT64_MAX: Final = 2**64 - 1


class Options(TypedDict, total=False):
    """Keywords of every method that generates an answer. None or a missing key means the coordinator's default.

    ``max_tokens`` limits the answer (default 512). ``stop`` is one string or several. ``ignore_eos`` continues past the
    model's end-of-sequence token. ``temperature`` 0, the default, is greedy. ``logprobs`` reports each token's
    log-probability, ``top_logprobs`` that many alternatives. ``request_id`` identifies the request for ``abort``; if it
    is empty, the coordinator generates one. ``samples`` is the number of answers. At most one of ``json_schema``,
    ``json_object``, ``regex`` and ``lark`` constrains the answer. ``priority`` (0 to 9) moves a request ahead in the
    fair queue. ``stage_timings`` adds the stages' timings to every token. ``prediction`` is text that the answer may
    repeat: it saves time and changes no token. ``speculate`` False lets no token be guessed before it is sampled.
    ``adapter`` names the adapter that answers, as a ``model`` of the form ``BASE:NAME`` does.
    ``timeout_s`` is the deadline of the whole answer; it overrides the client's ``timeout_s``.
    """

    model: str
    max_tokens: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: bool | None
    top_logprobs: int | None
    request_id: str
    timeout_s: float | None
    priority: int
    samples: int
    json_schema: Mapping[str, object] | str
    json_object: bool
    regex: str
    lark: str
    stage_timings: bool
    prediction: str
    speculate: bool | None
    adapter: str


class GenerateKeywords(Options, total=False):
    """Keywords of ``generate`` in addition to those of Options.

    ``prompt_logprobs`` reports the log-probability of each token of the prompt, and that many alternatives.
    ``max_tokens`` may then be 0.
    """

    prompt_logprobs: int | None


class ChatKeywords(Options, total=False):
    """Keywords of ``chat`` in addition to those of Options.

    ``tools`` lists the tools that the model may call: Tool, or a mapping in the form of OpenAI's API. ``tool_choice``
    is "auto", "none", "required" or a tool's name. ``parallel_tool_calls`` False allows at most one call.
    ``enable_thinking``, ``reasoning_effort`` and ``chat_template_kwargs`` are passed to the model's chat template; a
    template may ignore them.
    """

    tools: Sequence[Tool | Mapping[str, object]]
    tool_choice: str
    parallel_tool_calls: bool | None
    enable_thinking: bool | None
    reasoning_effort: str
    chat_template_kwargs: Mapping[str, object] | None


class LoadOptions(TypedDict, total=False):
    """Keywords of ``load``. None or a missing key means the coordinator's default.

    ``workers`` is how many to use: those that are best for ``objective`` (``latency`` or ``throughput``). ``layers``
    sets the ranges, as in ``0-3,4-7``; the default is the planner's. ``lanes`` defaults to one per stage.
    ``max_step_ms`` limits a prefill chunk's time on a stage while others decode; the default of it and of
    ``max_context`` is what the coordinator was started with. ``kv_bits`` 8 or 4 quantises KV
    caches. ``quantize`` has each worker quantise its weights to so many bits while it loads them. ``prefill_chunk`` is
    the tokens of a prompt chunk while nobody decodes; the default follows from measured cost and memory.
    ``take_back`` returns a lost worker's layers to it when it comes back. ``acceptance`` (0 to 1) plans for one user
    whose guessed tokens are right this often. ``speculate`` (``off``, ``auto``, ``ngram`` or ``draft``) says what
    guesses tokens before they are sampled, and ``draft`` names the draft model. ``exact`` False lets a
    frame verify several guesses where that is cheap: tokens may then differ where two nearly tie. ``adapters`` maps
    names to folders on the coordinator's Mac, each with an adapter of mlx-lm. ``groups`` has tuples of workers' names,
    each of which share the layers of one stage; ``insecure_links`` those that may do so over links that are neither
    authenticated nor encrypted. ``name`` is the name under which requests
    find the model; the default is its configured name, or that of the only model, which is replaced.
    """

    workers: int | None
    layers: str
    route: Route | str
    max_context: int | None
    lanes: int | None
    max_step_ms: float | None
    prefill_chunk: int | None
    kv_bits: int
    quantize: int
    objective: Objective | str
    speculate: Speculation | str
    draft: str
    exact: bool
    take_back: bool
    acceptance: float
    adapters: Mapping[str, str]
    groups: Sequence[Sequence[str]]
    insecure_links: Sequence[Sequence[str]]
    name: str


@dataclass(frozen=True, slots=True)
class ModelToPlan:
    """A model that ``plan_models`` plans with others. ``options`` are those of ``load``.

    ``name`` is how the plan calls it; "": its id, or the last part of its folder. One that is ``pinned`` has to fit,
    even if others are slower then. Of two models, the one with the higher ``priority`` is more important, else the
    first one. ``replicas`` is how many of it are to be loaded, the first one included; None: as many as there are
    idle Macs for.
    """

    model: str
    name: str = ""
    pinned: bool = False
    priority: int = 0
    replicas: int | None = 1
    options: LoadOptions = field(default_factory=LoadOptions)


def encode_sampling(options: Options) -> pb.SamplingOptions:
    """Encode the sampling fields of ``options``. Raise InvalidRequest naming the field."""
    values: dict[str, Any] = {
        name: check(name, options[name])  # type: ignore[literal-required]
        for name, check in SAMPLING_FIELDS.items()
        if options.get(name) is not None
    }
    return pb.SamplingOptions(**values)


def encode_stop(options: Options) -> pb.StopOptions:
    """Encode the stop conditions of ``options``. Raise InvalidRequest naming the field."""
    stop = options.get("stop") or ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    bound = options.get("max_tokens")
    return pb.StopOptions(
        max_tokens=None if bound is None else check_whole_number("max_tokens", bound),
        stop=[check_text("stop", one) for one in strings],
        ignore_eos=check_bool("ignore_eos", options.get("ignore_eos") or False),
    )


def encode_speculate(options: Options) -> bool | None:
    """Encode whether tokens may be guessed; None leaves it to the coordinator. Raise InvalidRequest."""
    given = options.get("speculate")
    return None if given is None else check_bool("speculate", given)


def encode_grammar(options: Options) -> pb.Grammar | None:
    """Encode the grammar of ``options``. Raise InvalidRequest naming the field, also if there is more than one."""
    given = [name for name in ("json_schema", "json_object", "regex", "lark") if options.get(name)]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} cannot be combined; give only one of them", field=given[1])
    match given[0]:
        case "json_object":
            return pb.Grammar(json_object=check_bool("json_object", options["json_object"]))
        case "json_schema":
            return pb.Grammar(json_schema=encode_json("json_schema", options["json_schema"]))
        case "regex":
            return pb.Grammar(regex=check_text("regex", options["regex"]))
        case _:
            return pb.Grammar(lark=check_text("lark", options["lark"]))


def encode_json(field: str, value: object) -> str:
    """Return ``value`` as JSON text. It is a mapping, or already JSON text."""
    if isinstance(value, str):
        return check_text(field, value)
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{field} must be a mapping or JSON text, not {type(value).__name__}", field=field)
    try:
        return check_text(field, json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} cannot be written as JSON: {error}", field=field) from error


def check_names(options: Mapping[str, object], known: type = Options) -> None:
    """Raise TypeError for an unknown keyword, as Python does for a function call."""
    unknown = options.keys() - known.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}")


def check_text(field: str, value: object) -> str:
    """Return ``value`` if it is a ``str`` without lone surrogates, so that UTF-8 can encode it."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} must be text, not {type(value).__name__}", field=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field} holds a lone surrogate, which UTF-8 cannot encode", field=field) from None
    return value


def check_whole_number(field: str, value: object, most: int = UINT32_MAX) -> int:
    """Return ``value`` if it is an integer from 0 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{field} must be a whole number, not {value!r}", field=field)
    if not 0 <= value <= most:
        raise InvalidRequest(f"{field} must be from 0 to {most}, not {value}", field=field)
    return value


def check_seed(field: str, value: object) -> int:
    """Return ``value`` if it is a seed: an unsigned 64-bit integer."""
    return check_whole_number(field, value, UINT64_MAX)


def check_number(field: str, value: object) -> float:
    """Return ``value`` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{field} must be a number, not {value!r}", field=field)
    return float(value)


def check_bool(field: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"{field} must be True or False, not {value!r}", field=field)
    return value


def check_biases(field: str, value: object) -> dict[int, float]:
    """Return ``value`` if it maps token ids to finite numbers."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{field} must map token ids to numbers, not {value!r}", field=field)
    return {check_whole_number(field, token): check_number(field, bias) for token, bias in value.items()}


SAMPLING_FIELDS: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "temperature": check_number,
    "top_p": check_number,
    "top_k": check_whole_number,
    "min_p": check_number,
    "repetition_penalty": check_number,
    "presence_penalty": check_number,
    "frequency_penalty": check_number,
    "logit_bias": check_biases,
    "seed": check_seed,
    "logprobs": check_bool,
    "top_logprobs": check_whole_number,
}
