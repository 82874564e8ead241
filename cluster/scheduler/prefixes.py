"""The index of the prefix cache: which prefixes the stages keep, their owners, marks and sizes, and the eviction order.

All stages keep the same prefixes, because edits in frames create and drop them. Only this index knows which prefixes
exist. A prefix of one owner is never used for another owner.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.core.limits import MAX_PREFIXES
from cluster.scheduler.kept_marks import KeptMark, MarkMemory
from cluster.scheduler.kv_cost import Cost, fits
from cluster.scheduler.radix import Match, RadixTree

MIN_HIT = 8
"""Shorter hits cost more in edits than they save."""
_UNUSED_SHARE = 1 / 64
"""A prefix is dropped for one that has all but this share of its tokens."""


class Owner(NamedTuple):
    """Who may start from a prefix: requests of the same API key and the same adapter ("" for none)."""

    client: str
    adapter: str = ""


class PrefixSource(NamedTuple):
    """The sequence that a prefix was saved from, and a frame before which all of its steps so far were written.

    The save travels on this frame or on a later one, but before the sequence's next step.
    """

    sequence: int
    frame: int


@dataclass(frozen=True, slots=True)
class _Kept:
    owner: Owner
    cost: Cost
    source: PrefixSource
    marks: Mapping[int, KeptMark]


@dataclass(frozen=True, slots=True)
class Start:
    """A kept prefix that a prompt can start from, the length to use of it, its marks up to there, and its source."""

    prefix: int
    length: int
    marks: Mapping[int, KeptMark]
    source: PrefixSource


class Prefixes:
    """The kept prefixes, in LRU order, within ``budget`` bytes per stage. The marks of live sequences count too.

    ``trimmable``: whether the model's caches can be trimmed. If not, a prefix is used at a marked length or whole.
    """

    def __init__(self, budget: Cost, *, trimmable: bool) -> None:
        self._budget, self._trimmable = budget, trimmable
        self._trees: dict[Owner, RadixTree] = {}
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._used = [0] * len(budget)
        self._marks, self._live_marks = MarkMemory(len(budget)), MarkMemory(len(budget))
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used(self) -> Cost:
        """Bytes used on each stage by prefixes and by all marks."""
        return tuple(u + m for u, m in zip(self._used, self._marks.used, strict=True))

    def find(self, owner: Owner, prompt: Sequence[int]) -> Start | None:
        """Return the longest start for a prompt, or None. Counts as a use for the LRU order.

        It leaves at least the prompt's last token to compute.
        """
        match = self._use_longest(owner, prompt)
        if match is None:
            return None
        kept = self._kept[match.entry]
        marks = {at: mark for at, mark in kept.marks.items() if at <= match.length}
        return Start(match.entry, match.length, marks, kept.source)

    def longest(self, owner: Owner, prompt: Sequence[int]) -> int:
        """Return the length of the longest start for a prompt, 0 without one. Counts as no use."""
        match = self._longest(owner, prompt)
        return match.length if match else 0

    def touch(self, owner: Owner, prompt: Sequence[int]) -> None:
        """Count the prefix that a prompt would start from as used, so that it is dropped last."""
        self._use_longest(owner, prompt)

    def _use_longest(self, owner: Owner, prompt: Sequence[int]) -> Match | None:
        match = self._longest(owner, prompt)
        if match:
            self._kept.move_to_end(match.entry)
        return match

    def _longest(self, owner: Owner, prompt: Sequence[int]) -> Match | None:
        tree = self._trees.get(owner)
        if tree is None:
            return None
        asked = tuple(prompt[:-1])
        match = tree.longest(asked) if self._trimmable else tree.longest_marked(asked)
        return None if match is None or match.length < MIN_HIT else match

    def shared(self, owner: Owner, prompt: Sequence[int]) -> int:
        """Return how many of the prompt's first tokens some prefix has too, marked there or not."""
        tree = self._trees.get(owner)
        match: Match | None = tree.longest(tuple(prompt[:-1])) if tree else None
        return match.length if match else 0

    def keep(
        self,
        owner: Owner,
        tokens: tuple[int, ...],
        cost: Cost,
        source: PrefixSource,
        marks: Mapping[int, KeptMark],
        prefix: int | None = None,
    ) -> tuple[int | None, list[int]]:
        """Add a prefix. Return its id (None if it is too short or too large to keep) and the ids to drop first.

        ``cost`` does not include the ``marks``, which a live sequence holds. ``prefix`` is the id if the stages have it
        under a temporary one, which is to stay.
        """
        if len(tokens) < MIN_HIT:
            return None, []
        dropped = self.make_room(cost, self._budget)
        if dropped is None:
            return None, []
        while len(self._kept) >= MAX_PREFIXES:
            dropped.append(self._drop(next(iter(self._kept))))
        entry = self.temporary_id() if prefix is None else prefix
        tree = self._trees.setdefault(owner, RadixTree())
        replaced = tree.insert(tokens, entry, marks)
        if replaced is not None:
            self._forget(replaced)
            dropped.append(replaced)
        self._kept[entry] = _Kept(owner, cost, source, dict(marks))
        self._add(cost, 1)
        self._marks.hold(marks.values())
        return entry, dropped

    def drop_redundant(self, prefix: int, start: Start | None) -> list[int]:
        """Drop the beginnings of a kept prefix that it can replace. Return the dropped ids.

        ``start`` is what its sequence started from: it is dropped if nearly all of it was used. The next turn of a chat
        so takes the place of the last one, although the last answer was rendered anew.
        """
        kept = self._kept[prefix]
        tree = self._trees[kept.owner]
        beginnings = tree.beginnings(tree.tokens(prefix))
        dropped = [self._drop(entry) for entry in beginnings if self._makes_redundant(kept.marks, tree, entry)]
        if start and start.prefix in self._kept:
            whole = len(tree.tokens(start.prefix))
            dropped += [self._drop(start.prefix)] if whole - start.length <= whole * _UNUSED_SHARE else []
        return dropped

    def _makes_redundant(self, marks: Mapping[int, KeptMark], tree: RadixTree, entry: int) -> bool:
        """Return whether a longer prefix with these marks can be used wherever its beginning ``entry`` can."""
        return self._trimmable or len(tree.tokens(entry)) in marks

    def temporary_id(self) -> int:
        """Return an id for a temporary prefix: one frame both saves and drops it, so it needs no memory of its own."""
        self._last_id += 1
        return self._last_id

    def hold(self, marks: Collection[KeptMark]) -> None:
        """Count marks that a live sequence gets, until it calls ``release``."""
        for memory in (self._marks, self._live_marks):
            memory.hold(marks)

    def release(self, marks: Collection[KeptMark]) -> None:
        for memory in (self._marks, self._live_marks):
            memory.release(marks)

    def make_room(self, cost: Cost, limit: Cost) -> list[int] | None:
        """Drop least recently used prefixes until ``cost`` more bytes are within ``limit``. Return the dropped ids.

        Return None, and drop nothing, if the marks of live sequences leave too little room.
        """
        left = tuple(most - c for most, c in zip(limit, cost, strict=True))
        return self.evict_to(left) if fits(self._live_marks.used, left) else None

    def evict_to(self, limit: Cost) -> list[int]:
        """Drop least recently used prefixes until every stage is within ``limit`` bytes. Return the dropped ids.

        If the marks of live sequences alone need more, every prefix is dropped.
        """
        dropped = []
        while self._kept and not fits(self.used, limit):
            dropped.append(self._drop(next(iter(self._kept))))
        return dropped

    def forget(self, sources: Collection[int], frame: int = -1) -> list[int]:
        """Drop what was saved from these sequences after their step in ``frame``: it failed. Return the dropped ids."""
        saved = [(entry, kept.source) for entry, kept in self._kept.items() if kept.source.sequence in sources]
        return [self._drop(entry) for entry, source in saved if source.frame > frame]

    def forget_adapter(self, adapter: str) -> list[int]:
        """Drop the prefixes of an adapter, whoever owns them. Return the dropped ids."""
        return [self._drop(entry) for entry in [e for e, k in self._kept.items() if k.owner.adapter == adapter]]

    def discard(self, entries: Iterable[int]) -> list[int]:
        """Drop those of ``entries`` that are still kept. Return their ids."""
        return [self._drop(entry) for entry in entries if entry in self._kept]

    def _drop(self, entry: int) -> int:
        owner = self._kept[entry].owner
        self._trees[owner].remove(entry)
        if not len(self._trees[owner]):
            del self._trees[owner]
        self._forget(entry)
        return entry

    def _forget(self, entry: int) -> None:
        kept = self._kept.pop(entry)
        self._add(kept.cost, -1)
        self._marks.release(kept.marks.values())

    def _add(self, cost: Cost, sign: int) -> None:
        for i, c in enumerate(cost):
            self._used[i] += sign * c
