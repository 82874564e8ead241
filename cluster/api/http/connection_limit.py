"""Limits the number of HTTP connections, and decides which one to close when all slots are in use.

This module only decides; it touches no socket. A connection waits while it has no request in progress: since it was
accepted (silent), or since its last response (idle). Only waiting connections are closed. The address with the most
waiting connections loses one: silent before idle, oldest first. So a flood from one address does not harm others, and a
new client has time to send its request. Use it from one event loop only. Each operation is at most linear in the
number of addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Final

_PREFIX: Final = 8
"""Bytes of an IPv6 address that identify the network (/64); one owner controls all addresses in it."""


@dataclass(eq=False, slots=True)
class ConnectionSlot:
    """The slot of one connection. ``origin`` is its address or network; ``close`` closes the connection."""

    origin: str
    close: Callable[[], object] = lambda: None
    queue: dict[ConnectionSlot, None] | None = None
    """The queue in which it waits; None while a request is in progress."""


@dataclass(slots=True)
class _WaitingSlots:
    """The waiting connections of one address, oldest first."""

    silent: dict[ConnectionSlot, None] = field(default_factory=dict)
    idle: dict[ConnectionSlot, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.silent) + len(self.idle)


class ConnectionLimit:
    """At most ``most`` connections. ``take_counts`` returns the counters of closed and rejected ones."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: set[ConnectionSlot] = set()
        self._waiting: dict[str, _WaitingSlots] = {}
        self.made_room = self.turned_away = self.invalid_requests = 0

    def __len__(self) -> int:
        return len(self._taken)

    def take_counts(self) -> dict[str, int]:
        """Return the counters that are not 0, and reset them."""
        counts = {name: getattr(self, name) for name in ("made_room", "turned_away", "invalid_requests")}
        self.made_room = self.turned_away = self.invalid_requests = 0
        return {name: count for name, count in counts.items() if count}

    def take(self, address: str) -> ConnectionSlot | None:
        """Return a slot for a new connection; None if all slots have a request in progress."""
        if len(self._taken) >= self._most and not self.make_room():
            self.turned_away += 1
            return None
        slot = ConnectionSlot(_network(address))
        self._taken.add(slot)
        self.wait(slot, idle=False)
        return slot

    def make_room(self) -> bool:
        """Close one waiting connection. Return whether there was one."""
        heaviest = max(self._waiting.values(), key=len, default=None)
        if heaviest is None:
            return False
        slot = next(iter(heaviest.silent or heaviest.idle))
        self.leave(slot)
        slot.close()
        self.made_room += 1
        return True

    def wait(self, slot: ConnectionSlot, *, idle: bool) -> None:
        """Mark ``slot`` as waiting for a request. A slot that already waits keeps its position."""
        if slot.queue is None and slot in self._taken:
            waiting = self._waiting.setdefault(slot.origin, _WaitingSlots())
            slot.queue = waiting.idle if idle else waiting.silent
            slot.queue[slot] = None

    def serve(self, slot: ConnectionSlot) -> None:
        """Mark ``slot`` as having a request in progress, so that it is not closed."""
        if slot.queue is not None:
            del slot.queue[slot]
            slot.queue = None
            if not self._waiting[slot.origin]:
                del self._waiting[slot.origin]

    def leave(self, slot: ConnectionSlot) -> None:
        """Free the slot of a closed connection. Calling it again has no effect."""
        self.serve(slot)
        self._taken.discard(slot)


def _network(address: str) -> str:
    """Return what connections from ``address`` are counted by: the IPv4 address, or the IPv6 network as hex."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return parsed.packed[:_PREFIX].hex()
    return address
