"""Encodes the coordinator's types as public protobuf messages."""

from __future__ import annotations

import time

from cluster import __version__
from cluster.coordinator.loop_view import LoopView, RequestView
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.snapshot import Snapshot
from cluster.core.plan import LoadProgress, Objective, Plan, PlannedStage, Route
from cluster.core.request import FinishEvent, FinishReason, Request, StageFigures, TokenEvent, ToolCallDelta
from cluster.core.state import Repair, ServingState
from cluster.membership.suspicion import Belief, Standing
from cluster.model.tokenizer import Tokenizer
from cluster.scheduler.sequence import Phase
from cluster.v1 import cluster_pb2 as cpb
from cluster.v1 import inference_pb2 as pb

_STATES = {
    ServingState.IDLE: cpb.SERVING_STATE_IDLE,
    ServingState.LOADING: cpb.SERVING_STATE_LOADING,
    ServingState.SERVING: cpb.SERVING_STATE_SERVING,
    ServingState.RECOVERING: cpb.SERVING_STATE_RECOVERING,
    ServingState.FAILED: cpb.SERVING_STATE_FAILED,
}
_ROUTES = {Route.DIRECT: cpb.ROUTE_DIRECT, Route.RELAY: cpb.ROUTE_RELAY}
_OBJECTIVES = {
    Objective.LATENCY: cpb.OBJECTIVE_LATENCY,
    Objective.THROUGHPUT: cpb.OBJECTIVE_THROUGHPUT,
}
_PHASES = {
    Phase.QUEUED: cpb.REQUEST_STATE_QUEUED,
    Phase.PREFILL: cpb.REQUEST_STATE_PREFILL,
    Phase.DECODE: cpb.REQUEST_STATE_DECODE,
}
_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


def prompt_info(request: Request, model: str) -> pb.PromptInfo:
    return pb.PromptInfo(
        request_id=request.id,
        model=model,
        prompt_tokens=len(request.prompt),
        seed=request.sampling.seed,
        max_tokens=request.max_tokens,
        samples=request.samples,
    )


def token_event(event: TokenEvent, tokenizer: Tokenizer) -> pb.TokenEvent:
    top = [pb.TopLogprob(token=t.token, text=tokenizer.token_text(t.token), logprob=t.logprob) for t in event.top]
    return pb.TokenEvent(
        index=event.index,
        token=event.token,
        text=event.text,
        logprob=event.logprob,
        top=top,
        reasoning=event.reasoning,
        tool_calls=map(_encode_call, event.calls),
        sample=event.sample,
        stages=map(_encode_figures, event.stages),
    )


def _encode_figures(s: StageFigures) -> pb.StageFigures:
    return pb.StageFigures(
        worker=s.worker,
        start_layer=s.layers.start,
        end_layer=s.layers.end,
        compute_ms=s.compute_ms,
        wire_ms=s.wire_ms,
        wait_ms=s.wait_ms,
    )


def _encode_call(delta: ToolCallDelta) -> pb.ToolCallDelta:
    return pb.ToolCallDelta(index=delta.index, id=delta.id, name=delta.name, arguments=delta.arguments)


def finish_info(event: FinishEvent) -> pb.FinishInfo:
    usage = pb.Usage(
        prompt_tokens=event.usage.prompt_tokens,
        completion_tokens=event.usage.completion_tokens,
        cached_tokens=event.usage.cached_tokens,
    )
    rate = 1e3 / event.tpot_ms if event.tpot_ms else 0.0
    timings = pb.Timings(ttft_ms=event.ttft_ms, tpot_ms=event.tpot_ms, tokens_per_second=rate)
    return pb.FinishInfo(
        reason=_REASONS[event.reason],
        text=event.text,
        usage=usage,
        timings=timings,
        stages=map(_encode_figures, event.stages),
        reasoning=event.reasoning,
        tool_calls=map(_encode_call, event.calls),
        sample=event.sample,
    )


def progress(p: LoadProgress) -> cpb.StageProgress:
    return cpb.StageProgress(
        worker=p.worker,
        start_layer=p.layers.start,
        end_layer=p.layers.end,
        done_bytes=p.done_bytes,
        total_bytes=p.total_bytes,
        state=p.state,
        hub_bytes=p.hub_bytes,
        peer_bytes=p.peer_bytes,
        notices=p.notices,
    )


def cluster_state(s: Snapshot) -> cpb.GetClusterResponse:
    beliefs = {b.worker: b for b in s.beliefs}
    reply = cpb.GetClusterResponse(
        cluster=s.cluster,
        version=__version__,
        state=_STATES[s.state],
        problem=s.problem,
        workers=[_encode_worker(m, None if m.duplicate else beliefs.get(m.facts.name)) for m in s.members],
        recoveries=s.recoveries,
        queued=sum(r.phase is Phase.QUEUED for r in s.loop.requests) if s.loop else 0,
        requests=[_encode_request(r) for r in s.loop.requests] if s.loop else [],
        lane_sizes=s.loop.lane_sizes if s.loop else [],
        prefixes=s.loop.prefixes if s.loop else 0,
        requests_finished=s.finished,
        tokens_generated=s.tokens,
        uptime_seconds=s.uptime_s,
        warnings=s.warnings,
        lag_seconds=s.lag_s,
    )
    if s.repair:
        reply.repair.CopyFrom(_encode_repair(s.repair))
    if s.move:
        reply.move.CopyFrom(_encode_repair(s.move))
    if s.plan:
        reply.model, reply.epoch = s.plan.model.name, s.plan.epoch
        reply.layers = s.plan.stages[-1].layers.end
        reply.max_context, reply.max_sequences = s.plan.max_context, s.plan.max_sequences
        reply.route = _ROUTES[s.plan.route]
        reply.stages.extend(_encode_stage(p, r.inlet) for p, r in zip(s.plan.stages, s.ring, strict=True))
        _add_reasons(reply, s.plan)
    if s.loop:
        _add_load(reply, s.loop)
    return reply


def plan_reply(plan: Plan) -> cpb.PlanResponse:
    reply = cpb.PlanResponse(
        model=plan.model.name,
        layers=plan.stages[-1].layers.end,
        max_context=plan.max_context,
        max_sequences=plan.max_sequences,
        route=_ROUTES[plan.route],
        stages=[_encode_stage(stage, plan.route) for stage in plan.stages],
    )
    _add_reasons(reply, plan)
    return reply


def _add_reasons(reply: cpb.GetClusterResponse | cpb.PlanResponse, plan: Plan) -> None:
    reply.objective = _OBJECTIVES[plan.objective]
    reply.spares.extend(cpb.SpareWorker(worker=spare.worker, why=spare.why) for spare in plan.spares)
    reply.reasons.extend(plan.reasons)
    if f := plan.forecast:
        reply.forecast.one_user, reply.forecast.eight_users = f.one_user, f.eight_users
        reply.forecast.first_token_seconds, reply.forecast.prompt_tokens = f.first_token_s, f.prompt_tokens


def _add_load(reply: cpb.GetClusterResponse, loop: LoopView) -> None:
    # Not strict: plan and loop view are two snapshots; a recovery between them may change the number of stages.
    load = zip(reply.stages, loop.reserved_bytes, loop.prefix_bytes, loop.bubbles, strict=False)
    for stage, reserved, prefixes, bubble in load:
        stage.reserved_bytes, stage.prefix_bytes, stage.bubble_share = reserved, prefixes, bubble
    for stage, pace in zip(reply.stages, loop.pace, strict=False):
        stage.measured_ms, stage.expected_ms = pace.measured_ms, pace.expected_ms
        stage.measured_frames = pace.frames
    for stage, busy_s in zip(reply.stages, loop.busy_s, strict=False):
        stage.busy_seconds, stage.active_seconds = busy_s, loop.active_s


def _encode_repair(r: Repair) -> cpb.Repair:
    return cpb.Repair(
        worker=r.worker,
        cause=r.cause,
        since_seconds=r.since_seconds,
        doing=r.doing,
        expected_seconds=r.expected_seconds,
        attempts=r.attempts,
    )


def _encode_worker(m: RosterEntry, belief: Belief | None) -> cpb.Worker:
    f = m.facts
    return cpb.Worker(
        id=f.id,
        name=f.name,
        version=f.version,
        control_address=f.control_address,
        data_address=f.data_address,
        chip=f.chip,
        backend=f.backend,
        mlx_version=f.mlx_version,
        memory_total=f.memory_total,
        memory_limit=f.memory_limit,
        memory_used=f.memory_used,
        memory_peak=f.memory_peak,
        sequences=f.sequences,
        reachable=m.reachable,
        problem=m.problem,
        interface=f.interface,
        gpu_cores=f.gpu_cores,
        memory_pressure=f.memory_pressure,
        bandwidth=f.profile.bandwidth,
        standing=belief.standing if belief else Standing.UP,
        silent_seconds=time.monotonic() - belief.heard if belief else 0.0,
        losses=belief.losses if belief else 0,
        draining=f.draining,
        clock_ahead_seconds=f.clock_ahead_s,
        lag_seconds=f.lag_s,
    )


def _encode_stage(planned: PlannedStage, inlet: Route) -> cpb.Stage:
    return cpb.Stage(
        index=planned.spec.index,
        worker=planned.worker,
        start_layer=planned.layers.start,
        end_layer=planned.layers.end,
        weight_bytes=planned.weight_bytes,
        cache_bytes=planned.cache_bytes,
        inlet=_ROUTES[inlet],
        predicted_ms=planned.decode_ms,
    )


def _encode_request(r: RequestView) -> cpb.LiveRequest:
    return cpb.LiveRequest(
        request_id=r.id,
        state=_PHASES[r.phase],
        prompt_tokens=r.prompt_tokens,
        prefilled_tokens=r.prefilled_tokens,
        cached_tokens=r.cached_tokens,
        completion_tokens=r.completion_tokens,
        lane=r.lane,
        age_seconds=r.age_s,
    )
