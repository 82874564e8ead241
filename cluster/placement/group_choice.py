"""Decide which workers share layers as a group: those that are named, or those that gain by it.

Each choice of groups is planned as if it were the only one, and the best plan by the objective is taken. A group that
people asked for, or that is refused, is compared with the plan without it, in figures. It loads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from cluster.core.all_reduce import SUMS_PER_LAYER
from cluster.core.errors import NoPlan
from cluster.core.group_limits import MAX_RANKS
from cluster.core.plan import Forecast, ModelShape, Objective
from cluster.core.text import figure_in_words
from cluster.placement.candidates import Candidates
from cluster.placement.groups import combine_groups, group_name, sum_speed
from cluster.placement.propose import (
    ChosenLayout,
    PlanRequest,
    Proposal,
    choose_layout,
    describe_layout,
    explain_layout,
    propose,
    search_layouts,
)
from cluster.placement.search import Search
from cluster.placement.stage_table import StageTable

__all__ = [
    "MAX_ASSUMED",
    "MAX_POSSIBLE",
    "GroupedChoice",
    "Groups",
    "choose_with_groups",
    "compare_groups",
    "list_equal",
    "list_possible",
    "list_sizes",
    "propose_groups",
]

Groups = Sequence[Sequence[str]]
MAX_POSSIBLE = 6
"""Groups that are tried, and measured before a load, since measuring one takes a second or more."""
MAX_ASSUMED = 16
"""Groups that are tried of assumed Macs, which nobody measures."""
MAX_POOL = 2 * MAX_RANKS
"""Workers of a pool that are divided into groups. There are some hundred ways to divide so many."""
MAX_TRIED = 100
"""Sets of groups that are compared."""


def list_possible(candidates: Candidates, pools: Groups, sizes: Collection[int]) -> list[tuple[str, ...]]:
    """Return the groups that the workers of each pool could form: the pools as they are, then their parts.

    A pool has the names of workers of which any may share layers. It is divided in every way into groups of ``sizes``
    ranks and single workers, but only in one order, with equal workers next to each other: a slow one slows its group.
    """
    kinds = {worker.name: worker.kind for worker in candidates.workers}
    known = list(dict.fromkeys(kinds.values()))
    found = {frozenset(pool): tuple(pool) for pool in pools if len(pool) in sizes}
    for pool in pools:
        ordered = sorted(pool, key=lambda name: known.index(kinds[name]))[:MAX_POOL]
        for counts in _divide(len(ordered), sorted(sizes, reverse=True)):
            for end, count in zip(accumulate(counts), counts, strict=True):
                group = tuple(ordered[end - count : end])
                found.setdefault(frozenset(group), group)
    return list(found.values())


def list_equal(candidates: Candidates) -> list[tuple[str, ...]]:
    """Return the names of the workers of each kind."""
    kinds: dict[object, list[str]] = {}
    for worker in candidates.workers:
        kinds.setdefault(worker.kind, []).append(worker.name)
    return [tuple(names) for names in kinds.values()]


def list_sizes(pools: Groups) -> range:
    """Return how many ranks a group of workers of one of the pools may have."""
    return range(2, min(max(map(len, pools), default=0), MAX_RANKS) + 1)


def _divide(workers: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every choice of the descending ``sizes`` with a sum of at most ``workers``, each in that order."""
    for i, size in enumerate(sizes):
        if size <= workers:
            yield from ((size, *more) for more in _divide(workers - size, sizes[i:]))
    yield ()


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
    tried = [_try(shape, candidates, request, groups) for groups in _list_sets(candidates, possible)]
    chosen = max(filter(None, tried), key=lambda one: _predict(shape, one), default=None)
    plain, grouped = best, _explain(shape, chosen) if chosen else None
    if grouped and (plain is None or _rate(grouped, request) > _rate(plain, request)):
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


def _list_sets(candidates: Candidates, possible: Groups) -> list[Groups]:
    """Return sets of possible groups that have no worker in common, as many as ``MAX_TRIED``.

    Without links and measured sums, sets of the same kinds of groups are equal, and one of them is enough.
    """
    kinds = {worker.name: worker.kind for worker in candidates.workers}
    alike = not candidates.links and not candidates.measured_sums
    found: dict[object, Groups] = {}
    for groups in _disjoint(possible):
        counted = Counter(tuple(kinds[name] for name in group) for group in groups)
        found.setdefault(frozenset(counted.items()) if alike else groups, groups)
        if len(found) == MAX_TRIED:
            break
    return list(found.values())


def _disjoint(possible: Groups) -> Iterator[tuple[Sequence[str], ...]]:
    """Yield every set of possible groups that have no worker in common, those with the first groups first."""
    for i, group in enumerate(possible):
        apart = [other for other in possible[i + 1 :] if not set(other) & set(group)]
        yield from ((group, *more) for more in _disjoint(apart))
        yield (group,)


def _try(shape: ModelShape, candidates: Candidates, request: PlanRequest, groups: Groups) -> GroupedChoice | None:
    """Return the best layout with these groups; None if nothing fits, or if it leaves one of them out."""
    try:
        combined = combine_groups(shape, candidates, groups)
        search = search_layouts(shape, combined, request)
        layout = choose_layout(shape, combined, request, search)
    except NoPlan:
        return None
    uses_all = sum(bool(worker.members) for worker in layout[0]) == len(groups)
    return GroupedChoice(combined, request, layout, search) if uses_all else None


def _predict(shape: ModelShape, choice: GroupedChoice) -> float:
    """Return the predicted tokens a second by which choices are compared; 0 if a speed is unknown."""
    if not choice.candidates.known:
        return 0.0
    found = describe_layout(shape, choice.candidates, choice.request, choice.layout).forecast
    return _rate_of(found, choice.request)


def _explain(shape: ModelShape, choice: GroupedChoice) -> Proposal:
    return explain_layout(shape, choice.candidates, choice.request, choice.layout, choice.search)


def _propose_all(shape: ModelShape, candidates: Candidates, request: PlanRequest, forced: Groups) -> Proposal:
    """Return a proposal that uses all forced groups."""
    choice = choose_with_groups(shape, combine_groups(shape, candidates, forced), request, forced)
    return _explain(shape, choice)


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


def _rate(proposal: Proposal, request: PlanRequest) -> float:
    """Return the predicted tokens a second of the users that the objective is for; 0 if a speed is unknown."""
    return _rate_of(proposal.forecast, request) if proposal.forecast else 0.0


def _rate_of(forecast: Forecast, request: PlanRequest) -> float:
    return forecast.eight_users if request.objective is Objective.THROUGHPUT else forecast.one_user


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
