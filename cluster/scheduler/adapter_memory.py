"""Gives memory of the stages to adapters that are added while requests run, and takes it back from removed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.core.frames import Drop, Edit
from cluster.scheduler.cache_accounting import CacheMemory
from cluster.scheduler.kv_cost import Cost
from cluster.scheduler.sequence import ScheduledSequence


@dataclass(frozen=True, slots=True)
class AdapterMemory:
    """The memory of one epoch's adapters, beyond what its plan counts.

    It appends to ``edits``. ``live`` are all live requests. ``admit`` lets waiting requests in.
    """

    memory: CacheMemory
    edits: list[Edit]
    live: Mapping[str, ScheduledSequence]
    admit: Callable[[], None]

    def take(self, taken: Cost) -> bool:
        """Let adapters have ``taken`` bytes of each stage's budget, in place of what they have now.

        Return False, and change nothing, if the live requests, waiting or not, then would not fit.
        """
        before, self.memory.taken = self.memory.taken, taken
        left = self.memory.beside_sequences()
        fits = min(left) >= 0 and not any(self.memory.why_never_fits(s.reserved) for s in self.live.values())
        dropped = self.memory.prefixes.make_room((0,) * len(left), left) if fits else None
        if dropped is None:
            self.memory.taken = before
            return False
        self.edits.extend(map(Drop, dropped))
        self.admit()
        return True

    def forget(self, adapter: str) -> None:
        """Drop the prefixes of an adapter that is removed. Its live requests go on; end them first."""
        self.edits.extend(map(Drop, self.memory.prefixes.forget_adapter(adapter)))
        self.admit()
