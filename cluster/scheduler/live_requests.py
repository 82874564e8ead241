"""The live requests of a scheduler by id, and the queue of those that wait. Requests may move to another scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.core.errors import InvalidRequest, PromptTooLong
from cluster.core.request import Request
from cluster.scheduler.fair_queue import FairQueue
from cluster.scheduler.outcome import Refused
from cluster.scheduler.sequence import Phase, ScheduledSequence


@dataclass(frozen=True, slots=True)
class MovedSample:
    """What another scheduler needs to go on with a request: its answer so far, and whether it had left the queue.

    ``scored`` and ``batch`` are those of ``ScheduledSequence``.
    """

    request: Request
    answer: tuple[int, ...]
    scored: int
    batch: tuple[str, ...]
    begun: bool


class LiveRequests:
    """All requests that have not ended. At most ``queue`` of them wait, not counting those that moved here."""

    def __init__(self, queue: int) -> None:
        self.waiting = FairQueue(queue)
        self.by_id: dict[str, ScheduledSequence] = {}
        self._seen = 0

    def next_id(self) -> int:
        """Return a new id for a sequence."""
        self._seen += 1
        return self._seen

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of a live request, or None if no request has one."""
        return min((d for s in self.by_id.values() if (d := s.request.deadline) is not None), default=None)

    def overdue(self, now: float) -> list[str]:
        """Return the ids of all requests, waiting or not, whose deadline has passed."""
        return [i for i, s in self.by_id.items() if s.request.deadline is not None and s.request.deadline <= now]

    def add(
        self,
        requests: Sequence[Request],
        answers: tuple[tuple[int, ...], ...],
        why_never_fits: Callable[[int], str],
    ) -> tuple[Refused, ...]:
        """Queue all of the requests, or none. Remove and return waiting requests of others that they displace.

        Raises as ``Scheduler.submit``. ``why_never_fits`` is as in ``Capacity``.
        """
        for request in requests:
            if request.id in self.by_id:
                raise InvalidRequest(
                    f"a request with the id {request.id} is already live; choose another id", field="request_id"
                )
            if why := why_never_fits(len(request.prompt) + request.max_tokens):
                raise PromptTooLong(why, field="max_tokens")
        displaced = self.waiting.make_room(requests[0].client, len(requests))
        for sequence in displaced:
            del self.by_id[sequence.request.id]
        batch = tuple(request.id for request in requests)
        for request, answer in zip(requests, answers or ((),) * len(requests), strict=True):
            sequence = ScheduledSequence(request, self.next_id(), answer=list(answer), batch=batch)
            self.by_id[request.id] = sequence
            self.waiting.add(sequence)
        why = "the queue is full and you hold most of it, so this request made room for another client; try again later"
        return tuple(Refused(sequence.request.id, why) for sequence in displaced)

    def describe(self, sequence: ScheduledSequence) -> MovedSample:
        """Return what another scheduler needs to go on with a live request."""
        begun = sequence.phase is not Phase.QUEUED or self.waiting.is_returning(sequence)
        return MovedSample(sequence.request, tuple(sequence.answer), sequence.scored, sequence.batch, begun)

    def take_over(self, moved: Iterable[MovedSample]) -> None:
        """Go on with requests of another scheduler. Those that had begun go first, and the queue may exceed its limit.

        It was accepted there, so it is not refused now; what all schedulers accept together is bounded.
        """
        begun = []
        for sample in moved:
            sequence = ScheduledSequence(
                sample.request, self.next_id(), answer=list(sample.answer), scored=sample.scored, batch=sample.batch
            )
            self.by_id[sample.request.id] = sequence
            if sample.begun:
                begun.append(sequence)
            else:
                self.waiting.add(sequence)
        self.waiting.put_back(begun)
