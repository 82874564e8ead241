"""Patience with a slow machine, with the test's own clock: more after every false alarm, and bounded."""

from __future__ import annotations

import pytest

from cluster.core.limits import (
    ENGINE_SILENCE_S,
    FALSE_ALARM_S,
    FRAME_FLOOR_S,
    LAG_STEPS,
    MAX_PATIENCE,
    MAX_ROSTER,
    SLOW_ANSWER_S,
)
from cluster.membership.frame_deadlines import FrameDeadlines
from cluster.membership.slowness import Alarms, Silence, SlowAnswers
from cluster.membership.suspicion import Suspicion


def test_one_slow_answer_changes_nothing_and_two_double_the_second_slowest() -> None:
    answers = SlowAnswers(2.5)
    answers.add(9.0, 0.0)
    assert answers.allowed_s(1.0) == 2.5
    answers.add(4.0, 2.0)
    assert answers.allowed_s(3.0) == 8.0
    assert answers.allowed_s(2.1 + SLOW_ANSWER_S) == 2.5


def test_experience_is_bounded() -> None:
    answers = SlowAnswers(2.5)
    for now in range(10):
        answers.add(3600.0, now)
    assert answers.allowed_s(10.0) == MAX_PATIENCE * 2.5


def test_the_second_silence_of_an_address_and_each_further_one_gives_it_more_time() -> None:
    alarms = Alarms()
    grown = []
    for now in range(6):
        alarms.add("a", now)
        grown.append(alarms.growth("a", now))
    assert grown == [1.0, 4.0, 16.0, 16.0, 16.0, 16.0]
    assert alarms.growth("b", 6.0) == 1.0
    assert alarms.growth("a", 6.0 + FALSE_ALARM_S) == 1.0


def test_alarms_remember_so_many_addresses_and_no_more() -> None:
    alarms = Alarms()
    for i in range(3 * MAX_ROSTER):
        alarms.add(f"{i}", 0.0)
        alarms.add(f"{i}", 0.0)
    remembered = [i for i in range(3 * MAX_ROSTER) if alarms.growth(f"{i}", 0.0) > 1.0]
    assert remembered == list(range(2 * MAX_ROSTER, 3 * MAX_ROSTER))


def test_an_engine_that_computes_is_silent_for_ten_times_as_long_but_not_for_ever() -> None:
    hung, computing = Silence(), Silence()
    for _ in range(4):
        hung.add(2.5, excused=False)
    assert hung.seconds == ENGINE_SILENCE_S
    for _ in range(40):
        computing.add(2.5, excused=True)
    assert computing.seconds == pytest.approx(ENGINE_SILENCE_S)
    computing.end()
    assert computing.seconds == 0.0


def test_a_worker_whose_machine_is_late_or_this_one_is_is_given_as_much_more() -> None:
    suspicion = Suspicion(suspect_s=1.0, gone_s=2.5)
    suspicion.on_heard("a", 0.0)
    suspicion.note_lag("a", 0.5)
    assert suspicion.allowed_silence_s("a", 0.0) == 2.5 + 0.5 * LAG_STEPS
    assert suspicion.worst_lag() == 0.5
    suspicion.judge_silence(0.9, lag_s=0.25)
    for tenths in range(10, 85):
        assert not any(b.standing == "gone" for b in suspicion.judge_silence(tenths / 10, lag_s=0.25)), tenths
    (gone,) = suspicion.judge_silence(8.6, lag_s=0.25)
    assert gone.standing == "gone"
    assert suspicion.worst_lag() == 0.0, "whoever is gone slows nobody down"


def test_a_worker_that_answers_every_four_seconds_is_gone_twice_and_then_slow() -> None:
    suspicion, losses = Suspicion(suspect_s=1.0, gone_s=2.5), []
    suspicion.on_heard("a", 0.0)
    for tenths in range(1, 400):
        now = tenths / 10
        suspicion.judge_silence(now)
        if tenths % 40 == 0:
            suspicion.on_heard("a", now)
            belief = suspicion.of("a")
            assert belief
            losses.append(belief.losses)
    assert losses == [1, 2, 2, 2, 2, 2, 2, 2, 2]
    suspicion.forget("a")
    assert suspicion.worst_lag() == 0.0


def test_a_frame_that_was_overdue_gives_the_next_ring_twice_the_time_until_frames_are_steady() -> None:
    patience = FrameDeadlines(0.0, overdue=2)
    patience.learn(0, 0.0, 0.01)
    assert patience.due_at(0.0, 0) == pytest.approx(0.01 + 4 * FRAME_FLOOR_S)
    assert patience.due_at(0.0, 0, 7.0) == pytest.approx(7.01 + 4 * FRAME_FLOOR_S)
    for i in range(300):
        patience.learn(0, 0.0, 0.01 * (i + 2))
    assert (patience.overdue, patience.growth) == (0, 1.0)
    assert FrameDeadlines(0.0, overdue=99).growth == MAX_PATIENCE
