"""Explains in sentences where several models were placed: who shares a Mac, who gave way, and who waits for whom.

What limits the speed of each model alone is explained as for one model, over the Macs that are left to it. It decides
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.core.errors import DoesNotFit, NoPlan
from cluster.core.plan import Objective
from cluster.core.text import figure_in_words, names_in_words, with_subject
from cluster.placement.arrangement import Arrangement, ModelDemand, ModelPlace, offer_groups, offer_macs
from cluster.placement.group_choice import compare_groups, propose_groups
from cluster.placement.groups import group_name
from cluster.placement.propose import Proposal, explain_layout, search_layouts
from cluster.placement.several_models import JointPlacement, LeftOut

__all__ = ["explain_left_out", "explain_model", "explain_place", "explain_placement"]


def explain_place(placement: JointPlacement, place: ModelPlace) -> Proposal:
    """Return a placed model's proposal: its forecast, and its reasons if it had to leave other models their Macs."""
    others = Arrangement(placement.loaded, placement.placed).without([place.name])
    used = {mac for one in others.all for mac in one.step_shares}
    free = [w.name for w in place.demand.candidates.workers if w.name not in used or w.name in place.macs]
    candidates = offer_groups(place.demand, others.taken, free)
    by_name = {w.name: w for w in candidates.workers}
    chosen = tuple(by_name[group_name(macs)] for macs in place.seats), place.ranges
    shape, request, groups = place.demand.shape, place.demand.request, place.demand.groups
    made = explain_layout(shape, candidates, request, chosen, search_layouts(shape, candidates, request))
    alone = offer_macs(place.demand.candidates, others.taken, free)
    return replace(made, reasons=(*compare_groups(shape, alone, request, made, groups), *made.reasons))


def explain_placement(placement: JointPlacement) -> tuple[str, ...]:
    """Return a sentence about each model's place, the most important model first, and one if some share a Mac."""
    sentences = [sentence for place in placement.placed for sentence in explain_model(placement, place)]
    users = Counter(mac for one in Arrangement(placement.loaded, placement.placed).all for mac in one.step_shares)
    if any(count > 1 for count in users.values()):
        sentences.append("models on the same Mac slow each other down while both answer; predictions do not count that")
    return (*sentences, *map(explain_left_out, placement.left_out))


def explain_model(placement: JointPlacement, place: ModelPlace) -> Iterator[str]:
    """Yield whether the model makes room for pinned ones, and whether it is in the way of more important ones."""
    if place.name in placement.moved:
        yield _explain_rank(placement, place)
    before = Arrangement(placement.loaded, placement.placed[: placement.placed.index(place)])
    if before.all:
        yield _explain_macs(place, before)


def _explain_rank(placement: JointPlacement, place: ModelPlace) -> str:
    """Say what a model loses for the pinned ones."""
    pinned = [one.name for one in placement.placed if one.demand.pinned and one is not place]
    now, then = _merit(place, place.cost_s), _merit(place, placement.moved[place.name])
    return (
        f"{place.name} makes room for {names_in_words(pinned)}, so that all pinned models fit: {now} instead of {then}"
    )


def _merit(place: ModelPlace, cost_s: float) -> str:
    if place.demand.request.objective is Objective.THROUGHPUT:
        return f"a slowest stage of {figure_in_words(cost_s * 1e3)} ms"
    return f"{figure_in_words(1 / cost_s)} tokens/s"


def _explain_macs(place: ModelPlace, before: Arrangement) -> str:
    """Say whether a model is in the way of those that are there."""
    used = {mac for one in before.all for mac in one.step_shares}
    shared = [name for name in place.macs if name in used]
    where = f"{place.name} is on {names_in_words(place.macs)}"
    others = [one.name for one in before.all]
    if not shared:
        return f"{where}, which {names_in_words(others)} {_verb(others, 'leaves', 'leave')} free"
    with_whom = [
        f"{one.name} (which spends {one.step_shares[name]:.0%} of a token's time there)"
        for name in shared
        for one in before.all
        if name in one.step_shares
    ]
    free = [w.name for w in place.demand.candidates.workers if w.name not in used]
    why = f"{names_in_words(free)} alone {_verb(free, 'is', 'are')} too small for it" if free else "no Mac is free"
    that = names_in_words(shared) if len(shared) < len(place.macs) else _verb(shared, "it", "them")
    return f"{where} and shares {that} with {names_in_words(list(dict.fromkeys(with_whom)))}; {why}"


def _verb(names: Sequence[str], one: str, several: str) -> str:
    return one if len(names) == 1 else several


def explain_left_out(left_out: LeftOut) -> str:
    """Say what has to happen before a model fits; if nothing helps, how much memory is missing."""
    name = left_out.demand.name
    if left_out.place:
        then = f"then it would be on {names_in_words(left_out.place.macs)}"
        is_unloaded = f"{_verb(left_out.unload, 'is', 'are')} unloaded"
        return f"{name} fits only when {names_in_words(left_out.unload)} {is_unloaded}; {then}"
    if left_out.fits_alone:
        return f"{name} does not fit beside the models that are pinned or come first; pin fewer, or add a Mac"
    return explain_refusal(left_out.demand)


def explain_refusal(demand: ModelDemand) -> str:
    """Return why a model does not fit on the Macs even alone."""
    count, asked = len(demand.candidates.workers), demand.request.stage_count or 0
    if asked > count:
        return f"{demand.name} was to be placed on {asked} workers, and there {_verb('x' * count, 'is', 'are')} {count}"
    try:
        propose_groups(demand.shape, demand.candidates, demand.request, demand.groups)
    except (DoesNotFit, NoPlan) as refusal:
        return with_subject(demand.name, refusal.sentence)
    raise ValueError(f"{demand.name} fits")
