"""Suspicion and patience with the test's own clock: slow is not dead, silence is, and our own pauses do not count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.limits import FRAME_FLOOR_S, FRAME_TIMEOUT_S
from cluster.membership.frame_deadlines import FrameDeadlines
from cluster.membership.suspicion import Standing, Suspicion


def watched(*workers: str, now: float = 0.0) -> Suspicion:
    suspicion = Suspicion(suspect_s=1.0, gone_s=2.5)
    for worker in workers:
        suspicion.on_heard(worker, now)
    suspicion.judge_silence(now)
    return suspicion


def standings(
    suspicion: Suspicion, until: float, since: float = 0.0, step: float = 0.1
) -> list[tuple[float, str, str]]:
    """Look every 0.1 s; what changed, and when."""
    changes, now = [], since
    while now < until:
        now = round(now + 0.1, 3)
        changes += [(now, b.worker, str(b.standing)) for b in suspicion.judge_silence(now)]
    return changes


def test_silence_makes_suspect_then_gone_and_a_word_brings_back() -> None:
    suspicion = watched("a")
    assert standings(suspicion, 3.0) == [(1.0, "a", "suspect"), (2.5, "a", "gone")]
    belief = suspicion.of("a")
    assert belief is not None
    assert (belief.since, belief.heard, belief.losses) == (2.5, 0.0, 1)
    assert "has not been heard for 2.5 s" in belief.why
    (back,) = suspicion.on_heard("a", 3.0)
    assert (back.standing, back.losses, back.why) == (Standing.UP, 1, "")


def test_a_refusal_is_believed_at_once_and_told_once() -> None:
    suspicion = watched("a", "b")
    (gone,) = suspicion.on_refusal("a", "nobody listens there", 0.2)
    assert gone.standing is Standing.GONE
    assert suspicion.on_refusal("a", "still nobody", 0.3) == ()
    assert standings(suspicion, 0.9, since=0.3) == []
    assert suspicion.is_gone("a")
    assert not suspicion.is_gone("b")


def test_a_slow_worker_is_never_gone() -> None:
    """An answer every 1.9 s: late, but alive."""
    suspicion, now = watched("a"), 0.0
    for _ in range(50):
        changes = standings(suspicion, now + 1.9, since=now)
        now += 1.9
        assert not [c for c in changes if c[2] == "gone"]
        suspicion.on_heard("a", now)


def test_time_in_which_nobody_looked_is_held_against_no_one() -> None:
    suspicion = watched("a", "b")
    assert standings(suspicion, 0.5) == []
    assert suspicion.judge_silence(60.0) == ()  # this machine slept for a minute
    suspicion.on_heard("a", 60.1)
    assert next(c for c in standings(suspicion, 64.0, since=60.1) if c[2] == "gone")[1] == "b"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(("heard", "refused", "look")), st.floats(0, 3))))
def test_whatever_happens_beliefs_are_sound(events: list[tuple[str, str, float]]) -> None:
    suspicion, now, heard = watched(*"abc"), 0.0, dict.fromkeys("abc", 0.0)
    for worker, what, later in events:
        now += later
        if what == "heard":
            suspicion.on_heard(worker, now)
            heard[worker] = now
            assert not suspicion.is_gone(worker)
        elif what == "refused":
            suspicion.on_refusal(worker, "no", now)
            assert suspicion.is_gone(worker)
        else:
            for belief in suspicion.judge_silence(now):
                assert belief.standing is not Standing.UP
                assert now - heard[belief.worker] >= 1.0
        assert all(b.since <= now and b.heard <= now for b in suspicion)


def took(patience: FrameDeadlines, tokens: int, seconds: float) -> None:
    """A frame came back so long after the one before it."""
    patience.learn(tokens, 0.0, patience.alive_at + seconds)


def test_nothing_is_overdue_before_anything_was_measured() -> None:
    patience = FrameDeadlines(5.0)
    assert patience.due_at(7.0, 0) == 7.0 + FRAME_TIMEOUT_S
    took(patience, 0, 0.01)
    assert patience.allowed_seconds(512) == FRAME_TIMEOUT_S


def test_quick_stages_get_the_floor_and_slow_ones_many_times_what_they_take() -> None:
    patience = FrameDeadlines(0.0)
    took(patience, 0, 0.01)
    assert patience.allowed_seconds(0) == FRAME_FLOOR_S
    took(patience, 0, 4.0)
    assert patience.allowed_seconds(0) == pytest.approx(40.0)
    for _ in range(1000):
        took(patience, 0, 0.01)
    assert patience.due_at(0.0, 0) == pytest.approx(14.01 + FRAME_FLOOR_S)


def test_a_long_piece_of_a_prompt_gets_as_much_more() -> None:
    patience = FrameDeadlines(0.0)
    took(patience, 0, 0.1)
    took(patience, 100, 2.0)
    assert patience.allowed_seconds(200) == pytest.approx(10 * (0.98 * 0.1 + 200 * 0.02))
    assert patience.allowed_seconds(10**9) == FRAME_TIMEOUT_S
