"""Decodes the coordinator's protobuf replies. It does no I/O, so both clients share it."""

from __future__ import annotations

import struct

from cluster.client.results import AcceptedRequest, Embeddings, Finish, Model, PromptToken, Timings, Tokens
from cluster.codec.answer import FINISH_REASON_OF, decode_call, decode_figures
from cluster.codec.cluster_state import decode_cluster_state
from cluster.codec.plan import decode_progress
from cluster.core.cluster_state import ClusterState
from cluster.core.errors import VersionMismatch
from cluster.core.plan import LoadProgress
from cluster.core.request import TopLogprob, Usage
from cluster.v1 import cluster_pb2, inference_pb2


def decode_accepted(reply: inference_pb2.PromptInfo) -> AcceptedRequest:
    """Decode the acceptance of a request."""
    return AcceptedRequest(
        request_id=reply.request_id,
        model=reply.model,
        prompt_tokens=reply.prompt_tokens,
        seed=reply.seed,
        max_tokens=reply.max_tokens,
        samples=max(reply.samples, 1),
        fallback=reply.fallback,
    )


def decode_finish(reply: inference_pb2.FinishInfo) -> Finish:
    """Decode the end of an answer. Raise VersionMismatch for an unknown finish reason."""
    reason = FINISH_REASON_OF.get(reply.reason)
    if reason is None:
        raise VersionMismatch(f"unknown finish reason {reply.reason} from the coordinator; update this client")
    usage = Usage(
        reply.usage.prompt_tokens,
        reply.usage.completion_tokens,
        reply.usage.cached_tokens,
        reply.usage.accepted_prediction_tokens,
        reply.usage.rejected_prediction_tokens,
    )
    timings = Timings(reply.timings.ttft_ms, reply.timings.tpot_ms, reply.timings.tokens_per_second)
    stages = tuple(map(decode_figures, reply.stages))
    calls = tuple(map(decode_call, reply.tool_calls))
    return Finish(reason, reply.text, usage, timings, stages, reply.reasoning, calls, reply.sample)


def decode_prompt_tokens(reply: inference_pb2.PromptLogprobs) -> tuple[PromptToken, ...]:
    """Decode a piece of the prompt."""
    return tuple(
        PromptToken(
            one.token,
            one.text,
            one.logprob if one.HasField("logprob") else None,
            tuple(TopLogprob(top.token, top.logprob, top.text) for top in one.top),
        )
        for one in reply.tokens
    )


def decode_tokens(reply: inference_pb2.TokenizeResponse) -> Tokens:
    """Decode a tokenized text."""
    return Tokens(tuple(reply.ids), tuple(reply.texts))


def decode_embeddings(reply: inference_pb2.EmbedResponse) -> Embeddings:
    """Decode embeddings, which are sent as little-endian float32."""
    numbers = ((len(packed) // 4, packed) for packed in reply.embeddings)
    vectors = tuple(struct.unpack_from(f"<{count}f", packed) for count, packed in numbers)
    return Embeddings(reply.model, vectors, reply.prompt_tokens)


def decode_models(reply: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """Decode the served models."""
    return tuple(Model(one.id, one.layers, one.max_context, one.fingerprint, not one.unloaded) for one in reply.models)


def decode_load_event(reply: cluster_pb2.LoadModelResponse) -> LoadProgress | ClusterState:
    """Decode the progress of one stage, or the final state of the cluster. Raise VersionMismatch for other events."""
    match reply.WhichOneof("event"):
        case "progress":
            return decode_progress(reply.progress)
        case "ready":
            return decode_cluster_state(reply.ready)
        case _:
            raise VersionMismatch("unknown load event from the coordinator; update this client")
