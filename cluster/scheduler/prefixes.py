"""The index of the prefix cache: which prefixes the stages keep, their owners and sizes, and the eviction order.

All stages keep the same prefixes, because edits in frames create and drop them. Only this index knows which prefixes
exist. A prefix of one owner (an API key) is never used for another owner.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.limits import MAX_PREFIXES
from cluster.scheduler.kv_cost import Cost
from cluster.scheduler.radix import Match, RadixTree

MIN_HIT = 8
"""Shorter hits cost more in edits than they save."""


@dataclass(frozen=True, slots=True)
class _Kept:
    owner: str
    cost: Cost
    source: int
    """Id of the sequence that the prefix was copied from."""


class Prefixes:
    """The kept prefixes, in LRU order, within ``budget`` bytes per stage.

    ``trimmable``: whether the model's caches can be trimmed. If not, only a whole prefix is a hit.
    """

    def __init__(self, budget: Cost, *, trimmable: bool) -> None:
        self._budget, self._trimmable = budget, trimmable
        self._trees: dict[str, RadixTree] = {}
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._used = [0] * len(budget)
        self._made = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used(self) -> Cost:
        """Bytes used on each stage."""
        return tuple(self._used)

    def find(self, owner: str, prompt: Sequence[int]) -> Match | None:
        """Return the best prefix for a prompt, or None. Counts as a use for the LRU order.

        The match leaves at least the prompt's last token to compute.
        """
        tree = self._trees.get(owner)
        if tree is None:
            return None
        asked = tuple(prompt[:-1])
        match = tree.longest(asked) if self._trimmable else tree.longest_whole(asked)
        if match is None or match.length < MIN_HIT:
            return None
        self._kept.move_to_end(match.entry)
        return match

    def keep(self, owner: str, tokens: tuple[int, ...], cost: Cost, source: int = 0) -> tuple[int | None, list[int]]:
        """Add a prefix. Return its id (None if it is too short or too large to keep) and the ids to drop first."""
        if len(tokens) < MIN_HIT or any(c > b for c, b in zip(cost, self._budget, strict=True)):
            return None, []
        dropped = self.shrink_to(tuple(b - c for b, c in zip(self._budget, cost, strict=True)))
        while len(self._kept) >= MAX_PREFIXES:
            dropped.append(self._drop(next(iter(self._kept))))
        self._made += 1
        tree = self._trees.setdefault(owner, RadixTree())
        replaced = tree.insert(tokens, self._made)
        if replaced is not None:
            self._forget(replaced)
            dropped.append(replaced)
        self._kept[self._made] = _Kept(owner, cost, source)
        self._add(cost, 1)
        if self._trimmable:
            dropped += [self._drop(entry) for entry in tree.beginnings(tokens)]
        return self._made, dropped

    def passing(self) -> int:
        """Return an id for a temporary prefix: one frame both saves and drops it, so it needs no memory of its own."""
        self._made += 1
        return self._made

    def shrink_to(self, room: Cost) -> list[int]:
        """Drop the least recently used prefixes until every stage is within ``room`` bytes. Return the dropped ids."""
        dropped = []
        while self._kept and any(used > r for used, r in zip(self._used, room, strict=True)):
            dropped.append(self._drop(next(iter(self._kept))))
        return dropped

    def forget(self, sources: Sequence[int]) -> list[int]:
        """Drop the prefixes copied from these sequences, because a step of them failed. Return the dropped ids."""
        return [self._drop(entry) for entry, kept in list(self._kept.items()) if kept.source in sources]

    def _drop(self, entry: int) -> int:
        owner = self._kept[entry].owner
        self._trees[owner].remove(entry)
        if not len(self._trees[owner]):
            del self._trees[owner]
        self._forget(entry)
        return entry

    def _forget(self, entry: int) -> None:
        self._add(self._kept.pop(entry).cost, -1)

    def _add(self, cost: Cost, sign: int) -> None:
        for i, c in enumerate(cost):
            self._used[i] += sign * c
