"""The workers that a plan may use, with their memory and speed, and the links between them.

It knows figures. It refuses to know whether they come from a measurement or a table of chips.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.core.limits import ASSUMED_LINK_BANDWIDTH, ASSUMED_ROUND_TRIP_S, RELAYED_HOPS
from cluster.core.plan import Link, Profile
from cluster.placement.memory_split import WorkerMemory

__all__ = ["ASSUMED_LINK", "Candidate", "Candidates"]

ASSUMED_LINK = Link(ASSUMED_ROUND_TRIP_S, ASSUMED_LINK_BANDWIDTH)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker's memory and speed. Workers with the same memory and speed have the same ``kind``.

    Equal Macs have the same ``hardware``; it is None if it is not known.
    """

    memory: WorkerMemory
    profile: Profile
    hardware: Hashable = None

    @property
    def name(self) -> str:
        return self.memory.worker

    @property
    def kind(self) -> tuple[int, Profile, Hashable]:
        return self.memory.usable, self.profile, self.hardware


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

    @property
    def known(self) -> bool:
        """Whether the speed of every worker is known."""
        return all(w.profile.known for w in self.workers)

    def between(self, one: Candidate, other: Candidate) -> Link:
        return self.links.get((one.name, other.name), self.link)

    def hop_s(self, one: Candidate, other: Candidate, nbytes: float) -> float:
        """Return the seconds that ``nbytes`` take from one stage's worker to the next stage's worker."""
        return (RELAYED_HOPS if self.relay else 1) * self.between(one, other).hop_s(nbytes)

    def ends_s(self) -> float:
        """Return the seconds that a few bytes take from the coordinator to the first stage and from the last back."""
        return self.link.round_trip_s
