"""How far stages overlap in training: the time of a run, simulated from the orders alone."""

from __future__ import annotations

import heapq

import pytest

from cluster.core.training_frames import DataBatch, Purpose, Task, TrainingReply
from cluster.scheduler.training_schedule import TrainingSchedule

FORWARD, BACKWARD = 1, 2
"""What a batch costs a stage; the last one does both at once."""


def simulate(stages: int, steps: int, updates: int) -> int:
    """Return when the last of ``updates`` times ``steps`` batches is done, if stages compute equally long."""
    schedule = TrainingSchedule(stages, 0)
    busy_until = [0] * stages
    replies: list[tuple[int, int]] = []
    now = number = 0
    while True:
        while schedule.wants and number < updates * steps:
            number += 1
            batch = DataBatch(number, Purpose.TRAIN, number, last=False, shape=(1, 2), tokens=b"", lengths=b"")
            schedule.add(batch, update=number % steps == 0)
        for order in schedule.next_orders():
            whole = order.stage == stages - 1
            cost = FORWARD + BACKWARD if whole else FORWARD if order.task is Task.FORWARD else BACKWARD
            busy_until[order.stage] = max(busy_until[order.stage], now) + cost
            heapq.heappush(replies, (busy_until[order.stage], order.stage))
        if not replies:
            return now
        now, stage = heapq.heappop(replies)
        schedule.on_reply(stage, TrainingReply(1, 1))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_stages_overlap_as_far_as_the_order_of_updates_allows(stages: int, steps: int) -> None:
    """An update waits for its batches, so each one costs the time of filling the pipeline once."""
    updates = 3
    assert simulate(stages, steps, updates) == updates * (FORWARD + BACKWARD) * (steps + stages - 1)
