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


def sequence(number: int, adapter: str = "") -> ScheduledSequence:
    return ScheduledSequence(Request(f"r{number}", (1,), SamplingParams(), 8, adapter=adapter), number)


def test_all_members_of_a_lane_have_the_same_adapter_and_nobody_waits_for_another_ones_lane() -> None:
    lanes = LaneAssignment(2, 2)
    for i, adapter in enumerate(["", "", "a", "b", "a", "", "b", "", "a"]):
        assert lanes.with_one_more(sequence(i, adapter)) is not None
        lanes.enter(sequence(i, adapter))
    kinds = [[s.owner.adapter for s in members] for members in lanes.members]
    assert kinds == [["", ""], ["", ""], ["a", "a"], ["b", "b"], ["a"]]
    assert lanes.with_one_more(sequence(9)) is None
    assert lanes.with_one_more(sequence(9, "b")) is not None


def test_lanes_beyond_those_of_the_plan_close_once_they_are_empty_and_idle() -> None:
    lanes = LaneAssignment(1, 4)
    base, adapted = sequence(1), sequence(2, "a")
    lanes.enter(base)
    lanes.enter(adapted)
    adapted.next_token = 5
    lanes.begin(1, [adapted], 7)
    lanes.leave(adapted)
    assert len(lanes.members) == 2  # its frame is in the ring
    lanes.end(1, 7, [])
    assert len(lanes.members) == 1
    lanes.end(1, 7, [])  # such as of a dropped guess
    lanes.enter(later := sequence(3, "a"))
    assert later.lane == 1


def test_lanes_are_balanced_among_those_of_one_adapter() -> None:
    lanes = LaneAssignment(2, 4)
    members = [sequence(i) for i in range(6)]
    for member in members:
        lanes.enter(member)
    lanes.enter(alone := sequence(7, "a"))
    for member in [m for m in members if m.lane == 1][:2]:
        lanes.leave(member)
    lanes.rebalance(lambda after: True)
    assert list(map(len, lanes.members)) == [2, 2, 1]
    assert alone.lane == 2
