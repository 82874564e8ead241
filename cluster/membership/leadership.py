"""Hold a term as its leader: renew the leases of its workers, and know at any moment which of them are certain.

Pure: calls to send are returned, answers are handed in, the clock is injected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from cluster.core.limits import HEARTBEAT_S
from cluster.core.term_limits import LEASE_MARGIN_S, LEASE_S
from cluster.membership.terms import Term, TermAnswer, TermCall, TermRequest

__all__ = ["Fits", "Leadership"]

Fits = Callable[[frozenset[str]], bool]
"""Whether these workers can hold what is to be served: a full ring."""


class Leadership:
    """One term. ``granted`` says by worker when the call was sent that was granted; ``clock`` counts sleep.

    It ends when no full ring of leases was there for the time of one lease, or when a higher term is led.
    """

    def __init__(self, term: Term, granted: Mapping[str, float], fits: Fits, clock: Callable[[], float]) -> None:
        self.term = term
        self.ended = False
        self._granted = dict(granted)
        self._fits, self._clock = fits, clock
        self._led_at = self._renewed_at = clock()

    @property
    def workers(self) -> frozenset[str]:
        """The workers that granted the term and have not refused since."""
        return frozenset(self._granted)

    @property
    def grants(self) -> Mapping[str, float]:
        """When the call was sent that each of ``workers`` granted last."""
        return dict(self._granted)

    @property
    def held(self) -> frozenset[str]:
        """The workers that nobody else can have been granted yet."""
        if self.ended:
            return frozenset()
        since = self._clock() - LEASE_S + LEASE_MARGIN_S
        return frozenset(worker for worker, sent_at in self._granted.items() if sent_at > since)

    @property
    def leads(self) -> bool:
        """Whether the leases of a full ring are certain."""
        return self._fits(self.held)

    def step(self, others: Iterable[str] = ()) -> list[TermCall]:
        """Return the calls that are due: renewals, and questions to those of ``others`` that are not its workers yet.

        A worker whose answers have been lost for two leases is not renewed any more, so that others may have it.
        """
        now = self._clock()
        if self.leads:
            self._led_at = now
        elif now - self._led_at >= LEASE_S:
            self.ended = True
        if self.ended or now - self._renewed_at < HEARTBEAT_S:
            return []
        self._renewed_at = now
        self._granted = {worker: at for worker, at in self._granted.items() if now - at < 2 * LEASE_S}
        renewals = [TermCall(TermRequest.RENEW, worker, self.term, now) for worker in sorted(self._granted)]
        joining = sorted(set(others) - self._granted.keys())
        return renewals + [TermCall(TermRequest.ASK, worker, self.term, now) for worker in joining]

    def on_answer(self, answer: TermAnswer) -> list[TermCall]:
        """Take the answer to a call of this term, and return the calls that follow.

        A worker that granted a higher term is not its worker any more. One that would grant this term is taken.
        """
        worker, sent_at = answer.call.worker, answer.call.sent_at
        if answer.denial:
            if answer.granted != self.term:
                self._granted.pop(worker, None)
        elif answer.call.request is not TermRequest.ASK:
            self._granted[worker] = max(sent_at, self._granted.get(worker, sent_at))
        elif worker not in self._granted and answer.granted <= self.term:
            return [TermCall(TermRequest.GRANT, worker, self.term, self._clock())]
        return []

    def retain(self, workers: Collection[str]) -> None:
        """Forget all workers but these."""
        self._granted = {worker: at for worker, at in self._granted.items() if worker in workers}

    def step_down(self) -> list[TermCall]:
        """End the leadership: a higher term is led by another coordinator. Return the calls that give all back."""
        self.ended = True
        now = self._clock()
        return [TermCall(TermRequest.RETURN, worker, self.term, now) for worker in sorted(self._granted)]
