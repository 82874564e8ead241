"""Remembers which resumable requests have ended, so that none is answered twice because its end was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.core.journal_limits import MAX_ENDED
from cluster.core.limits import RESUME_S


class EndedRequests:
    """Ids and clients of the requests that ended in the last ``RESUME_S`` seconds, the last ``MAX_ENDED`` at most."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ended: dict[str, tuple[str, float]] = {}
        """Client and time of each end, by request id, oldest first."""

    def add(self, request_id: str, client: str, at: float) -> None:
        """Remember an end. A later time than now means that the clock was set back."""
        self.forget(request_id)
        self._ended[request_id] = client, min(at, self._clock())
        if len(self._ended) > MAX_ENDED:
            self.forget(next(iter(self._ended)))

    def forget(self, request_id: str) -> None:
        """Forget an end: the id is in use again. Do nothing for others."""
        self._ended.pop(request_id, None)

    def has(self, request_id: str, client: str) -> bool:
        """Return whether a request of ``client`` with this id has ended."""
        found = self._ended.get(request_id)
        return found is not None and found[0] == client and self._clock() - found[1] <= RESUME_S

    def as_data(self) -> list[tuple[str, str, float]]:
        """Return id, client and time of each end, for a record."""
        now = self._clock()
        return [(i, client, at) for i, (client, at) in self._ended.items() if now - at <= RESUME_S]

    def read(self, data: Any) -> None:
        """Remember what ``as_data`` returned. Raises ``TypeError`` or ``ValueError`` for anything else."""
        for request_id, client, at in data:
            if type(request_id) is not str or type(client) is not str or type(at) not in (int, float):
                raise TypeError("an ended request has fields of other types")
            self.add(request_id, client, float(at))
