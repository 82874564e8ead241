"""Reordering: which frames may overtake which, and that none starves."""

from __future__ import annotations

from dataclasses import replace

from cluster.core.frames import Compute, Drop, Frame, Join, Leave, Restore, Save, Step, Trim
from cluster.core.request import SamplingParams
from cluster.scheduler.reordering import ReorderBuffer


def prefill(number: int, sequence: int, *edits: Join | Leave | Save | Restore | Drop) -> Frame:
    return Frame(1, 9, number, edits, Step(Compute.PREFILL, (sequence,), ((1, 2),)))


def decode(number: int, lane: int, *sequences: int, edits: tuple[Leave | Restore | Save, ...] = ()) -> Frame:
    return Frame(1, lane, number, edits, Step(Compute.DECODE, sequences, tuple((1,) for _ in sequences)))


def order(*frames: Frame) -> list[int]:
    turns = ReorderBuffer()
    for frame in frames:
        turns.add(frame, ready=True)
    taken = []
    while frame := turns.take():
        taken.append(frame.number)
    assert not len(turns)
    return taken


def test_a_decode_frame_goes_before_waiting_prefills_of_others() -> None:
    assert order(prefill(0, 1), prefill(1, 1), decode(2, 0, 5)) == [2, 0, 1]


def test_a_sequence_keeps_its_own_order() -> None:
    assert order(prefill(0, 1), prefill(1, 2), decode(2, 0, 2), decode(3, 1, 3)) == [3, 0, 1, 2]


def test_each_lane_overtakes_a_prefill_once() -> None:
    turns = ReorderBuffer()
    turns.add(prefill(0, 1), ready=True)
    turns.add(prefill(1, 1), ready=True)
    taken = []
    for number in range(2, 8, 2):  # two lanes whose next frame comes as soon as the last was taken
        turns.add(decode(number, 0, 5), ready=True)
        turns.add(decode(number + 1, 1, 6), ready=True)
        taken += [frame.number for _ in range(3) if (frame := turns.take())]
    assert taken == [2, 3, 0, 4, 5, 1, 6, 7]


def test_edits_commute_only_where_they_touch_something_else() -> None:
    join, leave = Join(2, 1, SamplingParams()), Leave(2)
    assert order(prefill(0, 1), decode(1, 0, 5, edits=(leave,))) == [1, 0]
    assert order(prefill(0, 2, join), decode(1, 0, 5, edits=(leave,))) == [0, 1]
    assert order(prefill(0, 1, Drop(7)), decode(1, 0, 5, edits=(Restore(5, 7, 1),))) == [0, 1]
    assert order(prefill(0, 1, Save(3, 7)), decode(1, 0, 3)) == [0, 1]


def test_a_frame_without_its_tensors_lets_others_pass_and_keeps_its_place() -> None:
    turns = ReorderBuffer()
    turns.add(prefill(0, 1), ready=False)
    turns.add(prefill(1, 2), ready=True)
    turns.add(decode(2, 0, 1), ready=True)
    for number in (3, 4, 5):  # a lane may pass again and again: nothing ready waits for it
        turns.add(decode(number, 1, 8), ready=True)
        taken = turns.take()
        assert taken
        assert taken.number == number
    assert turns.take() is None
    assert turns.waiting_without_tensors(0) is not None
    assert turns.waiting_without_tensors(1) is None
    turns.complete(prefill(0, 1))
    assert [frame.number for _ in range(3) if (frame := turns.take())] == [0, 2, 1]


def guess(number: int, sequence: int, start: int, *edits: Trim, lane: int = 3) -> Frame:
    return Frame(1, lane, number, edits, Step(Compute.DECODE, (sequence,), ((1,),), guesses=1, start=start))


def test_a_guess_lets_what_others_wait_for_go_first() -> None:
    assert order(guess(0, 1, 4), guess(1, 1, 5), decode(2, 0, 5)) == [2, 0, 1]
    assert order(guess(0, 1, 4), prefill(1, 2), decode(2, 0, 5)) == [1, 2, 0]
    assert order(guess(0, 1, 4), Frame(1, 0, 1, (Drop(7),)), guess(2, 2, 9)) == [1, 0, 2]


def test_a_guess_overtakes_nothing_and_keeps_the_order_of_its_sequence() -> None:
    assert order(prefill(0, 1), guess(1, 5, 4)) == [0, 1]
    assert order(guess(0, 1, 4), decode(1, 3, 1)) == [0, 1]


def test_a_guess_waits_for_one_frame_of_each_lane_and_one_prompt_chunk() -> None:
    """It may turn out to be right, and its own next token then waits for it."""
    turns = ReorderBuffer()
    turns.add(guess(0, 1, 4), ready=True)
    taken = []
    for number in range(1, 9, 2):
        turns.add(decode(number, 0, 5), ready=True)
        turns.add(prefill(number + 1, 6), ready=True)
        taken += [frame.number for _ in range(2) if (frame := turns.take())]
    assert taken.index(0) <= 2


def test_a_waiting_guess_that_a_later_frame_trims_away_is_void() -> None:
    turns = ReorderBuffer()
    for frame in (guess(0, 1, 4), guess(1, 1, 5), guess(2, 2, 5), guess(3, 1, 6)):
        turns.add(frame, ready=True)
    turns.add(replace(decode(4, 3, 1), edits=(Trim(1, 5),)), ready=True)
    turns.add(guess(5, 1, 7), ready=True)  # behind the trim
    found = {frame.number: frame.void for _ in range(6) if (frame := turns.take())}
    assert found == {0: False, 1: True, 2: False, 3: True, 4: False, 5: False}
