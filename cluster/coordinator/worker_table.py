"""Map answers to worker names, detect duplicates, and remember workers that left for a while.

Pure: takes answers, addresses and times, and returns entries. It refuses to know how workers are asked. A worker can
claim any name at any heartbeat, so the table is bounded: one entry per asked address, plus ``MAX_DEPARTED``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from cluster.coordinator.roster import RosterEntry, shared_id
from cluster.core.limits import MAX_DEPARTED, REMEMBER_S, RESTART_S


@dataclass(frozen=True, slots=True)
class Entry:
    """The last answer of one worker name.

    ``address`` is the control address at which it is asked again; empty once another name answers there. ``heard`` is
    the time of the answer, in seconds of the injected clock.
    """

    member: RosterEntry
    heard: float
    address: str


@dataclass(frozen=True, slots=True)
class Change:
    """The effect of an answer: the worker name that it updated ("" for a duplicate), and the names that it replaced."""

    name: str = ""
    replaced: tuple[str, ...] = ()


class WorkerTable:
    """Entries by worker name. ``gone`` returns whether a worker is believed to be gone."""

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
        """Return the names that are asked at an address: at most one."""
        return tuple(name for name, entry in self._entries.items() if entry.address == address)

    def duplicates(self, now: float) -> tuple[RosterEntry, ...]:
        """Return the workers that use the name or the id of another living worker, each with that problem.

        A conflict counts only after ``RESTART_S``: for a worker that restarted, the old address may still be asked.
        """
        found = sorted(self._duplicates.items())
        return tuple(member for _, (member, since) in found if now - since > RESTART_S)

    def ask_only(self, addresses: Collection[str], now: float) -> tuple[str, ...]:
        """Set the addresses that are asked from now on. Return the names that are dropped.

        A name that is no longer asked is dropped after ``REMEMBER_S``, or if there are more than ``MAX_DEPARTED``.
        """
        self._asked = frozenset(addresses)
        self._duplicates = {a: m for a, m in self._duplicates.items() if a in self._asked}
        departed = sorted((n for n in self._entries if not self.is_asked(n)), key=lambda n: self._entries[n].heard)
        surplus = set(departed[: max(0, len(departed) - MAX_DEPARTED)])
        forgotten = tuple(n for n in departed if n in surplus or now - self._entries[n].heard > REMEMBER_S)
        for name in forgotten:
            del self._entries[name]
        return forgotten

    def is_asked(self, name: str) -> bool:
        """Return whether the worker gets heartbeats. Nobody waits for the answer of a worker that does not."""
        entry = self._entries.get(name)
        return entry is not None and entry.address in self._asked

    def owes_answer(self, name: str, since: float) -> bool:
        """Return whether an answer newer than ``since`` is due: the worker will answer, or be declared gone."""
        entry = self._entries.get(name)
        return entry is not None and entry.heard < since and self.is_asked(name) and self._lives(name, entry)

    def enter_answer(self, address: str, member: RosterEntry, now: float) -> Change:
        """Enter the answer from an address.

        A name and an id belong to their worker until it is no longer asked or is gone. Another process that answers
        with them is a duplicate.
        """
        info = member.info
        rival = self._find_rival(address, member)
        replaced = tuple(name for name in self.at(address) if name != info.name)
        for name in replaced:
            self._replace(name, address, info.name)
        if rival is None:
            self._duplicates.pop(address, None)
            self._entries[info.name] = Entry(member, now, address)
            return Change(info.name, replaced)
        return Change(self._resolve_rival(address, member, rival, now), replaced)

    def _find_rival(self, address: str, member: RosterEntry) -> Entry | None:
        """Return the living worker at another address that has the name or the id of ``member``."""
        info = member.info
        known = self._entries.get(info.name)
        if known and known.address == address:
            return None
        same = (e.member.info for e in self._entries.values() if info.id and e.member.info.id == info.id)
        living = {n: self._entries[n] for n in (info.name, *(f.name for f in same)) if self.is_asked(n)}
        return next((e for n, e in living.items() if e.address != address and self._lives(n, e)), None)

    def _resolve_rival(self, address: str, member: RosterEntry, rival: Entry, now: float) -> str:
        """Return the worker's name if it answers at two addresses; "" if these are two workers, a duplicate."""
        info, other = member.info, rival.member.info
        if (info.id, info.instance, info.name) == (other.id, other.instance, other.name):
            self._duplicates.pop(address, None)
            if not rival.member.reachable:
                self._entries[info.name] = Entry(member, now, address)
            return info.name
        problem = f"two workers are named {info.name}, at {rival.address} and {address}; start one with another --name"
        if info.id and info.id == other.id:
            problem = shared_id((other, info))
        _, since = self._duplicates.get(address, (member, now))
        self._duplicates[address] = RosterEntry(info, problem, reachable=False, duplicate=True), since
        return ""

    def _replace(self, name: str, address: str, other: str) -> None:
        entry = self._entries[name]
        why = f"worker {name} is no longer at {address}: {other} answers there"
        self._entries[name] = Entry(RosterEntry(entry.member.info, why, reachable=False), entry.heard, "")

    def mark_unreachable(self, address: str, problem: str) -> tuple[str, ...]:
        """Mark the worker at an address as unreachable. Return the names that are asked there."""
        self._duplicates.pop(address, None)
        names = self.at(address)
        for name in names:
            entry = self._entries[name]
            self._entries[name] = replace(entry, member=RosterEntry(entry.member.info, problem, reachable=False))
        return names

    def _lives(self, name: str, entry: Entry) -> bool:
        """Return whether the worker is alive. A worker whose engine crashed counts as gone, but its daemon answers."""
        return entry.member.reachable or not self._gone(name)
