"""Describe plans, workers, stages and live requests as ``macpipe status``, ``ps`` and ``plan`` show them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace

from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.planner import Links
from cluster.coordinator.ring import RingStage
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.training_job import TrainingJob
from cluster.core.adapter import Adapter
from cluster.core.cluster_state import AdapterState, ClusterState, ModelPlan, RequestState, StageState
from cluster.core.plan import Link, Plan, PlannedStage, Route
from cluster.core.worker import WorkerState, WorkerSummary
from cluster.membership.suspicion import Belief, Standing
from cluster.scheduler.disk_prefixes import ReadOutcome


def describe_plan(plan: Plan, links: Links | None = None) -> ModelPlan:
    """Describe a plan for a model that is not loaded. ``links`` are the measured ones, by the names (from, to)."""
    known, before, stages = links or {}, "", list[StageState]()
    for stage in plan.stages:
        stages.append(_describe_stage(stage, plan.route, known.get((before, stage.worker))))
        before = stage.worker if stage.spec.ranks == 1 else ""  # the links of a group are not those of a hop
    return ModelPlan(
        model=plan.model.name,
        layers=plan.stages[-1].layers.end,
        max_context=plan.max_context,
        max_sequences=plan.max_sequences,
        route=plan.route,
        objective=plan.objective,
        stages=tuple(stages),
        forecast=plan.forecast,
        spares=plan.spares,
        reasons=plan.reasons,
    )


def with_plan(state: ClusterState, plan: Plan, ring: Sequence[RingStage], loop: LoopView | None) -> ClusterState:
    """Return the state of a cluster that serves a plan. ``ring`` has the stages' actual routes and links."""
    return replace(
        state,
        model=plan.model.name,
        epoch=plan.epoch,
        layers=plan.stages[-1].layers.end,
        max_context=plan.max_context,
        max_sequences=plan.max_sequences,
        route=plan.route,
        stages=describe_stages(plan, ring, loop),
        objective=plan.objective,
        forecast=plan.forecast,
        spares=plan.spares,
        reasons=plan.reasons,
    )


def describe_stages(plan: Plan, ring: Sequence[RingStage], loop: LoopView | None) -> tuple[StageState, ...]:
    """Describe the stages of a plan that is served. ``ring`` has their actual routes and links."""
    stages = [
        _describe_stage(stage, ring_stage.input_route, ring_stage.link)
        for stage, ring_stage in zip(plan.stages, ring, strict=True)
    ]
    if loop is None:
        return tuple(stages)
    busy = {stage.index: stage for stage in _with_load([stage for stage in stages if stage.rank == 0], loop)}
    return tuple(replace(busy[s.index], worker=s.worker, rank=s.rank) if s.index in busy else s for s in stages)


def with_training(state: ClusterState, job: TrainingJob) -> ClusterState:
    """Return the state of a cluster that trains adapters."""
    described = replace(state, training=job.progress, model=job.model_name)
    if job.plan is None:
        return described
    stages = tuple(_describe_stage(stage, Route.RELAY) for stage in job.plan.stages)
    layers = stages[-1].layers.end
    return replace(described, epoch=job.plan.epoch, layers=layers, route=Route.RELAY, stages=stages)


def with_requests(state: ClusterState, loop: LoopView) -> ClusterState:
    """Return the state of a cluster whose engine loop has these live requests."""
    return replace(
        state,
        queued=sum(r.state is RequestState.QUEUED for r in loop.requests),
        requests=loop.requests,
        lane_sizes=loop.lane_sizes,
        prefixes=loop.prefixes,
        guesses=loop.guesses,
        guesses_without_room=loop.guesses_without_room,
        disk_hits=loop.disk_reads.get(ReadOutcome.HIT, 0),
        disk_misses=sum(count for outcome, count in loop.disk_reads.items() if outcome != ReadOutcome.HIT),
        disk_tokens=loop.disk_tokens,
    )


def describe_adapters(adapters: Sequence[Adapter]) -> tuple[AdapterState, ...]:
    """Describe the adapters of the served model."""
    return tuple(AdapterState(a.ref.name, a.ref.fingerprint, a.nbytes) for a in adapters)


def describe_workers(members: Sequence[RosterEntry], beliefs: Sequence[Belief]) -> tuple[WorkerState, ...]:
    """Describe the workers. A duplicate has no belief of its own: the belief is about the worker whose name it uses."""
    by_name = {b.worker: b for b in beliefs}
    return tuple(_describe_worker(m, None if m.duplicate else by_name.get(m.info.name)) for m in members)


def _describe_worker(member: RosterEntry, belief: Belief | None) -> WorkerState:
    summary = {field.name: getattr(member.info, field.name) for field in fields(WorkerSummary)}
    return WorkerState(
        **summary,
        reachable=member.reachable,
        problem=member.problem,
        bandwidth=member.info.profile.bandwidth,
        standing=belief.standing if belief else Standing.UP,
        silent_seconds=time.monotonic() - belief.heard if belief else 0.0,
        losses=belief.losses if belief else 0,
    )


def _describe_stage(planned: PlannedStage, input_route: Route, link: Link | None = None) -> StageState:
    return StageState(
        index=planned.spec.index,
        rank=planned.spec.rank,
        ranks=planned.spec.ranks,
        worker=planned.worker,
        layers=planned.layers,
        weight_bytes=planned.weight_bytes,
        cache_bytes=planned.cache_bytes,
        input_route=input_route,
        predicted_ms=planned.decode_ms,
        link_round_trip_ms=link.round_trip_s * 1e3 if link else 0.0,
        link_bandwidth=link.bandwidth if link else 0.0,
        link_interface=link.interface if link else "",
    )


def _with_load(stages: Sequence[StageState], loop: LoopView) -> list[StageState]:
    """Add memory in use and measured times. A loop has no times before its first frames."""
    # Not strict: plan and loop view are two snapshots; a recovery between them may change the number of stages.
    load = zip(stages, loop.reserved_bytes, loop.prefix_bytes, loop.bubbles, strict=False)
    found = [
        replace(stage, reserved_bytes=reserved, prefix_bytes=prefixes, bubble_share=bubble)
        for stage, reserved, prefixes, bubble in load
    ]
    found += stages[len(found) :]
    for i, step_time in enumerate(loop.step_times[: len(found)]):
        found[i] = replace(
            found[i],
            measured_ms=step_time.measured_ms,
            expected_ms=step_time.expected_ms,
            measured_frames=step_time.frames,
        )
    for i, wasted_s in enumerate(loop.wasted_s[: len(found)]):
        found[i] = replace(found[i], wasted_seconds=wasted_s)
    for i, busy_s in enumerate(loop.busy_s[: len(found)]):
        found[i] = replace(found[i], busy_seconds=busy_s, active_seconds=loop.active_s)
    return found
