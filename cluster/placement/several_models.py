"""Places several models on the same Macs at once. Decides; loads nothing.

The most important model comes first: it is as fast as it would be alone. Each other one goes where it is least in the
way of those before it: on Macs that they leave free, else where they compute least. If a pinned model then fits
nowhere, the orders of the models and the Macs of each are compared, so that all pinned ones fit and the important ones
stay as fast as they can. A model that is not pinned never moves another one. It is left out if it does not fit, with
the models that would have to be unloaded for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from cluster.placement.arrangement import Arrangement, Layouts, LoadedModel, ModelDemand, ModelPlace, offer_macs
from cluster.placement.memory_shares import MemoryShares, least_shares, share_memory

__all__ = ["JointPlacement", "LeftOut", "least_in_the_way", "place_models"]

EVERY_ORDER = 4
"""Up to so many models, every order of them is compared."""
MAX_TRIED = 1_000
"""Maximum number of layouts, those of the last model aside, that are tried for one order of the models."""
MAX_UNLOADED = 4
"""Of so many models, the least important ones, every subset is tried as those to be unloaded for another one."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A model without a place. Once the models that ``unload`` names are unloaded, it fits at ``place``.

    Without such models, ``fits_alone`` says whether it would fit if nothing else was there.
    """

    demand: ModelDemand
    unload: tuple[str, ...] = ()
    place: ModelPlace | None = None
    fits_alone: bool = True


@dataclass(frozen=True, slots=True)
class JointPlacement:
    """Where each model goes. ``shares`` are the bytes that each placed model may take of a Mac.

    ``placed`` is in order of importance. ``moved`` are the models that a pinned one makes slower: what their plans
    minimise would be so many seconds without it.
    """

    loaded: tuple[LoadedModel, ...]
    placed: tuple[ModelPlace, ...]
    left_out: tuple[LeftOut, ...]
    moved: Mapping[str, float]
    shares: MemoryShares

    def find(self, name: str) -> ModelPlace | None:
        """Return the place of the model with this name; None if it has none."""
        return next((place for place in self.placed if place.name == name), None)


def place_models(demands: Sequence[ModelDemand], loaded: Sequence[LoadedModel] = ()) -> JointPlacement:
    """Return a placement of as many of the models as fit beside those that are loaded.

    The first one of the most important ones is placed like a pinned one.
    """
    layouts = Layouts()
    ranked = sorted(demands, key=lambda demand: -demand.priority)
    arrangement = Arrangement(tuple(loaded))
    optional: list[ModelDemand] = []
    for demand in ranked:
        if demand is not ranked[0] and not demand.pinned:
            optional.append(demand)
            continue
        place = least_in_the_way(layouts, demand, arrangement)
        wider = arrangement.including(place) if place else _rearrange(layouts, arrangement, demand)
        arrangement = wider or arrangement
    moved = _find_moved(layouts, arrangement)
    for demand in optional:
        if place := least_in_the_way(layouts, demand, arrangement):
            arrangement = arrangement.including(place)
    placed = {place.name for place in arrangement.places}
    left_out = tuple(_leave_out(layouts, demand, arrangement) for demand in ranked if demand.name not in placed)
    places = tuple(sorted(arrangement.places, key=lambda place: ranked.index(place.demand)))
    shares = _share(replace(arrangement, places=places), left_out)
    return JointPlacement(tuple(loaded), places, left_out, moved, shares)


def least_in_the_way(layouts: Layouts, demand: ModelDemand, beside: Arrangement) -> ModelPlace | None:
    """Return where a model is least in the way of the models that are there; None if it fits nowhere.

    Where all are equally little in its way, it is where it is fastest; but beside others, where most room is left.
    """
    if not beside.all:
        return layouts.place(demand, None, beside)
    return min(layouts.options(demand, beside), key=lambda place: _annoyance(place, beside), default=None)


def _annoyance(place: ModelPlace, beside: Arrangement) -> tuple[object, ...]:
    burdens = beside.burdens(place.macs)
    left = offer_macs(place.demand.candidates, beside.including(place).taken, place.macs)
    room = min(w.memory.usable for w in left.workers) if any(burdens) else 0
    return burdens, -room, _rounded(place.cost_s), len(place.macs)


def _rearrange(layouts: Layouts, arrangement: Arrangement, demand: ModelDemand) -> Arrangement | None:
    """Return the best arrangement of the models and one more, in which they need not be where they are; None if none.

    The more important a model is, the more its speed counts. One that another one does not slow down comes before how
    fast the other one is.
    """
    ranked = (*(place.demand for place in arrangement.places), demand)
    bare = Arrangement(arrangement.loaded)
    best: tuple[tuple[object, ...], Arrangement] | None = None
    for order in _orders(ranked):
        for found in _arrangements(layouts, order, bare, iter(range(MAX_TRIED))):
            by_rank = replace(found, places=tuple(sorted(found.places, key=lambda p: ranked.index(p.demand))))
            worth = _worth(by_rank)
            if best is None or worth < best[0]:
                best = worth, by_rank
    return best[1] if best else None


def _orders(ranked: Sequence[ModelDemand]) -> Iterator[tuple[ModelDemand, ...]]:
    """Yield the orders in which the models choose their Macs; of many models, only three."""
    if len(ranked) <= EVERY_ORDER:
        yield from permutations(ranked)
        return
    yield tuple(reversed(ranked))
    by_size = sorted(ranked, key=lambda demand: sum(demand.shape.layer_bytes))
    yield from (tuple(by_size), tuple(reversed(by_size)))


def _arrangements(
    layouts: Layouts, order: Sequence[ModelDemand], beside: Arrangement, tries: Iterator[int]
) -> Iterator[Arrangement]:
    """Yield the arrangements of all these models in which each takes of the Macs what those before it have left.

    Each layout that others must fit beside takes one of ``tries``. Without any left, nothing more is yielded.
    """
    if not order:
        yield beside
        return
    for place in layouts.options(order[0], beside):
        if len(order) > 1 and next(tries, None) is None:
            return
        yield from _arrangements(layouts, order[1:], beside.including(place), tries)


def _worth(arrangement: Arrangement) -> tuple[object, ...]:
    """Return what is less for the better arrangement."""
    worth: list[object] = []
    before = Arrangement(arrangement.loaded)
    for place in arrangement.places:
        worth += [before.burdens(place.macs), _rounded(place.cost_s)]
        before = before.including(place)
    return (*worth, tuple(place.macs for place in arrangement.places))


def _rounded(seconds: float) -> float:
    """Return six digits, so that sums in another order are no other time."""
    return float(f"{seconds:.5e}")


def _find_moved(layouts: Layouts, arrangement: Arrangement) -> dict[str, float]:
    """Return the models that would be faster if only the more important ones were there, with their seconds then."""
    moved: dict[str, float] = {}
    before = Arrangement(arrangement.loaded)
    for place in arrangement.places:
        free = least_in_the_way(layouts, place.demand, before)
        if free is not None and _rounded(free.cost_s) < _rounded(place.cost_s):
            moved[place.name] = free.cost_s
        before = before.including(place)
    return moved


def _leave_out(layouts: Layouts, demand: ModelDemand, arrangement: Arrangement) -> LeftOut:
    """Return the fewest models that would have to be unloaded for this one; of equally many, the least important."""
    loaded = [one for one in arrangement.loaded if not one.pinned]
    removable = [*(one.name for one in loaded), *(p.name for p in arrangement.places if not p.demand.pinned)]
    removable = removable[::-1][:MAX_UNLOADED]
    for count in range(1, len(removable) + 1):
        for names in combinations(removable, count):
            if place := least_in_the_way(layouts, demand, arrangement.without(names)):
                return LeftOut(demand, tuple(reversed(names)), place)
    return LeftOut(demand, fits_alone=layouts.place(demand, None, Arrangement()) is not None)


def _share(arrangement: Arrangement, left_out: Sequence[LeftOut]) -> MemoryShares:
    """Share what is left of the Macs, so that each model that was left out also fits once the others are unloaded."""
    shares = _share_among(arrangement)
    for one in left_out:
        if one.place:
            others = arrangement.without(one.unload).including(one.place)
            shares = least_shares(shares, _share_among(others))
    return {place.name: shares[place.name] for place in arrangement.places}


def _share_among(arrangement: Arrangement) -> MemoryShares:
    needs = {place.name: place.needs for place in arrangement.places}
    limits = {p.name: p.demand.most_contexts for p in arrangement.places if p.demand.most_contexts is not None}
    loaded = Arrangement(arrangement.loaded).taken
    offers = [offer_macs(place.demand.candidates, loaded).workers for place in arrangement.places]
    return share_memory({w.name: w.memory.usable for offered in offers for w in offered}, needs, limits)
