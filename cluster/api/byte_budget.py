"""Bytes that requests hold in memory, over all clients and for each, from their first byte until they end.

It counts; it reads no request. Belongs to the coordinator's event loop.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from cluster.api.bounds import FREE_BODY_BYTES, MAX_INTAKE_BYTES
from cluster.core.errors import Busy
from cluster.core.limits import MIB, RETRY_AFTER_S

_CODE: Final = "too_many_bytes"


class ByteBudget:
    """``most`` bytes in all. A client may hold no more than what is left free after it.

    So one client gets half of the budget, two get a third each, and a newcomer always finds room.
    """

    def __init__(self, most: int = MAX_INTAKE_BYTES) -> None:
        self._most, self._held = most, Counter[str]()

    @property
    def held(self) -> int:
        """Bytes held by all clients together."""
        return self._held.total()

    def open(self, client: str) -> Charge:
        """An account of one request of ``client``, which must be closed when the request ends."""
        return Charge(self, client)

    def take(self, client: str, count: int) -> None:
        """Charge ``count`` bytes to ``client``. Raises ``Busy`` and charges nothing where they do not fit."""
        if self._held[client] + count > self._most - self.held - count:
            raise Busy(
                f"the requests under way hold {self.held // MIB} MiB, yours {self._held[client] // MIB} MiB of them; "
                f"at most {self._most // MIB} MiB are held, shared between clients: try again when one has ended",
                retry_after_s=RETRY_AFTER_S,
                code=_CODE,
            )
        self._held[client] += count

    def give_back(self, client: str, count: int) -> None:
        """Undo ``take``."""
        self._held[client] -= count
        if self._held[client] <= 0:
            del self._held[client]


class Charge:
    """What one request holds; a context that gives everything back. The first ``FREE_BODY_BYTES`` are free."""

    def __init__(self, budget: ByteBudget, client: str) -> None:
        self._budget, self._client = budget, client
        self.size = 0
        """Bytes that have arrived."""
        self._taken = 0

    def add(self, count: int) -> None:
        """So many bytes more have arrived. Raises ``Busy``."""
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
