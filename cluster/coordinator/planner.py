"""Make a plan from a model's shape and the available workers, and compute its capacity. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from cluster.coordinator.group_meeting import is_accepted
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import exposure_in_words
from cluster.core.errors import InsecureGroup, InvalidOption
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
    Speculation,
    StageSpec,
)
from cluster.core.text import is_loopback, parse_address
from cluster.core.worker import WorkerInfo
from cluster.placement.candidates import Candidate, Candidates, Sums
from cluster.placement.equal_macs import hardware, trusted_profiles
from cluster.placement.group_choice import (
    MAX_ASSUMED,
    MAX_POSSIBLE,
    Groups,
    list_equal,
    list_possible,
    propose_groups,
)
from cluster.placement.groups import group_name
from cluster.placement.memory_split import WorkerMemory
from cluster.placement.predicted_step_time import verify_s
from cluster.placement.propose import PlanRequest, Proposal
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.kv_cost import Cost

Links = Mapping[tuple[str, str], Link]


def make_plan(
    epoch: int,
    shape: ModelShape,
    workers: Sequence[WorkerInfo],
    order: LoadOrder,
    links: Links | None = None,
    sums: Sums | None = None,
) -> Plan:
    """Return a plan over some of these workers. ``links`` are keyed by the names (from, to), ``sums`` by groups.

    Equal Macs count as equally fast, see ``trusted_profiles``. Raises the errors of ``plan_over``.
    """
    return explain_exposure(plan_over(epoch, shape, offer_workers(shape, workers, order, links, sums), order), workers)


def explain_exposure(plan: Plan, workers: Sequence[WorkerInfo] | None = None) -> Plan:
    """Return the plan with a reason that says what protects the links of its groups: nothing.

    It is not needed where they stay on this machine. ``workers`` None: they are assumed Macs.
    """
    hosts = {worker.name: parse_address(worker.data_address)[0] for worker in workers or () if worker.data_address}
    ranks = [stage.worker for stage in plan.stages if stage.spec.ranks > 1]
    outside = [name for name in ranks if workers is None or (name in hosts and not is_loopback(hosts[name]))]
    if not outside:
        return plan
    return replace(plan, reasons=(*plan.reasons, exposure_in_words(ranks)))


def offer_workers(
    shape: ModelShape,
    workers: Sequence[WorkerInfo],
    order: LoadOrder,
    links: Links | None = None,
    sums: Sums | None = None,
) -> Candidates:
    """Return the workers as the planner sees them for this model. Equal Macs count as equally fast.

    Raises ``InsecureGroup`` if others could read or change what a group of the order exchanges, and the order does not
    accept that.
    """
    profiles = trusted_profiles(shape, workers)
    offered = [
        Candidate(WorkerMemory(w.name, w.memory_limit), p, hardware(w)) for w, p in zip(workers, profiles, strict=True)
    ]
    require_secure_groups(workers, order)
    return Candidates(offered, links or {}, relay=order.route is Route.RELAY, measured_sums=sums or {})


def require_secure_groups(workers: Sequence[WorkerInfo], order: LoadOrder) -> None:
    """Raise ``InsecureGroup`` unless the groups stay on this machine, or the order accepts insecure links."""
    hosts = {worker.name: parse_address(worker.data_address)[0] for worker in workers if worker.data_address}
    for names in order.groups:
        outside = [name for name in names if name in hosts and not is_loopback(hosts[name])]
        if outside and not is_accepted(names, order.insecure_links):
            group = group_name(names)
            raise InsecureGroup(
                f"the ranks of the group {group} would exchange activations over links that are neither authenticated "
                f"nor encrypted; add --insecure-links {group} if nobody else can reach the network between these Macs"
            )


def plan_over(epoch: int, shape: ModelShape, candidates: Candidates, order: LoadOrder) -> Plan:
    """Return the plan that the order asks for. Raises ``NoPlan``, ``DoesNotFit`` or ``InvalidOption``."""
    forced, possible = list_groups(order, candidates, shape)
    return build_plan(epoch, shape, propose_groups(shape, candidates, plan_request(order), forced, possible), order)


def list_groups(order: LoadOrder, candidates: Candidates, shape: ModelShape) -> tuple[Groups, Groups]:
    """Return the groups that a plan must have, and those that it may have.

    It may have those whose links the operator accepts, and parts of them, unless they could not meet to be measured. Of
    assumed Macs with RDMA it may have any of equal ones. A plan that guesses may have none.
    """
    if order.groups or order.speculation is not Speculation.OFF or order.adapters or order.acceptance:
        return order.groups, ()
    if not candidates.known:
        return (), ()
    names = {worker.name for worker in candidates.workers}
    accepted = [group for group in order.insecure_links if names.issuperset(group)]
    pools = list_equal(candidates) if candidates.sums else accepted
    apart = {names for names, found in candidates.measured_sums.items() if found is None}
    found = list_possible(candidates, pools, {part.ranks for part in shape.rank_sizes})
    most = MAX_ASSUMED if candidates.sums else MAX_POSSIBLE
    return (), [group for group in found[:most] if frozenset(group) not in apart]


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
    lanes = order.lanes or len(proposal.ranges)
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
    return min(stage.cache_bytes // max(_context_bytes(shape, stage), 1) for stage in stages)


def _context_bytes(shape: ModelShape, stage: PlannedStage) -> int:
    """Return the bytes of a full context in a stage's caches."""
    return shape.of_rank(stage.spec.ranks).stage_cache_bytes(stage.layers)


def limit_caches(plan: Plan, shape: ModelShape, contexts: int) -> Plan:
    """Return the plan with room for at most ``contexts`` full contexts in the caches of each stage."""
    stages = tuple(
        replace(stage, cache_bytes=min(stage.cache_bytes, contexts * _context_bytes(shape, stage)))
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
    readers = [*(worker.ranks for worker in proposal.workers[1:]), 1]
    stages: list[PlannedStage] = []
    for i, (worker, layers) in enumerate(zip(proposal.workers, proposal.ranges, strict=True)):
        used = shape.of_rank(worker.ranks).stage_bytes(layers)
        for rank, member in enumerate(worker.each):
            spec = StageSpec(
                epoch,
                i,
                count,
                shape.model,
                layers,
                shape.max_context,
                order.kv_bits,
                order.quantize,
                rank,
                worker.ranks,
                readers[i] if rank == 0 else 1,
            )
            left = (member.memory.usable if shares is None else shares[member.name]) - used
            stages.append(PlannedStage(spec, member.name, used, left, proposal.decode_s[i] * 1e3))
    return tuple(stages)


def capacity(plan: Plan, shape: ModelShape, order: LoadOrder, workers: Sequence[WorkerInfo]) -> Capacity:
    """Return the limits within which the scheduler may load the plan's stages, which ``workers`` hold, in order."""
    parts = [(shape.of_rank(s.spec.ranks), s.layers) for s in plan.pipeline]

    @lru_cache(maxsize=4096)
    def cost_of(tokens: int) -> Cost:
        return tuple(part.stage_cache_bytes(own, tokens) for part, own in parts)

    @lru_cache(maxsize=4096)
    def mark_cost_of(length: int) -> Cost:
        return tuple(part.stage_mark_bytes(own, length) for part, own in parts)

    seats = [[s.cache_bytes for s in plan.stages if s.spec.index == i] for i in range(len(plan.pipeline))]
    budget = tuple(map(min, seats))
    several = not order.exact and not plan.is_grouped
    return Capacity(
        lanes=plan.lanes,
        rows=plan.rows,
        window=len(plan.pipeline) + 1,
        budget=budget,
        prefix_budget=tuple(int(b * PREFIX_SHARE) for b in budget),
        cost_of=cost_of,
        mark_cost_of=None if shape.trimmable else mark_cost_of,
        chunk=order.prefill_chunk or PREFILL_CHUNK,
        max_chunk=lambda context: order.prefill_chunk or max_chunk(plan, shape, context),
        fixed_chunk=order.prefill_chunk is not None,
        scored_chunk=max(MAX_SCORED_LOGITS // max(shape.vocabulary, 1), 1),
        max_step_ms=order.max_step_ms,
        verify_costs=verify_costs(plan, shape, [worker.profile for worker in workers]) if several else {},
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
    fitting = min(
        shape.of_rank(s.spec.ranks).chunk_within(int((s.weight_bytes + s.cache_bytes) * share), s.layers, context)
        for s in plan.stages
    )
    return max(PREFILL_CHUNK, min(fitting // CHUNK_BLOCK * CHUNK_BLOCK, shape.max_chunk))
