"""The worker table: which answer speaks for which worker name, and for how long a worker that left is remembered.

Pure: answers, addresses and times go in, entries come out. It refuses to know how anybody is asked. A worker can claim
any name at any heartbeat, so the table holds one entry for each address that is asked, and a few more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from cluster.coordinator.roster import RosterEntry, shared_id
from cluster.core.limits import MAX_DEPARTED, REMEMBER_S, RESTART_S


@dataclass(frozen=True, slots=True)
class Entry:
    """What was heard last of one name. ``address`` is where it is asked again; empty once another name answers there.

    ``heard`` is the injected clock's seconds.
    """

    member: RosterEntry
    heard: float
    address: str


@dataclass(frozen=True, slots=True)
class Change:
    """What an answer changed: the name that it speaks for (empty: none), and the names that it replaced."""

    name: str = ""
    replaced: tuple[str, ...] = ()


class WorkerTable:
    """Entries by worker name. ``gone`` says whether a worker is believed to be gone."""

    def __init__(self, gone: Callable[[str], bool]) -> None:
        self._gone = gone
        self._entries: dict[str, Entry] = {}
        self._duplicates: dict[str, tuple[RosterEntry, float]] = {}
        self._asked: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def at(self, address: str) -> tuple[str, ...]:
        """The names that are asked at an address: one, or none."""
        return tuple(name for name, entry in self._entries.items() if entry.address == address)

    def duplicates(self, now: float) -> tuple[RosterEntry, ...]:
        """Workers that answer under a name or an id that another living worker has, each with that problem.

        One that was started again is none, though its old address was asked last a moment ago.
        """
        found = sorted(self._duplicates.items())
        return tuple(member for _, (member, since) in found if now - since > RESTART_S)

    def ask_only(self, addresses: Collection[str], now: float) -> tuple[str, ...]:
        """Say who is asked from now on; the names that are forgotten now: too many, or not asked for too long."""
        self._asked = frozenset(addresses)
        self._duplicates = {a: m for a, m in self._duplicates.items() if a in self._asked}
        departed = sorted((n for n in self._entries if not self.is_asked(n)), key=lambda n: self._entries[n].heard)
        surplus = set(departed[: max(0, len(departed) - MAX_DEPARTED)])
        forgotten = tuple(n for n in departed if n in surplus or now - self._entries[n].heard > REMEMBER_S)
        for name in forgotten:
            del self._entries[name]
        return forgotten

    def is_asked(self, name: str) -> bool:
        """Whether a heartbeat goes to the worker: nobody waits for an answer of one that is not asked."""
        entry = self._entries.get(name)
        return entry is not None and entry.address in self._asked

    def owes_answer(self, name: str, since: float) -> bool:
        """Whether an answer of the worker that is newer than ``since`` will come, or its absence will be judged."""
        entry = self._entries.get(name)
        return entry is not None and entry.heard < since and self.is_asked(name) and self._lives(name, entry)

    def answered(self, address: str, member: RosterEntry, now: float) -> Change:
        """Enter what answered at an address.

        A name, and an id, belong to the worker that has them until that one is not asked any more, or is gone: whoever
        else answers under them is a duplicate.
        """
        facts, rival = member.facts, self._rival(address, member)
        replaced = tuple(name for name in self.at(address) if name != facts.name)
        for name in replaced:
            self._replace(name, address, facts.name)
        if rival is None:
            self._duplicates.pop(address, None)
            self._entries[facts.name] = Entry(member, now, address)
            return Change(facts.name, replaced)
        return Change(self._answered_twice(address, member, rival, now), replaced)

    def _rival(self, address: str, member: RosterEntry) -> Entry | None:
        """The living worker at another address that has the name or the id of the one that answered."""
        facts = member.facts
        known = self._entries.get(facts.name)
        if known and known.address == address:
            return None
        same = (e.member.facts for e in self._entries.values() if facts.id and e.member.facts.id == facts.id)
        living = {n: self._entries[n] for n in (facts.name, *(f.name for f in same)) if self.is_asked(n)}
        return next((e for n, e in living.items() if e.address != address and self._lives(n, e)), None)

    def _answered_twice(self, address: str, member: RosterEntry, rival: Entry, now: float) -> str:
        """The name that the answer speaks for where one worker has two addresses; empty where there are two workers."""
        facts, other = member.facts, rival.member.facts
        if (facts.id, facts.instance, facts.name) == (other.id, other.instance, other.name):
            self._duplicates.pop(address, None)
            if not rival.member.reachable:
                self._entries[facts.name] = Entry(member, now, address)
            return facts.name
        problem = f"two workers are named {facts.name}, at {rival.address} and {address}; start one with another --name"
        if facts.id and facts.id == other.id:
            problem = shared_id((other, facts))
        _, since = self._duplicates.get(address, (member, now))
        self._duplicates[address] = RosterEntry(facts, problem, reachable=False, duplicate=True), since
        return ""

    def _replace(self, name: str, address: str, other: str) -> None:
        entry = self._entries[name]
        why = f"worker {name} is not at {address} any more: {other} answers there"
        self._entries[name] = Entry(RosterEntry(entry.member.facts, why, reachable=False), entry.heard, "")

    def failed(self, address: str, problem: str) -> tuple[str, ...]:
        """Nobody answered at an address; the names that are asked there."""
        self._duplicates.pop(address, None)
        names = self.at(address)
        for name in names:
            entry = self._entries[name]
            self._entries[name] = replace(entry, member=RosterEntry(entry.member.facts, problem, reachable=False))
        return names

    def _lives(self, name: str, entry: Entry) -> bool:
        """An engine that crashed counts as gone, but its daemon answers, and may have a new one to tell of."""
        return entry.member.reachable or not self._gone(name)
