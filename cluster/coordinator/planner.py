"""Make a plan from a model's shape and the available workers, and compute its capacity. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import InvalidOption
from cluster.core.limits import (
    LANE_ROWS,
    MAX_SCORED_LOGITS,
    MAX_STAGES,
    MAX_VERIFIED,
    MEMORY_MARGIN,
    PREFILL_CHUNK,
    PREFIX_SHARE,
)
from cluster.core.plan import (
    CHUNK_BLOCK,
    LayerRange,
    Link,
    ModelShape,
    Objective,
    Plan,
    PlannedStage,
    Profile,
    Route,
    StageSpec,
)
from cluster.core.worker import WorkerInfo
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.equal_macs import hardware, trusted_profiles
from cluster.placement.memory_split import WorkerMemory
from cluster.placement.predicted_step_time import verify_s
from cluster.placement.propose import PlanRequest, Proposal, propose
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.kv_cost import Cost

Links = Mapping[tuple[str, str], Link]


def make_plan(
    epoch: int, shape: ModelShape, workers: Sequence[WorkerInfo], order: LoadOrder, links: Links | None = None
) -> Plan:
    """Return a plan over some of these workers. ``links`` are keyed by the names (from, to).

    Equal Macs count as equally fast, see ``trusted_profiles``. Raises the errors of ``plan_over``.
    """
    return plan_over(epoch, shape, offer_workers(shape, workers, order, links), order)


def offer_workers(
    shape: ModelShape, workers: Sequence[WorkerInfo], order: LoadOrder, links: Links | None = None
) -> Candidates:
    """Return the workers as the planner sees them for this model. Equal Macs count as equally fast."""
    profiles = trusted_profiles(shape, workers)
    offered = [
        Candidate(WorkerMemory(w.name, w.memory_limit), p, hardware(w)) for w, p in zip(workers, profiles, strict=True)
    ]
    return Candidates(offered, links or {}, relay=order.route is Route.RELAY)


def plan_over(epoch: int, shape: ModelShape, candidates: Candidates, order: LoadOrder) -> Plan:
    """Return the plan that the order asks for. Raises ``NoPlan``, ``DoesNotFit`` or ``InvalidOption``."""
    return build_plan(epoch, shape, propose(shape, candidates, plan_request(order)), order)


def plan_request(order: LoadOrder) -> PlanRequest:
    """Return what the order asks of a plan. Raises ``InvalidOption``."""
    if order.lanes is not None and not 1 <= order.lanes <= MAX_STAGES:
        raise InvalidOption(f"--lanes is {order.lanes}; it must be from 1 to {MAX_STAGES}", field="lanes")
    if not 0 <= order.acceptance <= 1:
        raise InvalidOption(f"--acceptance is {order.acceptance:g}; it must be from 0 to 1", field="acceptance")
    if order.acceptance and order.objective is not Objective.LATENCY:
        raise InvalidOption("--acceptance is for one user; use it with --objective latency", field="acceptance")
    return PlanRequest(order.objective, order.worker_count, order.layers, order.lanes, order.acceptance)


def build_plan(
    epoch: int, shape: ModelShape, proposal: Proposal, order: LoadOrder, shares: Mapping[str, int] | None = None
) -> Plan:
    """Return the plan of a proposal. ``shares`` are the bytes that it may use of each worker; None: all there is."""
    stages = _stages(epoch, shape, proposal, order, shares)
    lanes = order.lanes or len(stages)
    rows = LANE_ROWS if shape.batchable else 1
    plan = Plan(
        epoch=epoch,
        model=shape.model,
        stages=stages,
        route=order.route,
        max_context=shape.max_context,
        max_sequences=min(full_contexts(stages, shape), lanes * rows),
        lanes=lanes,
        rows=rows,
        objective=order.objective,
        forecast=proposal.forecast,
        spares=proposal.spares,
        reasons=(*proposal.reasons, *_why_unbatchable(shape, order)),
    )
    return plan if order.cached_contexts is None else limit_caches(plan, shape, order.cached_contexts)


def full_contexts(stages: Sequence[PlannedStage], shape: ModelShape) -> int:
    """Return how many full contexts all stages have room for."""
    return min(stage.cache_bytes // max(shape.stage_cache_bytes(stage.layers), 1) for stage in stages)


def limit_caches(plan: Plan, shape: ModelShape, contexts: int) -> Plan:
    """Return the plan with room for at most ``contexts`` full contexts in the caches of each stage."""
    stages = tuple(
        replace(stage, cache_bytes=min(stage.cache_bytes, contexts * shape.stage_cache_bytes(stage.layers)))
        for stage in plan.stages
    )
    return replace(plan, stages=stages, max_sequences=min(full_contexts(stages, shape), plan.lanes * plan.rows))


def leave_room(plan: Plan, shape: ModelShape, order: LoadOrder, coming: int) -> tuple[Plan, LoadOrder]:
    """Return the plan, and its order, with caches that leave room for as many further models as are ``coming``.

    What is left on each Mac is for the caches of all, in equal parts, but a stage has room for one full context at
    least. An order that says how many it has room for stays as it is.
    """
    if not coming or order.cached_contexts is not None:
        return plan, order
    contexts = max(full_contexts(plan.stages, shape) // (1 + coming), 1)
    return limit_caches(plan, shape, contexts), replace(order, cached_contexts=contexts)


def _why_unbatchable(shape: ModelShape, order: LoadOrder) -> tuple[str, ...]:
    """Return the reason why requests cannot decode in one batch; () if they can."""
    if shape.batchable:
        return ()
    subject = f"caches of {order.kv_bits} bits" if order.kv_bits else f"requests to {shape.title}"
    return (f"{subject} cannot share a batch in mlx-lm: every lane takes one request at a time; --lanes makes more",)


def _stages(
    epoch: int, shape: ModelShape, proposal: Proposal, order: LoadOrder, shares: Mapping[str, int] | None
) -> tuple[PlannedStage, ...]:
    count = len(proposal.ranges)
    stages: list[PlannedStage] = []
    for i, (worker, layers) in enumerate(zip(proposal.workers, proposal.ranges, strict=True)):
        spec = StageSpec(epoch, i, count, shape.model, layers, shape.max_context, order.kv_bits, order.quantize)
        used = shape.stage_bytes(layers)
        left = (worker.memory.usable if shares is None else shares[worker.name]) - used
        stages.append(PlannedStage(spec, worker.name, used, left, proposal.decode_s[i] * 1e3))
    return tuple(stages)


def capacity(plan: Plan, shape: ModelShape, order: LoadOrder, workers: Sequence[WorkerInfo]) -> Capacity:
    """Return the limits within which the scheduler may load the plan's stages, which ``workers`` hold, in order."""
    layers = [s.layers for s in plan.stages]

    @lru_cache(maxsize=4096)
    def cost_of(tokens: int) -> Cost:
        return tuple(shape.stage_cache_bytes(own, tokens) for own in layers)

    @lru_cache(maxsize=4096)
    def mark_cost_of(length: int) -> Cost:
        return tuple(shape.stage_mark_bytes(own, length) for own in layers)

    budget = tuple(s.cache_bytes for s in plan.stages)
    return Capacity(
        lanes=plan.lanes,
        rows=plan.rows,
        window=len(plan.stages) + 1,
        budget=budget,
        prefix_budget=tuple(int(b * PREFIX_SHARE) for b in budget),
        cost_of=cost_of,
        mark_cost_of=None if shape.trimmable else mark_cost_of,
        chunk=order.prefill_chunk or PREFILL_CHUNK,
        max_chunk=lambda context: order.prefill_chunk or max_chunk(plan, shape, context),
        fixed_chunk=order.prefill_chunk is not None,
        scored_chunk=max(MAX_SCORED_LOGITS // max(shape.vocabulary, 1), 1),
        max_step_ms=order.max_step_ms,
        verify_costs={} if order.exact else verify_costs(plan, shape, [worker.profile for worker in workers]),
    )


def verify_costs(plan: Plan, shape: ModelShape, profiles: Sequence[Profile]) -> dict[int, tuple[float, ...]]:
    """Return, for each number of tokens in a frame, how often it takes each stage's time of one token.

    A number is left out if a worker did not measure it. Caches that cannot all be trimmed have none: after a wrong
    guess they would need their state after every token.
    """
    if not shape.trimmable:
        return {}
    found = {}
    for tokens in range(2, MAX_VERIFIED + 1):
        costs = [_verify_cost(shape, p, s.layers, tokens) for p, s in zip(profiles, plan.stages, strict=True)]
        if all(costs):
            found[tokens] = tuple(costs)
    return found


def _verify_cost(shape: ModelShape, profile: Profile, layers: LayerRange, tokens: int) -> float:
    """Return how often a frame of ``tokens`` takes a stage's time of one token; 0 if that is not known."""
    several, one = verify_s(shape, profile, layers, tokens), verify_s(shape, profile, layers, 1)
    return several / one if several and one else 0.0


def max_chunk(plan: Plan, shape: ModelShape, context: int) -> int:
    """Return the most tokens of a prompt chunk after ``context`` others, by the memory that each stage keeps free.

    It is never less than ``PREFILL_CHUNK``, and never more than the model's caches are sized for.
    """
    share = MEMORY_MARGIN / (1 - MEMORY_MARGIN)
    rooms = ((s.layers, int((s.weight_bytes + s.cache_bytes) * share)) for s in plan.stages)
    fitting = min(shape.chunk_within(room, layers, context) for layers, room in rooms)
    return max(PREFILL_CHUNK, min(fitting // CHUNK_BLOCK * CHUNK_BLOCK, shape.max_chunk))
