"""The frames that a request can be traced by: its own and others', who may see them, and that they are bounded."""

from __future__ import annotations

import gc
import sys

import pytest

from cluster.coordinator.frame_history import KEPT_REQUESTS, FrameHistory, trace_request
from cluster.core.frames import Frame, Sample, StageTiming
from cluster.core.plan import LayerRange, ModelRef, PlannedStage, StageSpec
from cluster.core.request import FinishReason
from cluster.core.request_trace import RequestTrace, TracedEpoch, TracedStage
from cluster.scheduler.outcome import Outcome, Produced

TIMINGS = (StageTiming(0, 10, 200, 3), StageTiming(1, 20, 300, 4))
SPECS = [StageSpec(1, i, 2, ModelRef("m", "", ""), LayerRange(i, i + 1), 64) for i in range(2)]
STAGES = [PlannedStage(spec, name, 1, 1) for spec, name in zip(SPECS, "ab", strict=True)]


def returned(history: FrameHistory, number: int, sent: float, back: float, *requests: str, index: int = -1) -> None:
    """A frame of these requests comes back; the first gets token ``index`` unless it is -1."""
    events = ()
    if index >= 0:
        events = (Produced(requests[0], index, Sample(0, 0, 7), None, True, 0),)
    history.add(Frame(1, 0, number), Outcome(requests, TIMINGS, sent, events, rows=len(requests)), back)


def history_of_two() -> FrameHistory:
    history = FrameHistory()
    history.begin_epoch(1, STAGES)
    returned(history, 0, 8.0, 9.0, "before")
    history.accept("a", "amy", 5, 10.0)
    returned(history, 1, 10.5, 11.0, "a", index=0)
    history.accept("b", "ben", 6, 11.0)
    returned(history, 2, 11.0, 12.0, "b", "a", index=0)
    end = Produced("a", 1, Sample(0, 0, 1), FinishReason.STOP, False, 0)  # the end-of-sequence token is not one
    history.add(Frame(1, 0, 3, void=True), Outcome((), TIMINGS, 11.5, (end,)), 12.5)
    history.end("a", 12.5)
    returned(history, 4, 13.0, 14.0, "b", index=1)
    return history


def trace(history: FrameHistory, request_id: str, client: str | None = None) -> RequestTrace:
    found = trace_request([history.copy()], request_id, client)
    assert found
    return found


def test_a_trace_has_the_requests_frames_and_those_of_others_meanwhile() -> None:
    found = trace(history_of_two(), "a")
    assert (found.request_id, found.prompt_tokens, found.ended_seconds, found.complete) == ("a", 5, 2.5, True)
    assert found.epochs == (TracedEpoch(1, (TracedStage("a", LayerRange(0, 1)), TracedStage("b", LayerRange(1, 2)))),)
    shown = [(f.number, f.own, f.void, f.rows, f.tokens) for f in found.frames]
    assert shown == [(1, True, False, 1, (0,)), (2, True, False, 2, ()), (3, False, True, 0, ())]
    first = found.frames[0]
    assert (first.sent_seconds, first.returned_seconds, first.timings) == (0.5, 1.0, TIMINGS)


def test_a_live_request_can_be_traced_so_far() -> None:
    found = trace(history_of_two(), "b")
    assert found.ended_seconds is None
    assert [(f.number, f.tokens) for f in found.frames] == [(1, ()), (2, (0,)), (3, ()), (4, (1,))]


def test_clients_see_their_own_requests_alone() -> None:
    history = history_of_two()
    assert trace(history, "", "amy").request_id == trace(history, "a", "amy").request_id == "a"
    assert trace(history, "").request_id == "b"
    copy = history.copy()
    for unseen in (("b", "amy"), ("", "eve"), ("c", None)):
        assert trace_request([copy], *unseen) is None
    history.accept("canary-1", "", 1, 20.0)  # the coordinator's own
    assert trace(history, "").request_id == "b"


def test_the_newest_request_of_all_loops_is_found_and_one_that_moved_in_its_last_loop() -> None:
    first, second = history_of_two(), FrameHistory()
    second.begin_epoch(2, STAGES[:1])
    second.accept("c", "amy", 7, 11.5)
    second.accept("a", "amy", 5, 12.4)
    copies = [second.copy(), first.copy()]
    newest = trace_request(copies, "", None)
    moved, other = trace_request(copies, "a", "amy"), trace_request(copies, "b", "ben")
    assert newest
    assert moved
    assert other
    assert (newest.request_id, moved.frames, len(other.frames)) == ("a", (), len(trace(first, "b").frames))
    assert trace_request([], "", None) is None


def test_an_id_that_is_used_again_is_the_new_request() -> None:
    history = history_of_two()
    history.accept("a", "amy", 9, 20.0)
    assert (trace(history, "a").prompt_tokens, trace(history, "a").frames) == (9, ())


def test_what_is_kept_is_bounded_and_a_trace_says_what_is_missing() -> None:
    one = FrameHistory()
    one.accept("a", "amy", 5, 0.0)
    returned(one, 0, 0.0, 0.5, "a", index=0)
    (frame,) = one.copy().frames
    history = FrameHistory(kept_bytes=3 * sys.getsizeof(frame))
    history.begin_epoch(1, STAGES)
    history.accept("a", "amy", 5, 0.0)
    for number in range(5):
        returned(history, number, number, number + 0.5, "a", index=number)
    history.accept("b", "amy", 5, 4.9)
    found = trace(history, "a")
    assert ([f.number for f in found.frames], found.complete) == ([2, 3, 4], False)
    assert trace(history, "b").complete
    for i in range(KEPT_REQUESTS):
        history.accept(f"r{i}", "amy", 1, 5.0)
    assert trace_request([history.copy()], "a", None) is None
    for number in range(99):
        history.add(Frame(1, 0, number), Outcome((), (), 6.0), 7.0)  # without times, as frames of edits alone
    assert sum(map(sys.getsizeof, history.copy().frames)) <= 3 * sys.getsizeof(frame)


@pytest.mark.parametrize("rows", [1, 64])
def test_what_is_kept_takes_the_same_memory_however_many_rows_a_frame_has(rows: int) -> None:
    limit = 1 << 16
    names = [f"cmpl-{number:032x}" for number in range(rows)]
    history = FrameHistory(limit)
    for name in names:
        history.accept(name, "amy", 5, 0.0)
    for number in range(2000):
        events = tuple(Produced(name, number, Sample(0, 0, 7), None, True, 0) for name in names)
        outcome = Outcome(tuple(names), TIMINGS, float(number), events, rows=rows)
        history.add(Frame(1, 0, number), outcome, number + 0.5)
    kept = history.copy().frames
    assert limit - 600 < sum(map(sys.getsizeof, kept)) <= limit
    assert not gc.is_tracked(kept[0])  # a collection does not have to look at it
    for name in (names[0], names[-1]):
        frames = trace(history, name).frames
        assert len(frames) == len(kept)
        assert (frames[-1].number, frames[-1].tokens, frames[-1].rows, frames[-1].own) == (1999, (1999,), rows, True)
