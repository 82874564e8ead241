"""Sightings, and the interface that makes Zeroconf and static peers look alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sighting:
    """A place where a worker may be. ``address`` is its control port; the rest is unverified, empty if unknown."""

    address: str
    id: str = ""
    name: str = ""
    version: str = ""
    cluster: str = ""


class Source(Protocol):
    """A source of sightings. It has one reader: ``changed`` waits for changes since that reader's last ``current``."""

    def current(self) -> tuple[Sighting, ...]:
        """Return the present sightings, at most ``limits.MAX_ROSTER``, in an order that depends on them alone."""
        ...

    async def changed(self, timeout_s: float) -> bool:
        """Wait until ``current`` may return something else; False after ``timeout_s``."""
        ...
