"""Encode and decode the state of a cluster: workers, stages, live requests, repairs."""

from __future__ import annotations

from typing import Final

from cluster.codec.answer import decode_figures, encode_figures
from cluster.codec.leadership import decode_leadership, encode_leadership
from cluster.codec.plan import (
    ROUTES,
    SPECULATIONS,
    decode_forecast,
    decode_objective,
    decode_route,
    decode_spares,
    decode_speculation,
    decode_stage,
    encode_explanation,
    encode_stage,
)
from cluster.codec.worker_info import decode_worker, encode_worker
from cluster.core.cluster_state import (
    AdapterState,
    ClusterEvent,
    ClusterState,
    DeploymentState,
    EventKind,
    GuessCounts,
    LiveRequest,
    Repair,
    ReplicaState,
    RequestState,
    ServingState,
    TrainingProgress,
)
from cluster.v1 import cluster_pb2 as pb

_SERVING_STATES: Final = {
    ServingState.IDLE: pb.SERVING_STATE_IDLE,
    ServingState.TRAINING: pb.SERVING_STATE_TRAINING,
    ServingState.LOADING: pb.SERVING_STATE_LOADING,
    ServingState.SERVING: pb.SERVING_STATE_SERVING,
    ServingState.RECOVERING: pb.SERVING_STATE_RECOVERING,
    ServingState.FAILED: pb.SERVING_STATE_FAILED,
    ServingState.UNKNOWN: pb.SERVING_STATE_UNSPECIFIED,
}
_REQUEST_STATES: Final = {
    RequestState.QUEUED: pb.REQUEST_STATE_QUEUED,
    RequestState.PREFILL: pb.REQUEST_STATE_PREFILL,
    RequestState.DECODE: pb.REQUEST_STATE_DECODE,
    RequestState.UNKNOWN: pb.REQUEST_STATE_UNSPECIFIED,
}
_EVENT_KINDS: Final = {
    EventKind.LOAD: pb.EVENT_KIND_LOAD,
    EventKind.RECOVERY: pb.EVENT_KIND_RECOVERY,
    EventKind.MOVE: pb.EVENT_KIND_MOVE,
    EventKind.RETURN: pb.EVENT_KIND_RETURN,
    EventKind.UNLOAD: pb.EVENT_KIND_UNLOAD,
    EventKind.UNKNOWN: pb.EVENT_KIND_UNSPECIFIED,
}
_SERVING_STATE_OF: Final = {number: state for state, number in _SERVING_STATES.items()}
_REQUEST_STATE_OF: Final = {number: state for state, number in _REQUEST_STATES.items()}
_EVENT_KIND_OF: Final = {number: kind for kind, number in _EVENT_KINDS.items()}


def encode_cluster_state(state: ClusterState) -> pb.GetClusterResponse:
    """Encode the state of a cluster."""
    reply = pb.GetClusterResponse(
        cluster=state.cluster,
        version=state.version,
        state=_SERVING_STATES[state.state],
        problem=state.problem,
        activity=state.activity,
        training=_encode_training(state.training) if state.training else None,
        model=state.model,
        layers=state.layers,
        max_context=state.max_context,
        max_sequences=state.max_sequences,
        epoch=state.epoch,
        route=ROUTES[state.route],
        workers=map(encode_worker, state.workers),
        stages=map(encode_stage, state.stages),
        requests=map(_encode_request, state.requests),
        requests_finished=state.requests_finished,
        tokens_generated=state.tokens_generated,
        prompt_tokens=state.prompt_tokens,
        cached_tokens=state.cached_tokens,
        uptime_seconds=state.uptime_seconds,
        lane_sizes=state.lane_sizes,
        queued=state.queued,
        prefixes=state.prefixes,
        disk_hits=state.disk_hits,
        disk_misses=state.disk_misses,
        disk_tokens=state.disk_tokens,
        repair=_encode_repair(state.repair) if state.repair else None,
        move=_encode_repair(state.move) if state.move else None,
        recoveries=state.recoveries,
        events=map(_encode_event, state.events),
        warnings=state.warnings,
        lag_seconds=state.lag_seconds,
        speculation=SPECULATIONS[state.speculation],
        guesses=map(_encode_counts, state.guesses),
        guesses_without_room=state.guesses_without_room,
        draft_worker=state.draft_worker,
        adapters=map(encode_adapter, state.adapters),
        deployments=map(_encode_deployment, state.deployments),
        leadership=encode_leadership(state.leadership) if state.leadership else None,
    )
    encode_explanation(reply, state.objective, state.forecast, state.spares, state.reasons)
    return reply


def decode_cluster_state(reply: pb.GetClusterResponse) -> ClusterState:
    """Decode the state of a cluster. Raise MacpipeError for invalid layers."""
    return ClusterState(
        cluster=reply.cluster,
        version=reply.version,
        state=_SERVING_STATE_OF.get(reply.state, ServingState.UNKNOWN),
        problem=reply.problem,
        activity=reply.activity,
        training=_decode_training(reply.training) if reply.HasField("training") else None,
        model=reply.model,
        layers=reply.layers,
        max_context=reply.max_context,
        max_sequences=reply.max_sequences,
        epoch=reply.epoch,
        route=decode_route(reply.route),
        workers=tuple(map(decode_worker, reply.workers)),
        stages=tuple(map(decode_stage, reply.stages)),
        requests=tuple(map(_decode_request, reply.requests)),
        requests_finished=reply.requests_finished,
        tokens_generated=reply.tokens_generated,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        uptime_seconds=reply.uptime_seconds,
        lane_sizes=tuple(reply.lane_sizes),
        queued=reply.queued,
        prefixes=reply.prefixes,
        disk_hits=reply.disk_hits,
        disk_misses=reply.disk_misses,
        disk_tokens=reply.disk_tokens,
        objective=decode_objective(reply.objective),
        forecast=decode_forecast(reply),
        spares=decode_spares(reply),
        reasons=tuple(reply.reasons),
        repair=_decode_repair(reply.repair) if reply.HasField("repair") else None,
        move=_decode_repair(reply.move) if reply.HasField("move") else None,
        recoveries=reply.recoveries,
        events=tuple(map(_decode_event, reply.events)),
        warnings=tuple(reply.warnings),
        lag_seconds=reply.lag_seconds,
        speculation=decode_speculation(reply.speculation),
        adapters=tuple(map(decode_adapter, reply.adapters)),
        guesses=tuple(GuessCounts(g.source, g.guessed, g.accepted, g.voided, g.rows) for g in reply.guesses),
        guesses_without_room=reply.guesses_without_room,
        draft_worker=reply.draft_worker,
        deployments=tuple(map(_decode_deployment, reply.deployments)),
        leadership=decode_leadership(reply.leadership) if reply.HasField("leadership") else None,
    )


def _encode_deployment(deployment: DeploymentState) -> pb.Deployment:
    return pb.Deployment(
        name=deployment.name,
        aliases=deployment.aliases,
        model=deployment.model,
        state=_SERVING_STATES[deployment.state],
        problem=deployment.problem,
        activity=deployment.activity,
        max_context=deployment.max_context,
        pinned=deployment.pinned,
        idle_seconds=deployment.idle_seconds,
        replicas=map(_encode_replica, deployment.replicas),
        adapters=map(encode_adapter, deployment.adapters),
        speculation=SPECULATIONS[deployment.speculation],
        draft_worker=deployment.draft_worker,
    )


def _decode_deployment(message: pb.Deployment) -> DeploymentState:
    return DeploymentState(
        name=message.name,
        model=message.model,
        state=_SERVING_STATE_OF.get(message.state, ServingState.UNKNOWN),
        aliases=tuple(message.aliases),
        problem=message.problem,
        activity=message.activity,
        max_context=message.max_context,
        pinned=message.pinned,
        idle_seconds=message.idle_seconds,
        replicas=tuple(map(_decode_replica, message.replicas)),
        adapters=tuple(map(decode_adapter, message.adapters)),
        speculation=decode_speculation(message.speculation),
        draft_worker=message.draft_worker,
    )


def _encode_replica(replica: ReplicaState) -> pb.Replica:
    return pb.Replica(
        state=_SERVING_STATES[replica.state],
        problem=replica.problem,
        epoch=replica.epoch,
        stages=map(encode_stage, replica.stages),
        requests=map(_encode_request, replica.requests),
        lane_sizes=replica.lane_sizes,
        queued=replica.queued,
        prefixes=replica.prefixes,
    )


def _decode_replica(message: pb.Replica) -> ReplicaState:
    return ReplicaState(
        state=_SERVING_STATE_OF.get(message.state, ServingState.UNKNOWN),
        problem=message.problem,
        epoch=message.epoch,
        stages=tuple(map(decode_stage, message.stages)),
        requests=tuple(map(_decode_request, message.requests)),
        lane_sizes=tuple(message.lane_sizes),
        queued=message.queued,
        prefixes=message.prefixes,
    )


def encode_adapter(adapter: AdapterState) -> pb.Adapter:
    """Encode an adapter of the served model."""
    return pb.Adapter(name=adapter.name, fingerprint=adapter.fingerprint, bytes=adapter.nbytes)


def decode_adapter(message: pb.Adapter) -> AdapterState:
    """Decode an adapter of the served model."""
    return AdapterState(message.name, message.fingerprint, message.bytes)


def _encode_counts(counts: GuessCounts) -> pb.GuessCounts:
    return pb.GuessCounts(
        source=counts.source,
        guessed=counts.guessed,
        accepted=counts.accepted,
        voided=counts.voided,
        rows=counts.rows,
    )


def _encode_repair(repair: Repair) -> pb.Repair:
    return pb.Repair(
        worker=repair.worker,
        cause=repair.cause,
        since_seconds=repair.since_seconds,
        doing=repair.doing,
        expected_seconds=repair.expected_seconds,
        attempts=repair.attempts,
    )


def _decode_repair(message: pb.Repair) -> Repair:
    return Repair(
        worker=message.worker,
        cause=message.cause,
        since_seconds=message.since_seconds,
        doing=message.doing,
        expected_seconds=message.expected_seconds,
        attempts=message.attempts,
    )


def _encode_training(training: TrainingProgress) -> pb.TrainingProgress:
    return pb.TrainingProgress(
        iteration=training.iteration, iterations=training.iterations, seconds_left=training.seconds_left
    )


def _decode_training(message: pb.TrainingProgress) -> TrainingProgress:
    return TrainingProgress(message.iteration, message.iterations, message.seconds_left)


def _encode_event(event: ClusterEvent) -> pb.ClusterEvent:
    return pb.ClusterEvent(
        kind=_EVENT_KINDS[event.kind],
        age_seconds=event.age_seconds,
        duration_seconds=event.duration_seconds,
        worker=event.worker,
        sentence=event.sentence,
    )


def _decode_event(message: pb.ClusterEvent) -> ClusterEvent:
    return ClusterEvent(
        kind=_EVENT_KIND_OF.get(message.kind, EventKind.UNKNOWN),
        age_seconds=message.age_seconds,
        duration_seconds=message.duration_seconds,
        worker=message.worker,
        sentence=message.sentence,
    )


def _encode_request(request: LiveRequest) -> pb.LiveRequest:
    return pb.LiveRequest(
        request_id=request.request_id,
        state=_REQUEST_STATES[request.state],
        prompt_tokens=request.prompt_tokens,
        prefilled_tokens=request.prefilled_tokens,
        completion_tokens=request.completion_tokens,
        lane=-1 if request.lane is None else request.lane,
        age_seconds=request.age_seconds,
        cached_tokens=request.cached_tokens,
        guessed_tokens=request.guessed_tokens,
        window=request.window,
        tokens_per_second=request.tokens_per_second,
        stages=map(encode_figures, request.stages),
    )


def _decode_request(message: pb.LiveRequest) -> LiveRequest:
    return LiveRequest(
        request_id=message.request_id,
        state=_REQUEST_STATE_OF.get(message.state, RequestState.UNKNOWN),
        prompt_tokens=message.prompt_tokens,
        prefilled_tokens=message.prefilled_tokens,
        completion_tokens=message.completion_tokens,
        lane=message.lane if message.lane >= 0 else None,
        age_seconds=message.age_seconds,
        cached_tokens=message.cached_tokens,
        guessed_tokens=message.guessed_tokens,
        window=max(message.window, 1),
        tokens_per_second=message.tokens_per_second,
        stages=tuple(map(decode_figures, message.stages)),
    )
