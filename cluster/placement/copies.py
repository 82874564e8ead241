"""Decides which copies of models to make on idle Macs, and which of them make room for another model. Pure.

A copy is made only where nothing is held, so it costs no model anything. It goes if another model would otherwise not
fit, or would be in the way of more models than it has to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from cluster.placement.arrangement import Arrangement, Layouts, LoadedModel, ModelDemand, ModelPlace
from cluster.placement.several_models import least_in_the_way

__all__ = ["CopyWish", "choose_copies_to_drop", "choose_next_copy"]

MAX_TRIED_DROPS = 64
"""Maximum number of sets of one size that are tried as the copies to drop; then whole ones are dropped in order."""


@dataclass(frozen=True, slots=True)
class CopyWish:
    """A served model with ``replicas`` complete copies, which may have ``most`` of them; None: as many as fit.

    ``demand`` says what a copy needs.
    """

    demand: ModelDemand
    replicas: int
    most: int | None = None


def choose_next_copy(wishes: Sequence[CopyWish], idle: Collection[str]) -> ModelPlace | None:
    """Return the next copy to make and where; None if none is wanted or fits on the ``idle`` Macs.

    A wish for a number comes before those for as many as possible. Then the model with the fewest copies is next, then
    the one with the highest priority, then the first.
    """
    layouts = Layouts()
    macs = sorted(idle)
    wanted = [one for one in wishes if one.most is None or one.replicas < one.most]
    for wish in sorted(wanted, key=lambda one: (one.most is None, one.replicas, -one.demand.priority)):
        if macs and (place := layouts.place(wish.demand, macs, Arrangement())):
            return place
    return None


def choose_copies_to_drop(
    demand: ModelDemand, loaded: Sequence[LoadedModel], copies: Sequence[str]
) -> tuple[str, ...] | None:
    """Return the fewest copies that make room for a model; () if it needs none, None if it does not fit even then.

    ``copies`` are the names of those ``loaded`` ones that may go, those that should go first at the front. They go
    until the model is no more in the way of the others than it would be without any copy.
    """
    layouts = Layouts()
    staying = tuple(one for one in loaded if one.name not in copies)
    free = least_in_the_way(layouts, demand, Arrangement(staying))
    if free is None:
        return None
    least = Arrangement(staying).burdens(free.macs)
    by_name = {one.name: one for one in loaded}
    for count in range(len(copies) + 1):
        sets = [copies[:count]] if comb(len(copies), count) > MAX_TRIED_DROPS else combinations(copies, count)
        for names in sets:
            kept = tuple(by_name[name] for name in copies if name not in names)
            place = least_in_the_way(layouts, demand, Arrangement((*staying, *kept)))
            if place and Arrangement(staying).burdens(place.macs) == least:
                return tuple(names)
    return tuple(copies)
