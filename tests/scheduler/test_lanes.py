"""Lanes are balanced whenever possible."""

from __future__ import annotations

from cluster.core.request import Request, SamplingParams
from cluster.scheduler.lanes import LaneAssignment
from cluster.scheduler.sequence import ScheduledSequence


def test_a_busy_lane_does_not_keep_another_as_full_from_giving() -> None:
    lanes = LaneAssignment(3, 4)
    members = [ScheduledSequence(Request(f"r{i}", (1,), SamplingParams(), 8), i) for i in range(9)]
    for member in members:
        lanes.enter(member)
    for member in [m for m in members if m.lane == 2]:
        lanes.leave(member)
    lanes.begin(0, list(lanes.members[0]), 0)
    lanes.rebalance(lambda after: True)
    assert sorted(map(len, lanes.members)) == [1, 2, 3]
