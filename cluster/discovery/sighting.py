"""What discovery hands out: sightings, and the interface behind which Zeroconf and static peers look alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sighting:
    """A worker may be here. ``address`` is ``host:port`` of its control port; the rest is hearsay, empty if unknown."""

    address: str
    id: str = ""
    name: str = ""
    version: str = ""
    cluster: str = ""


class Source(Protocol):
    """Where sightings come from. It has one reader: what ``changed`` waits for is news since that one's last look."""

    def current(self) -> tuple[Sighting, ...]:
        """What is in sight now, at most ``limits.MAX_ROSTER``, in an order that depends on the sightings alone."""
        ...

    async def changed(self, timeout_s: float) -> bool:
        """Wait until ``current`` may differ from what it last returned; False when the time is over first."""
        ...
