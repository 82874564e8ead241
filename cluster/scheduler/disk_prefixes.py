"""Chooses which prefixes the stages write to their disks, and which prompts start from a prefix read from there.

Each worker keeps its own part. The index knows the beginnings that all stages have: what they told at the start of the
epoch, and what they were asked to write since. The latter may turn out to be missing on some stage: then shorter ones
are tried, and at last the prompt is prefilled. A read brings a prefix into the memory of all stages, or of none; from
then on it is a kept prefix like any other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.core.frames import Drop, Edit, Persist
from cluster.core.prefix_keys import node_ends, node_ids, owner_key
from cluster.core.prefix_limits import (
    ASSUMED_DISK_BANDWIDTH,
    DISK_NODE_TOKENS,
    DISK_READ_S,
    LEAST_DISK_READ_S,
    MAX_DISK_NODES,
    MAX_DISK_READS,
    MIN_DISK_GAIN,
)
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.kv_cost import Cost, total
from cluster.scheduler.prefill_budget import PrefillBudget
from cluster.scheduler.prefixes import Prefixes, PrefixSource
from cluster.scheduler.sequence import ScheduledSequence

_NEW_SHARE = 0.5
"""Weight of the latest read in the measured bandwidth."""
_NO_SEQUENCE = PrefixSource(0, 0)
"""The source of a prefix that was not copied from a sequence."""


@dataclass(frozen=True, slots=True)
class DiskContents:
    """The beginnings that every stage of an epoch has on disk, as length and name, of one edition of the model."""

    edition: str
    beginnings: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class DiskRead:
    """All stages shall read a beginning within ``timeout_s`` and keep it as prefix ``prefix``."""

    epoch: int
    prefix: int
    owner: str
    adapter: str
    node: bytes
    length: int
    timeout_s: float


class ReadOutcome(StrEnum):
    """All stages read the prefix; one of them did not have it; or it took longer than its deadline."""

    HIT = "hit"
    MISS = "miss"
    LATE = "late"


@dataclass(slots=True)
class DiskUse:
    """What reading from disks brought since the model was loaded: reads by outcome, and tokens not prefilled.

    ``bandwidth`` is the slowest stage's, in bytes per second.
    """

    reads: Counter[ReadOutcome] = field(default_factory=Counter)
    tokens: int = 0
    bandwidth: float = ASSUMED_DISK_BANDWIDTH


@dataclass(slots=True)
class _Reading:
    order: DiskRead
    first: ScheduledSequence
    cost: Cost
    waiting: list[ScheduledSequence] = field(default_factory=list)


@dataclass(slots=True)
class DiskPrefixes:
    """The disks of one epoch's stages. It does nothing if ``contents`` is None.

    It appends to ``edits``. ``free`` returns the bytes that live sequences leave for prefixes on each stage. ``join``
    lets a sequence start that has waited for a read, and ``admit`` lets others in.
    """

    epoch: int
    contents: DiskContents | None
    use: DiskUse
    capacity: Capacity
    prefixes: Prefixes
    budget: PrefillBudget
    edits: list[Edit]
    free: Callable[[], Cost]
    join: Callable[[ScheduledSequence], None]
    admit: Callable[[], None]
    _known: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    """Lengths by name, the least recently used first."""
    _lengths: Counter[int] = field(default_factory=Counter)
    _reading: dict[bytes, _Reading] = field(default_factory=dict)
    _orders: list[DiskRead] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open(self.contents)

    def open(self, contents: DiskContents | None) -> None:
        """Use the disks, which have these contents; None: do not."""
        self.contents = contents
        if contents:
            self._learn(contents.beginnings[::-1])

    @property
    def reserved(self) -> Cost:
        """Bytes of the prefixes that are being read, per stage."""
        return total((reading.cost for reading in self._reading.values()), len(self.capacity.budget))

    def take_orders(self) -> list[DiskRead]:
        """Return the reads to start now. Each must be answered with ``finish``."""
        orders, self._orders = self._orders, []
        return orders

    def persist(self, sequence: ScheduledSequence, prefix: int | None) -> None:
        """Have the stages write a prefix that they keep of a sequence; None if they keep none."""
        if self.contents is None or prefix is None:
            return
        ends = node_ends(len(sequence.fed), sequence.marks, DISK_NODE_TOKENS)
        if self.capacity.mark_cost_of:
            ends = [end for end in ends if end in sequence.marks]
        if ends:
            self.edits.append(Persist(prefix, owner_key(sequence.owner.client), sequence.owner.adapter))
            self._learn(self._names(sequence, sequence.fed, ends))

    def _learn(self, beginnings: Iterable[tuple[int, bytes]]) -> None:
        for length, node in beginnings:
            self._forget(node)
            self._known[node] = length
            self._lengths[length] += 1
            if len(self._known) > MAX_DISK_NODES:
                self._forget(next(iter(self._known)))

    def _forget(self, node: bytes) -> None:
        length = self._known.pop(node, None)
        if length is not None:
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]

    def _names(
        self, sequence: ScheduledSequence, tokens: Iterable[int], lengths: Iterable[int]
    ) -> list[tuple[int, bytes]]:
        assert self.contents
        client, adapter = sequence.owner
        return node_ids(self.contents.edition, owner_key(client), adapter, tuple(tokens), lengths)

    def wait(self, sequence: ScheduledSequence, longest: int) -> bool:
        """Let a sequence wait for a prefix from disk, if that is worth it; False if not.

        ``longest`` is the number of tokens that it can start with now.
        """
        if self.contents is None:
            return False
        found = self._find(sequence, longest + MIN_DISK_GAIN)
        if found is None:
            return False
        length, node = found
        reading = self._reading.get(node) or self._start(sequence, length, node, length - longest)
        if reading is None:
            return False
        reading.waiting.append(sequence)
        return True

    def _find(self, sequence: ScheduledSequence, least: int) -> tuple[int, bytes] | None:
        """Return length and name of the longest known beginning, of at least ``least`` tokens."""
        most = len(sequence.beginning) - 1
        if sequence.disk_limit is not None:
            most = min(most, sequence.disk_limit)
        lengths = [length for length in self._lengths if least <= length <= most]
        if not lengths:
            return None
        names = self._names(sequence, sequence.beginning, lengths)
        return next((name for name in reversed(names) if self._known.get(name[1]) == name[0]), None)

    def _start(self, sequence: ScheduledSequence, length: int, node: bytes, gain: int) -> _Reading | None:
        cost = self.capacity.cost_of(length)
        prefill_s = self.budget.seconds(gain)
        if prefill_s is not None and max(cost) / self.use.bandwidth >= prefill_s:
            return None
        limit = tuple(map(min, self.capacity.prefix_budget, self.free()))
        dropped = self.prefixes.make_room(cost, limit) if len(self._reading) < MAX_DISK_READS else None
        if dropped is None:
            return None
        self.edits += map(Drop, dropped)
        wanted_s = DISK_READ_S if prefill_s is None else min(max(prefill_s, LEAST_DISK_READ_S), DISK_READ_S)
        client, adapter = sequence.owner
        prefix = self.prefixes.temporary_id()
        order = DiskRead(self.epoch, prefix, owner_key(client), adapter, node, length, wanted_s)
        self._orders.append(order)
        self._reading[node] = _Reading(order, sequence, cost)
        return self._reading[node]

    def finish(self, order: DiskRead, outcome: ReadOutcome, seconds: float) -> None:
        """Account for a read that took so long on the slowest stage. Those who waited for it join.

        An answer from another epoch is ignored.
        """
        reading = self._reading.get(order.node)
        if reading is None or reading.order != order:
            return
        del self._reading[order.node]
        waiting = [s for s in reading.waiting if not (s.ended or s.joined)]
        self.use.reads[outcome] += 1
        if outcome is ReadOutcome.HIT:
            self._keep(reading, seconds)
        else:
            self._forget(order.node)
            self.edits.append(Drop(order.prefix))
        for sequence in waiting:
            if outcome is not ReadOutcome.HIT:
                sequence.disk_limit = _limit_after(outcome, order.length, sequence.disk_limit)
            self.join(sequence)
        self.admit()

    def _keep(self, reading: _Reading, seconds: float) -> None:
        """Keep a prefix that all stages have read."""
        order, first = reading.order, reading.first
        self.use.tokens += order.length
        self._known.move_to_end(order.node)
        measured = max(reading.cost) / max(seconds, 1e-3)
        self.use.bandwidth += _NEW_SHARE * (measured - self.use.bandwidth)
        tokens = first.base[: order.length]
        kept, dropped = self.prefixes.keep(first.owner, tokens, reading.cost, _NO_SEQUENCE, {}, prefix=order.prefix)
        dropped += [order.prefix] if kept is None else self.prefixes.drop_redundant(kept, None)
        self.edits += map(Drop, dropped)


def _limit_after(outcome: ReadOutcome, length: int, limit: int | None) -> int:
    """Return the length of the longest prefix to try after a read of ``length`` tokens failed.

    ``limit`` is that before. The first time it is the next shorter one, then one of half the length at most, so that a
    stage that has lost much costs few calls. After a late read it is none.
    """
    if outcome is ReadOutcome.LATE:
        return 0
    return length - 1 if limit is None else length // 2
