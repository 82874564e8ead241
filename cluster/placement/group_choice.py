"""Decide which workers share layers as a group: those that are named, or those that gain by it.

Each choice of groups is planned as if it were the only one, and the best plan by the objective is taken. A group that
people asked for, or that is refused, is compared with the plan without it, in figures. It loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from cluster.core.errors import NoPlan
from cluster.core.plan import ModelShape, Objective
from cluster.core.text import figure_in_words
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.groups import SUMS_PER_LAYER, combine_groups, group_name, sum_speed
from cluster.placement.propose import (
    ChosenLayout,
    PlanRequest,
    Proposal,
    choose_layout,
    explain_layout,
    propose,
    search_layouts,
)
from cluster.placement.search import Search
from cluster.placement.stage_table import StageTable

__all__ = [
    "MAX_POSSIBLE",
    "GroupedChoice",
    "Groups",
    "choose_with_groups",
    "compare_groups",
    "list_pairs",
    "propose_groups",
]

Groups = Sequence[Sequence[str]]
MAX_POSSIBLE = 6
"""Groups that are tried, with all combinations of those that have no worker in common."""


def list_pairs(candidates: Candidates) -> list[tuple[str, ...]]:
    """Return pairs of equal workers that could be groups, each worker in one pair."""
    kinds: dict[object, list[Candidate]] = {}
    for worker in candidates.workers:
        kinds.setdefault(worker.kind, []).append(worker)
    pairs: list[tuple[str, ...]] = [
        (one.name, other.name) for alike in kinds.values() for one, other in zip(alike[::2], alike[1::2], strict=False)
    ]
    return pairs[:MAX_POSSIBLE]


def propose_groups(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, forced: Groups, possible: Groups = ()
) -> Proposal:
    """Propose a layout with the ``forced`` groups, or with those of the ``possible`` ones that make it better.

    Raises as ``propose`` and ``combine_groups``.
    """
    if forced:
        proposal = _propose_all(shape, candidates, request, forced)
        return replace(
            proposal, reasons=(*compare_groups(shape, candidates, request, proposal, forced), *proposal.reasons)
        )
    refusal: NoPlan | None = None
    try:
        best = propose(shape, candidates, request)
    except NoPlan as e:
        if not possible:
            raise
        refusal, best = e, None
    tried = [found for groups in _disjoint(possible) if (found := _try(shape, candidates, request, groups))]
    plain, grouped = best, max(tried, key=lambda one: _merit(one, request), default=None)
    if grouped and (plain is None or _merit(grouped, request) > _merit(plain, request)):
        names = [[member.name for member in worker.each] for worker in grouped.workers if worker.members]
        reasons = compare_groups(shape, candidates, request, grouped, names)
        return replace(grouped, reasons=(*reasons, *grouped.reasons))
    if plain is None:
        assert refusal
        raise refusal
    if grouped is None:
        return plain
    names = [[member.name for member in worker.each] for worker in grouped.workers if worker.members]
    return replace(plain, reasons=(*plain.reasons, *compare_groups(shape, candidates, request, grouped, names)))


def _disjoint(possible: Groups) -> Iterator[Groups]:
    """Yield every set of possible groups that have no worker in common."""
    for count in range(1, len(possible) + 1):
        for groups in combinations(possible, count):
            names = [name for group in groups for name in group]
            if len(set(names)) == len(names):
                yield groups


def _try(shape: ModelShape, candidates: Candidates, request: PlanRequest, groups: Groups) -> Proposal | None:
    """Return the proposal with these groups; None if nothing fits, or if it leaves one of them out."""
    try:
        proposal = propose(shape, combine_groups(shape, candidates, groups), request)
    except NoPlan:
        return None
    return proposal if _uses(proposal, groups) else None


def _propose_all(shape: ModelShape, candidates: Candidates, request: PlanRequest, forced: Groups) -> Proposal:
    """Return a proposal that uses all forced groups."""
    choice = choose_with_groups(shape, combine_groups(shape, candidates, forced), request, forced)
    return explain_layout(shape, choice.candidates, choice.request, choice.layout, choice.search)


@dataclass(frozen=True, slots=True)
class GroupedChoice:
    """A layout, and what it was chosen from."""

    candidates: Candidates
    request: PlanRequest
    layout: ChosenLayout
    search: Search | None


def choose_with_groups(
    shape: ModelShape, combined: Candidates, request: PlanRequest, groups: Groups, table: StageTable | None = None
) -> GroupedChoice:
    """Return a layout with all of the groups: over any of the workers, else over the groups, else over everybody.

    ``combined`` has the groups in place of their members; ``table`` is as for ``search_layouts``. Raises ``NoPlan`` and
    ``DoesNotFit``.
    """
    alone = replace(combined, workers=tuple(worker for worker in combined.workers if worker.members))
    for offered, count in ((combined, request.stage_count), *((one, len(one.workers)) for one in (alone, combined))):
        wanted = replace(request, stage_count=request.stage_count or count)
        try:
            search = search_layouts(shape, offered, wanted, table)
            layout = choose_layout(shape, offered, wanted, search)
        except NoPlan:
            if offered is combined and wanted == request:
                raise
            continue
        if sum(bool(worker.members) for worker in layout[0]) == len(groups):
            return GroupedChoice(offered, wanted, layout, search)
    shown = ", ".join(map(group_name, groups))
    raise NoPlan(f"no layout uses all of the groups {shown}; name fewer with --group, or more --workers")


def _uses(proposal: Proposal, groups: Groups) -> bool:
    return sum(bool(worker.members) for worker in proposal.workers) == len(groups)


def _merit(proposal: Proposal, request: PlanRequest) -> float:
    """Return by what layouts are compared, as in ``search``; 0 if a speed is unknown."""
    if proposal.forecast is None:
        return 0.0
    return 1 / max(proposal.decode_s) if request.objective is Objective.THROUGHPUT else proposal.forecast.one_user


def _rate(proposal: Proposal, request: PlanRequest) -> float:
    """Return the predicted tokens a second of the users that the objective is for; 0 if a speed is unknown."""
    if proposal.forecast is None:
        return 0.0
    return proposal.forecast.eight_users if request.objective is Objective.THROUGHPUT else proposal.forecast.one_user


def compare_groups(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, grouped: Proposal, groups: Groups
) -> tuple[str, ...]:
    """Return what groups bring against the best plan without them, in a sentence; () if there is nothing to say."""
    if grouped.forecast is None or not groups:
        return ()
    crossing = max(shape.boundary_bytes, default=0)
    slowest = max(
        (sum_speed(candidates, [w for w in candidates.workers if w.name in names]) for names in groups),
        key=lambda one: one.seconds_of(crossing),
    )
    sums = SUMS_PER_LAYER * shape.layers
    shown = ", ".join(map(group_name, groups))
    each = slowest.seconds_of(crossing)
    spent = f"{sums} sums of {each * 1e6:.0f} us ({slowest.source}) take {sums * each * 1e3:.1f} ms of a token"
    try:
        plain = propose(shape, candidates, replace(request, stage_count=None, layers=None))
    except NoPlan:
        return (f"with the group {shown}, {spent}; without it the model does not fit",)
    now, then = _rate(grouped, request), _rate(plain, request)
    whose = "eight users" if request.objective is Objective.THROUGHPUT else "one user"
    return (
        f"with the group {shown}, {spent}: {whose} would get {figure_in_words(now)} tokens/s, "
        f"without it {figure_in_words(then)}",
    )
