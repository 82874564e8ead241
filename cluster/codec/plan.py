"""Encode and decode plans and what they consist of: stages, routes, objectives, forecasts, and a load's progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from cluster.core.cluster_state import ModelPlan, StageState
from cluster.core.errors import InvalidOption, MacpipeError
from cluster.core.joint_plan import JointPlan, MacMemory, ModelMemory, PlannedModel, UnplacedModel
from cluster.core.limits import MAX_STAGES
from cluster.core.plan import Forecast, LayerRange, LoadProgress, Objective, Route, Spare, Speculation
from cluster.core.text import require_group
from cluster.v1 import cluster_pb2 as pb

Explained: TypeAlias = pb.GetClusterResponse | pb.PlanResponse
"""Both messages have an objective, a forecast, spares and reasons."""

ROUTES: Final = {Route.DIRECT: pb.ROUTE_DIRECT, Route.RELAY: pb.ROUTE_RELAY}
OBJECTIVES: Final = {
    Objective.LATENCY: pb.OBJECTIVE_LATENCY,
    Objective.THROUGHPUT: pb.OBJECTIVE_THROUGHPUT,
}


SPECULATIONS: Final = {
    Speculation.OFF: pb.SPECULATION_OFF,
    Speculation.AUTO: pb.SPECULATION_AUTO,
    Speculation.NGRAM: pb.SPECULATION_NGRAM,
    Speculation.DRAFT: pb.SPECULATION_DRAFT,
}
_SPECULATION_OF: Final = {number: speculation for speculation, number in SPECULATIONS.items()}


def decode_route(route: pb.Route.ValueType) -> Route:
    """Return the route; ``DIRECT`` unless it is ``RELAY``."""
    return Route.RELAY if route == pb.ROUTE_RELAY else Route.DIRECT


def decode_objective(objective: pb.Objective.ValueType) -> Objective:
    """Return the objective; ``LATENCY`` unless it is ``THROUGHPUT``."""
    return Objective.THROUGHPUT if objective == pb.OBJECTIVE_THROUGHPUT else Objective.LATENCY


def decode_speculation(speculation: pb.Speculation.ValueType) -> Speculation:
    """Return what guesses tokens; ``OFF`` for a value that this version does not know."""
    return _SPECULATION_OF.get(speculation, Speculation.OFF)


def encode_groups(groups: Iterable[Sequence[str]]) -> list[pb.WorkerGroup]:
    """Encode groups of workers, by name."""
    return [pb.WorkerGroup(workers=names) for names in groups]


def decode_groups(messages: Sequence[pb.WorkerGroup], option: str) -> tuple[tuple[str, ...], ...]:
    """Decode groups of workers. Raise InvalidOption that names ``option`` for one that cannot be."""
    if len(messages) > MAX_STAGES:
        raise InvalidOption(f"--{option} names more than {MAX_STAGES} groups", field=option)
    return tuple(require_group(tuple(message.workers), option) for message in messages)


def decode_layers(start: int, end: int) -> LayerRange:
    """Return the layers ``start`` to ``end - 1``. Raise MacpipeError for an invalid range."""
    try:
        return LayerRange(start, end)
    except ValueError as wrong:
        raise MacpipeError(f"protocol error from the coordinator: {wrong}") from wrong


def encode_plan(plan: ModelPlan) -> pb.PlanResponse:
    """Encode a plan for a model that is not loaded."""
    reply = pb.PlanResponse(
        model=plan.model,
        layers=plan.layers,
        max_context=plan.max_context,
        max_sequences=plan.max_sequences,
        route=ROUTES[plan.route],
        stages=map(encode_stage, plan.stages),
    )
    encode_explanation(reply, plan.objective, plan.forecast, plan.spares, plan.reasons)
    return reply


def decode_plan(reply: pb.PlanResponse) -> ModelPlan:
    """Decode a plan. Raise MacpipeError for invalid layers."""
    return ModelPlan(
        model=reply.model,
        layers=reply.layers,
        max_context=reply.max_context,
        max_sequences=reply.max_sequences,
        route=decode_route(reply.route),
        objective=decode_objective(reply.objective),
        stages=tuple(map(decode_stage, reply.stages)),
        forecast=decode_forecast(reply),
        spares=decode_spares(reply),
        reasons=tuple(reply.reasons),
    )


def encode_joint_plan(plan: JointPlan) -> pb.PlanModelsResponse:
    """Encode the plans of several models."""
    return pb.PlanModelsResponse(
        models=[pb.PlannedModel(name=one.name, plan=encode_plan(one.plan), replica=one.replica) for one in plan.models],
        left_out=[pb.UnplacedModel(name=one.name, why=one.why, unload=one.unload) for one in plan.left_out],
        memory=[
            pb.MacMemory(
                worker=mac.worker,
                usable_bytes=mac.usable_bytes,
                models=[
                    pb.ModelMemory(name=one.name, weight_bytes=one.weight_bytes, cache_bytes=one.cache_bytes)
                    for one in mac.models
                ],
            )
            for mac in plan.memory
        ],
        reasons=plan.reasons,
    )


def decode_joint_plan(reply: pb.PlanModelsResponse) -> JointPlan:
    """Decode the plans of several models. Raise MacpipeError for invalid layers."""
    return JointPlan(
        models=tuple(PlannedModel(one.name, decode_plan(one.plan), max(one.replica, 1)) for one in reply.models),
        left_out=tuple(UnplacedModel(one.name, one.why, tuple(one.unload)) for one in reply.left_out),
        memory=tuple(
            MacMemory(
                mac.worker,
                mac.usable_bytes,
                tuple(ModelMemory(one.name, one.weight_bytes, one.cache_bytes) for one in mac.models),
            )
            for mac in reply.memory
        ),
        reasons=tuple(reply.reasons),
    )


def encode_explanation(
    reply: Explained, objective: Objective, forecast: Forecast | None, spares: Iterable[Spare], reasons: Iterable[str]
) -> None:
    """Set what a plan is best at, and why it is as it is."""
    reply.objective = OBJECTIVES[objective]
    reply.spares.extend(pb.SpareWorker(worker=spare.worker, why=spare.why) for spare in spares)
    reply.reasons.extend(reasons)
    if forecast:
        reply.forecast.one_user, reply.forecast.eight_users = forecast.one_user, forecast.eight_users
        reply.forecast.first_token_seconds = forecast.first_token_s
        reply.forecast.prompt_tokens = forecast.prompt_tokens


def decode_forecast(reply: Explained) -> Forecast | None:
    """Return the forecast; None if the reply has none."""
    if not reply.HasField("forecast"):
        return None
    forecast = reply.forecast
    return Forecast(forecast.one_user, forecast.eight_users, forecast.first_token_seconds, forecast.prompt_tokens)


def decode_spares(reply: Explained) -> tuple[Spare, ...]:
    """Return the workers that the plan leaves out."""
    return tuple(Spare(spare.worker, spare.why) for spare in reply.spares)


def encode_stage(stage: StageState) -> pb.Stage:
    """Encode a stage."""
    return pb.Stage(
        index=stage.index,
        worker=stage.worker,
        start_layer=stage.layers.start,
        end_layer=stage.layers.end,
        weight_bytes=stage.weight_bytes,
        cache_bytes=stage.cache_bytes,
        inlet=ROUTES[stage.input_route],
        reserved_bytes=stage.reserved_bytes,
        prefix_bytes=stage.prefix_bytes,
        bubble_share=stage.bubble_share,
        predicted_ms=stage.predicted_ms,
        measured_ms=stage.measured_ms,
        expected_ms=stage.expected_ms,
        measured_frames=stage.measured_frames,
        busy_seconds=stage.busy_seconds,
        active_seconds=stage.active_seconds,
        wasted_seconds=stage.wasted_seconds,
        link_round_trip_ms=stage.link_round_trip_ms,
        link_bandwidth=stage.link_bandwidth,
        link_interface=stage.link_interface,
        rank=stage.rank,
        ranks=stage.ranks,
    )


def decode_stage(message: pb.Stage) -> StageState:
    """Decode a stage. Raise MacpipeError for invalid layers."""
    return StageState(
        index=message.index,
        worker=message.worker,
        layers=decode_layers(message.start_layer, message.end_layer),
        weight_bytes=message.weight_bytes,
        cache_bytes=message.cache_bytes,
        input_route=decode_route(message.inlet),
        reserved_bytes=message.reserved_bytes,
        prefix_bytes=message.prefix_bytes,
        bubble_share=message.bubble_share if message.HasField("bubble_share") else None,
        predicted_ms=message.predicted_ms,
        measured_ms=message.measured_ms,
        expected_ms=message.expected_ms,
        measured_frames=message.measured_frames,
        busy_seconds=message.busy_seconds,
        active_seconds=message.active_seconds,
        wasted_seconds=message.wasted_seconds,
        link_round_trip_ms=message.link_round_trip_ms,
        link_bandwidth=message.link_bandwidth,
        link_interface=message.link_interface,
        rank=message.rank,
        ranks=max(message.ranks, 1),
    )


def encode_progress(progress: LoadProgress) -> pb.StageProgress:
    """Encode how far the load of one stage is."""
    return pb.StageProgress(
        worker=progress.worker,
        start_layer=progress.layers.start,
        end_layer=progress.layers.end,
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        state=progress.state,
        hub_bytes=progress.hub_bytes,
        peer_bytes=progress.peer_bytes,
        notices=progress.notices,
        draft=progress.draft,
        model=progress.model,
    )


def decode_progress(message: pb.StageProgress) -> LoadProgress:
    """Decode how far the load of one stage is. Raise MacpipeError for invalid layers."""
    return LoadProgress(
        worker=message.worker,
        layers=decode_layers(message.start_layer, message.end_layer),
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
        state=message.state,
        hub_bytes=message.hub_bytes,
        peer_bytes=message.peer_bytes,
        notices=tuple(message.notices),
        draft=message.draft,
        model=message.model,
    )
