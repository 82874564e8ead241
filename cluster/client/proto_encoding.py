"""Encodes a caller's requests as protobuf. It does no I/O, so both clients share it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from cluster.client.chat_encoding import Turn, encode_messages, encode_template
from cluster.client.options import (
    INT32_MAX,
    ChatKeywords,
    GenerateKeywords,
    LoadOptions,
    ModelToPlan,
    check_bool,
    check_names,
    check_number,
    check_text,
    check_whole_number,
    encode_grammar,
    encode_sampling,
    encode_speculate,
    encode_stop,
)
from cluster.codec.plan import OBJECTIVES, ROUTES, SPECULATIONS, encode_groups
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_CONTROL_BYTES, MIB
from cluster.core.plan import Objective, Route, Speculation
from cluster.v1 import cluster_pb2, inference_pb2

PromptInput = str | Sequence[int]
"""Text, or token ids."""

M = TypeVar("M", bound=Message)


def encode_generate(prompt: PromptInput, options: GenerateKeywords) -> inference_pb2.GenerateRequest:
    """Encode ``generate``. Raise InvalidRequest naming a field that cannot be sent, TypeError for an unknown option."""
    check_names(options, GenerateKeywords)
    scored = options.get("prompt_logprobs")
    request = inference_pb2.GenerateRequest(
        request_id=check_text("request_id", options.get("request_id") or ""),
        model=check_text("model", options.get("model") or ""),
        adapter=check_text("adapter", options.get("adapter") or ""),
        sampling=encode_sampling(options),
        stop=encode_stop(options),
        priority=check_whole_number("priority", options.get("priority") or 0),
        samples=check_whole_number("samples", options.get("samples") or 0),
        stage_timings=bool(options.get("stage_timings")),
        grammar=encode_grammar(options),
        prediction=check_text("prediction", options.get("prediction") or ""),
        speculate=encode_speculate(options),
        prompt_logprobs=None if scored is None else check_whole_number("prompt_logprobs", scored),
    )
    if isinstance(prompt, str):
        request.text = check_text("prompt", prompt)
    else:
        request.tokens.ids.extend(_token_ids(prompt))
        request.tokens.SetInParent()
    return _check_size(request, "prompt")


def encode_chat(messages: Iterable[Turn], options: ChatKeywords) -> inference_pb2.ChatRequest:
    """Encode ``chat``. Raise InvalidRequest naming a field that cannot be sent, TypeError for an unknown option."""
    check_names(options, ChatKeywords)
    request = inference_pb2.ChatRequest(
        request_id=check_text("request_id", options.get("request_id") or ""),
        model=check_text("model", options.get("model") or ""),
        adapter=check_text("adapter", options.get("adapter") or ""),
        messages=encode_messages(messages),
        sampling=encode_sampling(options),
        stop=encode_stop(options),
        priority=check_whole_number("priority", options.get("priority") or 0),
        samples=check_whole_number("samples", options.get("samples") or 0),
        stage_timings=bool(options.get("stage_timings")),
        grammar=encode_grammar(options),
        prediction=check_text("prediction", options.get("prediction") or ""),
        speculate=encode_speculate(options),
        template=encode_template(options),
    )
    return _check_size(request, "messages")


def make_resumable(request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest) -> None:
    """Have the coordinator keep the answer for a client that calls again if the call breaks."""
    request.request_id = request.request_id or uuid.uuid4().hex
    request.resumable = True


def encode_tokenize(given: str | Iterable[Turn], model: str) -> inference_pb2.TokenizeRequest:
    """Encode ``tokenize``: a text, or messages to which the chat template is applied."""
    request = inference_pb2.TokenizeRequest(model=check_text("model", model))
    if isinstance(given, str):
        request.text = check_text("text", given)
    else:
        request.messages.extend(encode_messages(given))
    return _check_size(request, "text" if isinstance(given, str) else "messages")


def encode_embed(inputs: str | Sequence[PromptInput], model: str, dimensions: int | None) -> inference_pb2.EmbedRequest:
    """Encode ``embed``. Raise InvalidRequest naming a field that cannot be sent."""
    several: Sequence[PromptInput] = [inputs] if isinstance(inputs, str) else inputs
    request = inference_pb2.EmbedRequest(
        model=check_text("model", model),
        inputs=map(_encode_input, several),
        dimensions=check_whole_number("dimensions", dimensions or 0),
    )
    return _check_size(request, "inputs")


def _encode_input(one: PromptInput) -> inference_pb2.EmbedInput:
    if isinstance(one, str):
        return inference_pb2.EmbedInput(text=check_text("inputs", one))
    return inference_pb2.EmbedInput(tokens=inference_pb2.TokenIds(ids=_token_ids(one)))


def encode_load(model: str, options: LoadOptions) -> cluster_pb2.LoadModelRequest:
    """Encode ``load``. Raise InvalidRequest naming a field that cannot be sent, TypeError for an unknown option."""
    check_names(options, LoadOptions)
    return cluster_pb2.LoadModelRequest(
        model=check_text("model", model),
        layers=check_text("layers", options.get("layers") or ""),
        adapters=_adapters(options.get("adapters") or {}),
        route=ROUTES[_route(options.get("route") or Route.DIRECT)],
        max_step_ms=check_number("max_step_ms", options.get("max_step_ms") or 0.0),
        workers=check_whole_number("workers", options.get("workers") or 0),
        max_context=check_whole_number("max_context", options.get("max_context") or 0),
        lanes=check_whole_number("lanes", options.get("lanes") or 0),
        kv_bits=check_whole_number("kv_bits", options.get("kv_bits") or 0),
        quantize=check_whole_number("quantize", options.get("quantize") or 0),
        take_back=bool(options.get("take_back")),
        prefill_chunk=check_whole_number("prefill_chunk", options.get("prefill_chunk") or 0),
        acceptance=check_number("acceptance", options.get("acceptance") or 0.0),
        objective=OBJECTIVES[_objective(options.get("objective") or Objective.LATENCY)],
        draft=check_text("draft", options.get("draft") or ""),
        speculation=SPECULATIONS[_speculation(options.get("speculate") or Speculation.OFF)],
        inexact=options.get("exact") is not None and not check_bool("exact", options["exact"]),
        name=check_text("name", options.get("name") or ""),
        groups=_groups("groups", options.get("groups") or ()),
        insecure_links=_groups("insecure_links", options.get("insecure_links") or ()),
    )


def _groups(field: str, groups: Sequence[Sequence[str]]) -> list[cluster_pb2.WorkerGroup]:
    return encode_groups([check_text(field, name) for name in group] for group in groups)


def encode_plan(model: str, options: LoadOptions) -> cluster_pb2.PlanRequest:
    """Encode ``plan``, which has no ``max_step_ms``. Raise as ``encode_load`` does."""
    load = encode_load(model, options)
    return cluster_pb2.PlanRequest(
        model=load.model,
        workers=load.workers,
        layers=load.layers,
        route=load.route,
        max_context=load.max_context,
        lanes=load.lanes,
        kv_bits=load.kv_bits,
        quantize=load.quantize,
        prefill_chunk=load.prefill_chunk,
        objective=load.objective,
        acceptance=load.acceptance,
        adapters=load.adapters,
        groups=load.groups,
        insecure_links=load.insecure_links,
    )


def encode_plan_models(models: Iterable[ModelToPlan]) -> cluster_pb2.PlanModelsRequest:
    """Encode ``plan_models``. Raise as ``encode_load`` does."""
    return cluster_pb2.PlanModelsRequest(
        models=[
            cluster_pb2.ModelToPlan(
                name=check_text("name", one.name),
                order=encode_plan(one.model, one.options),
                pinned=check_bool("pinned", one.pinned),
                priority=check_whole_number("priority", one.priority, INT32_MAX),
                replicas=check_whole_number("replicas", one.replicas or 0),
            )
            for one in models
        ]
    )


def encode_unload(name: str, *, every: bool) -> cluster_pb2.UnloadModelRequest:
    """Encode ``unload``. Raise InvalidRequest for a name that cannot be sent."""
    return cluster_pb2.UnloadModelRequest(name=check_text("name", name), all=every)


def encode_add_adapter(name: str, folder: str, model: str) -> cluster_pb2.AddAdapterRequest:
    """Encode ``add_adapter``. Raise InvalidRequest naming a field that cannot be sent."""
    (adapter,) = _adapters({name: folder})
    return cluster_pb2.AddAdapterRequest(adapter=adapter, model=check_text("model", model))


def encode_remove_adapter(name: str, model: str) -> cluster_pb2.RemoveAdapterRequest:
    """Encode ``remove_adapter``. Raise InvalidRequest for a name that cannot be sent."""
    return cluster_pb2.RemoveAdapterRequest(name=check_text("name", name), model=check_text("model", model))


def _adapters(given: Mapping[str, str]) -> list[cluster_pb2.AdapterFolder]:
    return [
        cluster_pb2.AdapterFolder(name=check_text("adapters", name), folder=check_text("adapters", str(folder)))
        for name, folder in given.items()
    ]


def encode_resume(request_id: str, offset: int | Sequence[int]) -> inference_pb2.ResumeRequest:
    """Encode ``resume``. Raise InvalidRequest naming a field that cannot be sent."""
    name = check_text("request_id", request_id)
    if isinstance(offset, Sequence) and not offset:
        raise InvalidRequest("offset is empty; give one number, or one per sample", field="offset")
    if isinstance(offset, Sequence):
        return inference_pb2.ResumeRequest(request_id=name, offsets=[check_whole_number("offset", n) for n in offset])
    return inference_pb2.ResumeRequest(request_id=name, offset=check_whole_number("offset", offset))


def encode_trace(request_id: str) -> inference_pb2.TraceRequest:
    """Encode ``trace``. Raise InvalidRequest for an id that cannot be sent."""
    return inference_pb2.TraceRequest(request_id=check_text("request_id", request_id))


def encode_abort(request_id: str) -> inference_pb2.AbortRequest:
    """Encode ``abort``. Raise InvalidRequest for an id that cannot be sent."""
    return inference_pb2.AbortRequest(request_id=check_text("request_id", request_id))


def _token_ids(prompt: Sequence[int]) -> list[int]:
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
        raise InvalidRequest(f"prompt must be text or token ids, not {type(prompt).__name__}", field="prompt")
    return [check_whole_number("prompt", token) for token in prompt]


def _route(given: Route | str) -> Route:
    try:
        return Route(given)
    except ValueError:
        raise InvalidRequest(f"route must be direct or relay, not {given!r}", field="route") from None


def _objective(given: Objective | str) -> Objective:
    try:
        return Objective(given)
    except ValueError:
        raise InvalidRequest(f"objective must be latency or throughput, not {given!r}", field="objective") from None


def _speculation(given: Speculation | str) -> Speculation:
    try:
        return Speculation(given)
    except ValueError:
        raise InvalidRequest(f"speculate must be off, auto, ngram or draft, not {given!r}", field="speculate") from None


def _check_size(request: M, field: str) -> M:
    size = request.ByteSize()
    if size > MAX_CONTROL_BYTES:
        raise InvalidRequest(
            f"{field} is too long: the request has {size / MIB:.1f} MiB, and the limit is"
            f" {MAX_CONTROL_BYTES / MIB:.0f} MiB",
            field=field,
        )
    return request
