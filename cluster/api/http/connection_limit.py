"""Places for HTTP connections, and who gives one up when all are taken.

It decides; it touches no socket. A connection waits while it owes a request: since it was accepted (silent), or since
its last answer (idle). Only waiting ones make room. The address with most waiting connections loses one, silent before
idle, oldest first: so a flood from one address costs the others nothing, and a client that was just accepted can send
its request before its turn comes. Belongs to one event loop; every operation costs at most a look at each address.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Final

_PREFIX: Final = 8
"""Bytes of an IPv6 address that name a network: its owner has all the rest."""


@dataclass(eq=False, slots=True)
class ConnectionSlot:
    """One connection's place. ``close`` cuts the connection off."""

    origin: str
    close: Callable[[], object] = lambda: None
    queue: dict[ConnectionSlot, None] | None = None
    """Where it waits; None while a request is under way."""


@dataclass(slots=True)
class _WaitingConnection:
    """Connections of one address that owe a request, oldest first."""

    silent: dict[ConnectionSlot, None] = field(default_factory=dict)
    idle: dict[ConnectionSlot, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.silent) + len(self.idle)


class ConnectionLimit:
    """``most`` places. What it counts, ``take_counts`` tells."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: set[ConnectionSlot] = set()
        self._waiting: dict[str, _WaitingConnection] = {}
        self.made_room = self.turned_away = self.invalid_requests = 0

    def __len__(self) -> int:
        return len(self._taken)

    def take_counts(self) -> dict[str, int]:
        """What was counted since the last time, and is not 0."""
        counts = {name: getattr(self, name) for name in ("made_room", "turned_away", "invalid_requests")}
        self.made_room = self.turned_away = self.invalid_requests = 0
        return {name: count for name, count in counts.items() if count}

    def take(self, address: str) -> ConnectionSlot | None:
        """A place for a new connection, silent as yet. None where all are taken by requests under way."""
        if len(self._taken) >= self._most and not self.make_room():
            self.turned_away += 1
            return None
        slot = ConnectionSlot(_network(address))
        self._taken.add(slot)
        self.wait(slot, idle=False)
        return slot

    def make_room(self) -> bool:
        """Close one waiting connection; whether there was one."""
        heaviest = max(self._waiting.values(), key=len, default=None)
        if heaviest is None:
            return False
        slot = next(iter(heaviest.silent or heaviest.idle))
        self.leave(slot)
        slot.close()
        self.made_room += 1
        return True

    def wait(self, slot: ConnectionSlot, *, idle: bool) -> None:
        """``slot`` owes a request from now on; one that waits already keeps its turn."""
        if slot.queue is None and slot in self._taken:
            waiting = self._waiting.setdefault(slot.origin, _WaitingConnection())
            slot.queue = waiting.idle if idle else waiting.silent
            slot.queue[slot] = None

    def serve(self, slot: ConnectionSlot) -> None:
        """A request of ``slot`` is under way: it keeps its place."""
        if slot.queue is not None:
            del slot.queue[slot]
            slot.queue = None
            if not self._waiting[slot.origin]:
                del self._waiting[slot.origin]

    def leave(self, slot: ConnectionSlot) -> None:
        """The connection is closed; its place is free at once. May be said again."""
        self.serve(slot)
        self._taken.discard(slot)


def _network(address: str) -> str:
    """Whom connections from ``address`` are counted for: an IPv4 address, or an IPv6 network."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return parsed.packed[:_PREFIX].hex()
    return address
