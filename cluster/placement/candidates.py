"""Who may take part in a plan: workers with what they offer and can do, and the links between them.

It knows figures; it refuses to know where they come from, a measurement or a table of chips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.core.limits import ASSUMED_LINK_BANDWIDTH, ASSUMED_ROUND_TRIP_S, RELAYED_HOPS
from cluster.core.plan import Link, Profile
from cluster.placement.memory_split import Room

__all__ = ["ASSUMED_LINK", "Candidate", "Candidates"]

ASSUMED_LINK = Link(ASSUMED_ROUND_TRIP_S, ASSUMED_LINK_BANDWIDTH)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker by its room and its speed. ``kind`` is the same for workers that are alike in both."""

    room: Room
    profile: Profile

    @property
    def name(self) -> str:
        return self.room.worker

    @property
    def kind(self) -> tuple[int, Profile]:
        return self.room.usable, self.profile


@dataclass(frozen=True)
class Candidates:
    """``links`` are by (from, to) names, as measured; ``link`` is taken for all others. ``relay``: every hop is two."""

    workers: Sequence[Candidate]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    link: Link = ASSUMED_LINK
    relay: bool = False

    @property
    def known(self) -> bool:
        """Whether every worker's speed is."""
        return all(w.profile.known for w in self.workers)

    @property
    def rooms(self) -> list[Room]:
        return [w.room for w in self.workers]

    def between(self, one: Candidate, other: Candidate) -> Link:
        return self.links.get((one.name, other.name), self.link)

    def hop_s(self, one: Candidate, other: Candidate, nbytes: float) -> float:
        """Seconds for so many bytes from one stage's worker to the next one's."""
        return (RELAYED_HOPS if self.relay else 1) * self.between(one, other).hop_s(nbytes)

    def ends_s(self) -> float:
        """Seconds from the coordinator to the first stage and from the last back to it: a few bytes each."""
        return self.link.round_trip_s
