"""Decides when a client tries the next address of a service, and when it gives up. It makes no call itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, NoReturn

from cluster.core.errors import Busy, ConnectionLost, MacpipeError, NotLeader, NotServing, Unreachable
from cluster.core.follow_limits import FOLLOW_PAUSE_S, FOLLOW_S, MAX_FOLLOW_PAUSE_S, PASS_WAIT_S

_ELSEWHERE: Final = (Unreachable, NotLeader)
_LATER: Final = (NotServing, Busy)
"""Errors of a leader that has just taken over: it loads the model, and all clients come at once."""


def never_sent(error: MacpipeError) -> bool:
    """Return whether a call that failed so has reached no coordinator, so that nothing can have been done."""
    return isinstance(error, Unreachable) and not isinstance(error, ConnectionLost)


def is_elsewhere(error: MacpipeError) -> bool:
    """Return whether another address may have the leader."""
    return isinstance(error, _ELSEWHERE)


class FollowSchedule:
    """The tries of one call to a service with this number of ``addresses``. ``clock`` is in seconds."""

    def __init__(self, addresses: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._addresses, self._clock = addresses, clock
        self._failures = self._pauses = 0
        self._ends_at = 0.0
        self._unreachable = 0
        self._answered: MacpipeError | None = None
        """The last error that a coordinator sent."""
        self._round_ends_at = self._clock()
        """Until then, addresses at which no coordinator answers may be those of one that is about to lead."""

    def reset(self) -> None:
        """Note that the service answers."""
        self._failures = self._pauses = self._unreachable = 0

    def pause_s(self, error: MacpipeError, *, patient: bool) -> float | None:
        """Return the seconds until the next try after a failed one; None if there is none: call ``end``.

        Unless ``patient``, one round of addresses at none of which a coordinator answers is enough; ``PASS_WAIT_S``
        after one took the call: that one hands over, or was lost, and the next one may not have opened its port yet.
        One address is not worth more patience: its coordinator hands over and opens its port anew, or is gone.
        """
        if not isinstance(error, Unreachable):
            self._answered = error
        first = not self._failures
        if not is_elsewhere(error) and (first or not isinstance(error, _LATER)):
            return None
        if first:
            self._ends_at = self._clock() + FOLLOW_S
        self._failures += 1
        self._unreachable = self._unreachable + 1 if isinstance(error, Unreachable) else 0
        if not never_sent(error):
            self._round_ends_at = self._clock() + PASS_WAIT_S
        nobody = self._unreachable >= self._addresses and self._clock() >= self._round_ends_at
        if self._clock() >= self._ends_at or (nobody and not (patient and self._addresses > 1)):
            return None
        if self._failures % self._addresses and is_elsewhere(error):
            return 0.0  # only a whole round of addresses is worth a pause
        self._pauses += 1
        longest: float = min(FOLLOW_PAUSE_S * 2**self._pauses, MAX_FOLLOW_PAUSE_S)
        wished = error.retry_after_s or 0.0 if isinstance(error, Busy) else 0.0
        return max(wished, longest * random.uniform(0.5, 1.0))  # noqa: S311  # no secret

    def end(self, error: MacpipeError) -> NoReturn:
        """Raise ``error``, after which no try follows; if a coordinator answered in the last round, that one's error.

        A standby says why nobody leads. That another address refuses connections would hide it.
        """
        somebody_answered = self._unreachable < self._addresses
        raise self._answered if self._answered and somebody_answered else error
