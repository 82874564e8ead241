"""Requests that move to another scheduler in mid-answer: the same tokens, once each, and nothing is left behind."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler.outcome import Produced
from cluster.scheduler.scheduler import Scheduler
from effort import effort
from scheduler.stages import EOS, Stages, capacity
from scheduler.test_scheduler import request, run_dry


class Copy:
    """A scheduler and its stages."""

    def __init__(self, **options: int) -> None:
        self.scheduler = Scheduler(3, capacity(**options), frozenset({EOS}))
        self.stages = Stages()
        self.said: dict[str, list[int]] = defaultdict(list)

    def step(self) -> None:
        """Let one frame come back, if there is one."""
        self.stages.take(self.scheduler.next_frames(0.0))
        if self.stages.frames:
            for event in self.scheduler.on_frame(self.stages.give()).events:
                if isinstance(event, Produced):
                    self.said[event.request_id].append(event.sample.token)

    def finish(self) -> None:
        for name, tokens in run_dry(self.scheduler, self.stages).items():
            self.said[name] += tokens


PROMPTS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@given(PROMPTS, st.integers(0, 25), st.sets(st.integers(0, 5)), st.integers(0, 12), st.booleans())
@settings(max_examples=effort(40, 2000))
def test_moved_requests_get_the_tokens_that_they_would_have_got(
    prompts: list[int], steps: int, chosen: set[int], later: int, kept: bool
) -> None:
    asked = [request(f"r{i}", prompt=length, max_tokens=6, client=f"c{i % 2}") for i, length in enumerate(prompts)]
    alone = Copy()
    source, target = (Copy(rows=2, prefixes=200 * kept) for _ in range(2))
    for one in asked:
        alone.scheduler.submit(one)
        source.scheduler.submit(one)
    alone.finish()
    target.scheduler.submit(request("own", prompt=7, max_tokens=9))
    for _ in range(steps):
        source.step()
        target.step()
    ids = [f"r{i}" for i in sorted(chosen)]
    live = [s.request.id for s in source.scheduler.sequences]
    moved = source.scheduler.hand_over(ids)
    assert [one.request.id for one in moved] == [i for i in ids if i in live]
    for _ in range(later):
        source.step()
    assert target.scheduler.take_over(moved) == ()
    source.finish()
    target.finish()
    for one in asked:
        assert source.said[one.id] + target.said[one.id] == alone.said[one.id]
    assert len(target.said["own"]) == 9
    for copy in (source, target):
        assert (copy.scheduler.sequences, copy.scheduler.in_flight) == ((), 0)
        assert copy.scheduler.reserved == (0, 0)


def test_requests_that_had_begun_go_before_those_that_wait() -> None:
    source, target = Copy(rows=1), Copy(rows=1)
    for name in ("first", "second", "third"):
        source.scheduler.submit(request(name))
    source.step()
    target.scheduler.submit(request("busy"))
    target.scheduler.submit(request("waits"))
    target.scheduler.take_over(source.scheduler.hand_over(["second", "first", "third"]))
    assert [s.request.id for s in target.scheduler.sequences] == ["busy", "first", "waits", "second", "third"]


def test_one_that_never_fits_is_given_back() -> None:
    source, target = Copy(budget=1000), Copy(budget=20)
    source.scheduler.submit(request("large", prompt=30))
    source.scheduler.submit(request("small"))
    (left,) = target.scheduler.take_over(source.scheduler.hand_over(["large", "small"]))
    assert left.request.id == "large"
    source.scheduler.take_over([left])
    source.finish()
    target.finish()
    assert (len(source.said["large"]), len(target.said["small"])) == (4, 4)


def test_a_full_queue_takes_moved_requests_and_refuses_new_ones() -> None:
    source, target = Copy(rows=1, queue=2), Copy(rows=1, queue=1)
    for i in range(3):
        source.scheduler.submit(request(f"r{i}"))
    target.scheduler.submit(request("a"))
    target.scheduler.submit(request("b"))
    target.scheduler.take_over(source.scheduler.hand_over(["r0", "r1", "r2"]))
    with pytest.raises(Exception, match="the queue is full"):
        target.scheduler.submit(request("c"))
    target.finish()
    assert sorted(target.said) == ["a", "b", "r0", "r1", "r2"]
