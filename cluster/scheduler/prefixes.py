"""The prefix cache's index: what is kept on the stages, for whom, how large, and what goes first.

Every stage keeps the same prefixes, since they are made and dropped by edits in frames; this is the only place that
knows which. Prefixes of one owner (an API key) are never given to another.
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
    """The sequence that it is a copy of."""


class Prefixes:
    """``trimmable`` says whether a model's caches can be cut back: if not, only a whole prefix is a hit."""

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
        """Bytes on each stage."""
        return tuple(self._used)

    def find(self, owner: str, prompt: Sequence[int]) -> Match | None:
        """The best prefix for a prompt; its length leaves at least the last token to compute. Counts as a use."""
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
        """Make room for a prefix: its id (None where it is too large to keep) and the ids to drop before it."""
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
        """An id for a prefix that is dropped in the frame in which it is saved: it takes no memory of its own."""
        self._made += 1
        return self._made

    def shrink_to(self, room: Cost) -> list[int]:
        """Drop the least recently used until no stage holds more than ``room``; the ids that went."""
        dropped = []
        while self._kept and any(used > r for used, r in zip(self._used, room, strict=True)):
            dropped.append(self._drop(next(iter(self._kept))))
        return dropped

    def forget(self, sources: Sequence[int]) -> list[int]:
        """Drop what was copied from these, since a step of them failed; the ids that went."""
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
