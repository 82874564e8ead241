"""The workers that a plan may use, with their memory and speed, and the links between them.

It knows figures. It refuses to know whether they come from a measurement or a table of chips.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.core.all_reduce import SUMS_PER_LAYER, AllReduce
from cluster.core.limits import ASSUMED_LINK_BANDWIDTH, ASSUMED_ROUND_TRIP_S, RELAYED_HOPS
from cluster.core.plan import LayerRange, Link, ModelShape, Profile
from cluster.placement.memory_split import WorkerMemory
from cluster.placement.predicted_step_time import decode_s, prefill_s

__all__ = ["ASSUMED_LINK", "Candidate", "Candidates", "Sums"]

ASSUMED_LINK = Link(ASSUMED_ROUND_TRIP_S, ASSUMED_LINK_BANDWIDTH)
Sums = Mapping[frozenset[str], AllReduce | None]
"""How fast groups add up, by the names of their workers; None if these could not meet."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker's memory and speed. Workers with the same memory and speed have the same ``kind``.

    Equal Macs have the same ``hardware``; it is None if it is not known. Of a group whose ``members`` share each layer,
    it is the memory and the speed of one rank; its ``layer_s`` has the time of ``sums`` of one token.
    """

    memory: WorkerMemory
    profile: Profile
    hardware: Hashable = None
    members: tuple[Candidate, ...] = ()
    sums: AllReduce | None = None

    @property
    def ranks(self) -> int:
        """How many workers share each of its layers."""
        return self.memory.ranks

    @property
    def each(self) -> tuple[Candidate, ...]:
        """Itself, or its members by rank."""
        return self.members or (self,)

    def decode_s(self, shape: ModelShape, layers: LayerRange, rows: int = 1) -> float:
        """Return the seconds of a decode step of ``rows`` rows; 0 if the speed is unknown."""
        seconds = decode_s(shape.of_rank(self.ranks), self.profile, layers, rows)
        more = self.sums_s(shape, layers, rows) - self.sums_s(shape, layers)
        return seconds + more if seconds else 0.0

    def sums_s(self, shape: ModelShape, layers: LayerRange, rows: int = 1) -> float:
        """Return the seconds of a group's sums in a decode step of ``rows`` rows; 0 of a worker alone."""
        if self.sums is None:
            return 0.0
        crossing = max(shape.boundary_bytes, default=0)
        return SUMS_PER_LAYER * len(layers) * self.sums.seconds_of(rows * crossing)

    def prefill_s(self, shape: ModelShape, layers: LayerRange, tokens: int) -> float:
        """Return the seconds of a prompt chunk of ``tokens`` tokens."""
        return prefill_s(shape.of_rank(self.ranks), self.profile, layers, tokens)

    @property
    def name(self) -> str:
        return self.memory.worker

    @property
    def kind(self) -> tuple[int, int, Profile, Hashable]:
        return self.memory.usable, self.ranks, self.profile, self.hardware


@dataclass(frozen=True)
class Candidates:
    """The workers and the links between them.

    ``links`` are the measured links, by (from, to) names. ``link`` is assumed for all others. With ``relay``, frames
    pass through the coordinator, so every hop counts as ``RELAYED_HOPS``.
    """

    workers: Sequence[Candidate]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    link: Link = ASSUMED_LINK
    relay: bool = False
    sums: AllReduce | None = None
    """How fast the ranks of any group add up; None: as measured, else as their links let a ring of TCP connections."""
    measured_sums: Sums = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether the speed of every worker is known."""
        return all(w.profile.known for w in self.workers)

    def between(self, one: Candidate, other: Candidate) -> Link:
        """Return the link by which a stage's output leaves: that of rank 0 to the rank that gets it last."""
        ends = ((one.each[0].name, end.name) for end in other.each)
        return max((self.links.get(end, self.link) for end in ends), key=lambda link: link.cost_s)

    def hop_s(self, one: Candidate, other: Candidate, nbytes: float) -> float:
        """Return the seconds that ``nbytes`` take from one stage's worker to the next stage's worker."""
        return (RELAYED_HOPS if self.relay else 1) * self.between(one, other).hop_s(nbytes)

    def ends_s(self) -> float:
        """Return the seconds that a few bytes take from the coordinator to the first stage and from the last back."""
        return self.link.round_trip_s
