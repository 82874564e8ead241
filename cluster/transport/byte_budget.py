"""Bounds the bytes that requests hold in memory, in total and per client.

A request is charged from its first byte until it ends. This module only counts; it never reads a request. Use it from
the coordinator's event loop only.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from cluster.core.errors import Busy
from cluster.core.limits import FREE_BODY_BYTES, MAX_INTAKE_BYTES, MIB, RETRY_AFTER_S

_CODE: Final = "too_many_bytes"


class ByteBudget:
    """A budget of ``most`` bytes, shared by all clients.

    A client may hold at most as many bytes as are still free after its charge. One client alone can hold half of the
    budget, two clients a third each, and there is always room for a new client.
    """

    def __init__(self, most: int = MAX_INTAKE_BYTES) -> None:
        self._most = most
        self._held = Counter[str]()

    @property
    def held(self) -> int:
        """Bytes held by all clients together."""
        return self._held.total()

    def open(self, client: str) -> Charge:
        """Return the charge of a new request of ``client``; close it when the request ends."""
        return Charge(self, client)

    def take(self, client: str, count: int) -> None:
        """Charge ``count`` bytes to ``client``. Raises ``Busy``, and charges nothing, if they do not fit."""
        if self._held[client] + count > self._most - self.held - count:
            raise Busy(
                f"too many bytes in progress: all requests hold {self.held // MIB} MiB, yours hold "
                f"{self._held[client] // MIB} MiB; all clients share {self._most // MIB} MiB; try again when a request "
                "has ended",
                retry_after_s=RETRY_AFTER_S,
                code=_CODE,
            )
        self._held[client] += count

    def give_back(self, client: str, count: int) -> None:
        """Release ``count`` bytes that ``take`` charged."""
        self._held[client] -= count
        if self._held[client] <= 0:
            del self._held[client]


class Charge:
    """The bytes charged for one request; a context manager that releases them all. ``FREE_BODY_BYTES`` are free."""

    def __init__(self, budget: ByteBudget, client: str) -> None:
        self._budget = budget
        self._client = client
        self.size = 0
        """Bytes received so far."""
        self._taken = 0

    def add(self, count: int) -> None:
        """Charge ``count`` more received bytes. Raises ``Busy``."""
        due = max(0, self.size + count - FREE_BODY_BYTES) - self._taken
        if due > 0:
            self._budget.take(self._client, due)
            self._taken += due
        self.size += count

    def __enter__(self) -> Charge:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._taken:
            self._budget.give_back(self._client, self._taken)
        self._taken = 0
