"""Decides which copies of models make room for another model. Pure.

A copy goes if the other model would otherwise not fit, or would be in the way of more models than it has to.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

from cluster.placement.arrangement import Arrangement, Layouts, LoadedModel, ModelDemand
from cluster.placement.several_models import least_in_the_way

__all__ = ["choose_copies_to_drop"]

MAX_TRIED_DROPS = 64
"""Maximum number of sets of one size that are tried as the copies to drop; then whole ones are dropped in order."""


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
