"""Several models on the same Macs: who holds what, the memory that is left, and how much one is in another's way.

An ``Arrangement`` is a value; adding a model makes another one. ``Layouts`` finds the layouts of one model on what an
arrangement leaves, with the search for a single model. Neither decides which model comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from cluster.core.errors import DoesNotFit, NoPlan
from cluster.core.limits import MAX_SLICES
from cluster.core.plan import LayerRange, ModelShape, Objective
from cluster.placement.candidates import Candidates
from cluster.placement.group_choice import choose_with_groups
from cluster.placement.groups import combine_groups
from cluster.placement.memory_shares import MemoryNeed
from cluster.placement.memory_split import needed_bytes
from cluster.placement.propose import (
    SEQUENCES,
    ChosenLayout,
    PlanRequest,
    describe_layout,
)
from cluster.placement.stage_table import StageTable

__all__ = ["Arrangement", "Layouts", "LoadedModel", "ModelDemand", "ModelPlace", "offer_groups", "offer_macs"]

EVERY_SUBSET = 4
"""Up to so many Macs, a model is tried on every subset of them."""


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """A model to place. ``name`` tells it from the others; ``request`` is what its user asked for.

    ``candidates`` are the Macs that it may use, with the speed that each has with this model. A Mac has the same memory
    for all models.
    Of two models, the one with the higher ``priority`` is more important, else the one that is named first. A pinned
    one may make more important ones slower, but only if it fits nowhere otherwise. ``most_contexts`` is how many full
    contexts it has room for at most; None means no limit. ``groups`` are the names of Macs that share layers, each
    group as one stage: every layout has all of them.
    """

    name: str
    shape: ModelShape
    candidates: Candidates
    request: PlanRequest
    pinned: bool = False
    priority: int = 0
    most_contexts: int | None = None
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def grouped(self) -> tuple[str, ...]:
        """The Macs of all groups."""
        return tuple(name for group in self.groups for name in group)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is loaded and stays where it is.

    ``taken`` are the bytes that it may use of each Mac. ``step_shares`` is the share of its step's time that each Mac
    computes. ``stage_bytes`` is the least memory of the largest of its stages, which another Mac would need for it.
    """

    name: str
    taken: Mapping[str, int]
    step_shares: Mapping[str, float]
    pinned: bool = False
    stage_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """A model with the Macs of each stage, of which only a group has several, and their layers, in pipeline order.

    ``step_shares`` is the share of its step's time that each Mac computes; of its layers, if the speed of a Mac is not
    known. ``cost_s`` are the seconds that its plan minimises; 0 if they are not known.
    """

    demand: ModelDemand
    seats: tuple[tuple[str, ...], ...]
    ranges: tuple[LayerRange, ...]
    step_shares: Mapping[str, float]
    cost_s: float

    @property
    def name(self) -> str:
        return self.demand.name

    @property
    def macs(self) -> tuple[str, ...]:
        """The Macs of all stages."""
        return tuple(mac for macs in self.seats for mac in macs)

    @property
    def needs(self) -> dict[str, MemoryNeed]:
        """What the model needs on each Mac, by its name."""
        needs: dict[str, MemoryNeed] = {}
        for macs, layers in zip(self.seats, self.ranges, strict=True):
            shape = self.demand.shape.of_rank(len(macs))
            need = MemoryNeed(shape.stage_bytes(layers), SEQUENCES * shape.stage_cache_bytes(layers))
            needs |= dict.fromkeys(macs, need)
        return needs


@dataclass(frozen=True)
class Arrangement:
    """The models that are loaded, and those that were placed so far, the most important first."""

    loaded: tuple[LoadedModel, ...] = ()
    places: tuple[ModelPlace, ...] = ()

    @cached_property
    def taken(self) -> dict[str, int]:
        """The bytes that are taken on each Mac: what loaded models may use, and the least that the others need."""
        found: dict[str, int] = {}
        for one in self.loaded:
            for mac, nbytes in one.taken.items():
                found[mac] = found.get(mac, 0) + nbytes
        for place in self.places:
            for mac, need in place.needs.items():
                found[mac] = found.get(mac, 0) + need.least
        return found

    @property
    def full(self) -> set[str]:
        """The Macs that hold as many slices as a worker may."""
        slices = Counter(mac for one in self.all for mac in one.step_shares)
        return {mac for mac, count in slices.items() if count >= MAX_SLICES}

    @property
    def all(self) -> tuple[LoadedModel | ModelPlace, ...]:
        """All models, those that are loaded first."""
        return (*self.loaded, *self.places)

    def including(self, place: ModelPlace) -> Arrangement:
        """Return the arrangement with one more model."""
        return replace(self, places=(*self.places, place))

    def without(self, names: Collection[str]) -> Arrangement:
        """Return the arrangement without the models of these names."""
        return Arrangement(
            tuple(one for one in self.loaded if one.name not in names),
            tuple(one for one in self.places if one.name not in names),
        )

    def burdens(self, macs: Collection[str]) -> tuple[float, ...]:
        """Return, for each model here, the share of its step's time that the Macs compute."""
        return tuple(round(sum(one.step_shares.get(mac, 0.0) for mac in macs), 2) for one in self.all)


class Layouts:
    """Finds layouts of single models, on the memory that an arrangement leaves. Remembers what it found."""

    def __init__(self) -> None:
        self._tables: dict[str, StageTable] = {}
        self._found: dict[tuple[object, ...], ModelPlace | None] = {}

    def options(self, demand: ModelDemand, beside: Arrangement) -> Iterator[ModelPlace]:
        """Yield the best layouts of a model on sets of Macs, each once.

        Up to ``EVERY_SUBSET`` Macs, these are all sets. Of more, they are the Macs alone, and sets that grow from the
        Mac that the models there need least. The Macs of groups are in every set.
        """
        seen = set[tuple[object, ...]]()
        full = beside.full
        if not full.isdisjoint(demand.grouped):
            return
        usable = [w.name for w in demand.candidates.workers if w.name not in {*full, *demand.grouped}]
        for macs in _sets(usable, beside, demand.grouped):
            place = self.place(demand, macs, beside)
            if place and (key := (place.seats, place.ranges)) not in seen:
                seen.add(key)
                yield place

    def place(self, demand: ModelDemand, macs: Sequence[str] | None, beside: Arrangement) -> ModelPlace | None:
        """Return the best layout of a model on some of these Macs, or of all for None; None if none fits."""
        try:
            offered = offer_groups(demand, beside.taken, macs)
        except NoPlan:  # a Mac of a group is not there
            return None
        key = (demand.name, *((w.name, w.memory.taken) for w in offered.workers))
        if key not in self._found:
            self._found[key] = self._search(demand, offered)
        return self._found[key]

    def _search(self, demand: ModelDemand, offered: Candidates) -> ModelPlace | None:
        shape, request = demand.shape, demand.request
        least = needed_bytes(shape, LayerRange(0, shape.layers), SEQUENCES)
        too_few = len(offered.workers) < (request.stage_count or len(request.layers or (0,)))
        if too_few or sum(w.ranks * w.memory.usable for w in offered.workers) < least:
            return None
        if demand.name not in self._tables:
            self._tables[demand.name] = StageTable(shape, SEQUENCES)
        try:
            choice = choose_with_groups(shape, offered, request, demand.groups, self._tables[demand.name])
        except (DoesNotFit, NoPlan):
            return None
        return _place(demand, offered, choice.layout)


def offer_groups(demand: ModelDemand, taken: Mapping[str, int], macs: Collection[str] | None = None) -> Candidates:
    """Return the Macs as ``offer_macs``, with the groups of a model in place of their members.

    Raises ``NoPlan`` if a member is not among them.
    """
    return combine_groups(demand.shape, offer_macs(demand.candidates, taken, macs), demand.groups)


def offer_macs(candidates: Candidates, taken: Mapping[str, int], macs: Collection[str] | None = None) -> Candidates:
    """Return the Macs with these names, or all for None, of whose memory ``taken`` bytes are used."""
    return replace(
        candidates,
        workers=[
            replace(w, memory=replace(w.memory, taken=taken.get(w.name, 0)))
            for w in candidates.workers
            if macs is None or w.name in macs
        ],
    )


def _sets(names: Sequence[str], beside: Arrangement, always: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield sets of these Macs, each with those that are ``always`` in it."""
    if always:
        yield always
    if len(names) <= EVERY_SUBSET:
        for count in range(1, len(names) + 1):
            yield from ((*always, *chosen) for chosen in combinations(names, count))
        return
    yield from ((*always, name) for name in names)
    by_burden = sorted(names, key=lambda name: beside.burdens([name]))
    for count in range(2, len(names) + 1):
        yield (*always, *by_burden[:count])


def _place(demand: ModelDemand, offered: Candidates, chosen: ChosenLayout) -> ModelPlace:
    workers, ranges = chosen
    seats = tuple(tuple(mac.name for mac in worker.each) for worker in workers)
    if not demand.candidates.known:
        return ModelPlace(demand, seats, ranges, _shares(seats, [float(len(r)) for r in ranges]), 0.0)
    layout = describe_layout(demand.shape, offered, demand.request, chosen)
    cost_s = layout.slowest_s if demand.request.objective is Objective.THROUGHPUT else layout.expected_s
    seconds = [worker.decode_s(demand.shape, r) for worker, r in zip(workers, ranges, strict=True)]
    return ModelPlace(demand, seats, ranges, _shares(seats, seconds), cost_s)


def _shares(seats: Sequence[Sequence[str]], parts: Sequence[float]) -> dict[str, float]:
    """Return the share of each Mac; the ranks of a group compute at the same time, so each has the whole part."""
    return {mac: part / sum(parts) for macs, part in zip(seats, parts, strict=True) for mac in macs}
