"""The fair queue's clocks: kept only for clients that are ahead of the others."""

from __future__ import annotations

from cluster.core.request import Request, SamplingParams
from cluster.scheduler.fair_queue import FairQueue
from cluster.scheduler.sequence import ScheduledSequence


def sequence(number: int, client: str) -> ScheduledSequence:
    return ScheduledSequence(Request(f"r{number}", (1, 2), SamplingParams(), 8, client=client), number)


def test_clients_that_come_once_are_forgotten_under_constant_load() -> None:
    waiting = FairQueue(100)
    for i in range(3):
        waiting.add(sequence(i, "stays"))
    for i in range(1000):
        waiting.add(sequence(10 + 2 * i, f"client {i}"))
        waiting.add(sequence(11 + 2 * i, "stays"))
        waiting.take()
        waiting.take()
    assert len(waiting) == 3
    assert len(waiting._clocks) < 10
