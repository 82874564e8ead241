"""Decodes the coordinator's protobuf replies. It does no I/O, so both clients share it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cluster.client.cluster_state import ClusterState, LiveRequest, ModelPlan, RequestState, StageState, WorkerState
from cluster.client.results import Finish, Model, Prompt, Timings, Token, Tokens
from cluster.core.errors import MacpipeError, VersionMismatch
from cluster.core.plan import Forecast, LayerRange, LoadProgress, Objective, Route, Spare
from cluster.core.request import FinishReason, StageFigures, ToolCallDelta, TopLogprob, Usage
from cluster.core.state import Repair, ServingState
from cluster.v1 import cluster_pb2, inference_pb2

FINISH_REASONS: Final = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    inference_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}
SERVING_STATES: Final = {
    cluster_pb2.SERVING_STATE_IDLE: ServingState.IDLE,
    cluster_pb2.SERVING_STATE_LOADING: ServingState.LOADING,
    cluster_pb2.SERVING_STATE_SERVING: ServingState.SERVING,
    cluster_pb2.SERVING_STATE_FAILED: ServingState.FAILED,
    cluster_pb2.SERVING_STATE_RECOVERING: ServingState.RECOVERING,
}
REQUEST_STATES: Final = {
    cluster_pb2.REQUEST_STATE_QUEUED: RequestState.QUEUED,
    cluster_pb2.REQUEST_STATE_PREFILL: RequestState.PREFILL,
    cluster_pb2.REQUEST_STATE_DECODE: RequestState.DECODE,
}


def prompt(reply: inference_pb2.PromptInfo) -> Prompt:
    """Decode the acceptance of a request."""
    samples = max(reply.samples, 1)
    return Prompt(reply.request_id, reply.model, reply.prompt_tokens, reply.seed, reply.max_tokens, samples)


def token(reply: inference_pb2.TokenEvent) -> Token:
    """Decode one token of an answer."""
    logprob = reply.logprob if reply.HasField("logprob") else None
    top = tuple(TopLogprob(one.token, one.logprob, one.text) for one in reply.top)
    calls = _calls(reply.tool_calls)
    stages = tuple(map(_figures, reply.stages))
    return Token(reply.index, reply.token, reply.text, logprob, top, reply.reasoning, calls, reply.sample, stages)


def _calls(deltas: Iterable[inference_pb2.ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    return tuple(ToolCallDelta(delta.index, delta.id, delta.name, delta.arguments) for delta in deltas)


def finish(reply: inference_pb2.FinishInfo) -> Finish:
    """Decode the end of an answer. Raise VersionMismatch for an unknown finish reason."""
    reason = FINISH_REASONS.get(reply.reason)
    if reason is None:
        raise VersionMismatch(f"unknown finish reason {reply.reason} from the coordinator; update this client")
    usage = Usage(reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.cached_tokens)
    timings = Timings(reply.timings.ttft_ms, reply.timings.tpot_ms, reply.timings.tokens_per_second)
    stages = tuple(_figures(stage) for stage in reply.stages)
    calls = _calls(reply.tool_calls)
    return Finish(reason, reply.text, usage, timings, stages, reply.reasoning, calls, reply.sample)


def tokens(reply: inference_pb2.TokenizeResponse) -> Tokens:
    """Decode a tokenized text."""
    return Tokens(tuple(reply.ids), tuple(reply.texts))


def models(reply: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """Decode the served models."""
    return tuple(Model(one.id, one.layers, one.max_context, one.fingerprint) for one in reply.models)


def load_event(reply: cluster_pb2.LoadModelResponse) -> LoadProgress | ClusterState:
    """Decode the progress of one stage, or the final state of the cluster. Raise VersionMismatch for other events."""
    match reply.WhichOneof("event"):
        case "progress":
            one = reply.progress
            layers = layer_range(one.start_layer, one.end_layer)
            return LoadProgress(
                one.worker,
                layers,
                one.done_bytes,
                one.total_bytes,
                one.state,
                one.hub_bytes,
                one.peer_bytes,
                tuple(one.notices),
            )
        case "ready":
            return cluster_state(reply.ready)
        case _:
            raise VersionMismatch("unknown load event from the coordinator; update this client")


def cluster_state(reply: cluster_pb2.GetClusterResponse) -> ClusterState:
    """Decode a snapshot of the cluster."""
    return ClusterState(
        cluster=reply.cluster,
        version=reply.version,
        state=SERVING_STATES.get(reply.state, ServingState.UNKNOWN),
        problem=reply.problem,
        model=reply.model,
        layers=reply.layers,
        max_context=reply.max_context,
        max_sequences=reply.max_sequences,
        epoch=reply.epoch,
        route=_route(reply.route),
        workers=tuple(_worker(worker) for worker in reply.workers),
        stages=tuple(_stage(stage) for stage in reply.stages),
        requests=tuple(_live(request) for request in reply.requests),
        requests_finished=reply.requests_finished,
        tokens_generated=reply.tokens_generated,
        uptime_seconds=reply.uptime_seconds,
        lane_sizes=tuple(reply.lane_sizes),
        queued=reply.queued,
        prefixes=reply.prefixes,
        objective=_objective(reply.objective),
        forecast=_forecast(reply),
        spares=_spares(reply),
        reasons=tuple(reply.reasons),
        lag_seconds=reply.lag_seconds,
        repair=_repair(reply.repair) if reply.HasField("repair") else None,
        move=_repair(reply.move) if reply.HasField("move") else None,
        recoveries=reply.recoveries,
        warnings=tuple(reply.warnings),
    )


def plan(reply: cluster_pb2.PlanResponse) -> ModelPlan:
    """Decode a plan."""
    return ModelPlan(
        model=reply.model,
        layers=reply.layers,
        max_context=reply.max_context,
        max_sequences=reply.max_sequences,
        route=_route(reply.route),
        objective=_objective(reply.objective),
        stages=tuple(_stage(stage) for stage in reply.stages),
        forecast=_forecast(reply),
        spares=_spares(reply),
        reasons=tuple(reply.reasons),
    )


def _spares(reply: cluster_pb2.GetClusterResponse | cluster_pb2.PlanResponse) -> tuple[Spare, ...]:
    return tuple(Spare(spare.worker, spare.why) for spare in reply.spares)


def _forecast(reply: cluster_pb2.GetClusterResponse | cluster_pb2.PlanResponse) -> Forecast | None:
    if not reply.HasField("forecast"):
        return None
    forecast = reply.forecast
    return Forecast(forecast.one_user, forecast.eight_users, forecast.first_token_seconds, forecast.prompt_tokens)


def _objective(reply: cluster_pb2.Objective.ValueType) -> Objective:
    return Objective.THROUGHPUT if reply == cluster_pb2.OBJECTIVE_THROUGHPUT else Objective.LATENCY


def layer_range(start: int, end: int) -> LayerRange:
    """Return the layers ``start`` to ``end - 1``. Raise MacpipeError for an invalid range."""
    try:
        return LayerRange(start, end)
    except ValueError as wrong:
        raise MacpipeError(f"protocol error from the coordinator: {wrong}") from wrong


def _figures(reply: inference_pb2.StageFigures) -> StageFigures:
    layers = layer_range(reply.start_layer, reply.end_layer)
    return StageFigures(reply.worker, layers, reply.compute_ms, reply.wire_ms, reply.wait_ms)


def _worker(reply: cluster_pb2.Worker) -> WorkerState:
    return WorkerState(
        id=reply.id,
        name=reply.name,
        version=reply.version,
        control_address=reply.control_address,
        data_address=reply.data_address,
        chip=reply.chip,
        backend=reply.backend,
        mlx_version=reply.mlx_version,
        memory_total=reply.memory_total,
        memory_limit=reply.memory_limit,
        memory_used=reply.memory_used,
        memory_peak=reply.memory_peak,
        sequences=reply.sequences,
        reachable=reply.reachable,
        problem=reply.problem,
        interface=reply.interface,
        gpu_cores=reply.gpu_cores,
        memory_pressure=reply.memory_pressure,
        bandwidth=reply.bandwidth,
        standing=reply.standing,
        silent_seconds=reply.silent_seconds,
        losses=reply.losses,
        draining=reply.draining,
        clock_ahead_seconds=reply.clock_ahead_seconds,
        lag_seconds=reply.lag_seconds,
    )


def _repair(reply: cluster_pb2.Repair) -> Repair:
    return Repair(
        worker=reply.worker,
        cause=reply.cause,
        since_seconds=reply.since_seconds,
        doing=reply.doing,
        expected_seconds=reply.expected_seconds,
        attempts=reply.attempts,
    )


def _stage(reply: cluster_pb2.Stage) -> StageState:
    layers = layer_range(reply.start_layer, reply.end_layer)
    return StageState(
        index=reply.index,
        worker=reply.worker,
        layers=layers,
        weight_bytes=reply.weight_bytes,
        cache_bytes=reply.cache_bytes,
        inlet=_route(reply.inlet),
        reserved_bytes=reply.reserved_bytes,
        prefix_bytes=reply.prefix_bytes,
        bubble_share=reply.bubble_share,
        predicted_ms=reply.predicted_ms,
        measured_ms=reply.measured_ms,
        expected_ms=reply.expected_ms,
        measured_frames=reply.measured_frames,
        busy_seconds=reply.busy_seconds,
        active_seconds=reply.active_seconds,
    )


def _route(reply: cluster_pb2.Route.ValueType) -> Route:
    return Route.RELAY if reply == cluster_pb2.ROUTE_RELAY else Route.DIRECT


def _live(reply: cluster_pb2.LiveRequest) -> LiveRequest:
    return LiveRequest(
        request_id=reply.request_id,
        state=REQUEST_STATES.get(reply.state, RequestState.UNKNOWN),
        prompt_tokens=reply.prompt_tokens,
        prefilled_tokens=reply.prefilled_tokens,
        completion_tokens=reply.completion_tokens,
        lane=reply.lane if reply.lane >= 0 else None,
        age_seconds=reply.age_seconds,
        cached_tokens=reply.cached_tokens,
    )
